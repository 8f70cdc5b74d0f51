"""Evaluation: probes on frozen features, what heads are worth, and the report of a run."""

from __future__ import annotations

from jepa_fast.eval.features import Encode, Features, extract
from jepa_fast.eval.figures import MaskExample, WordMap
from jepa_fast.eval.heads import HeadScores, score_distribution, score_head
from jepa_fast.eval.knn import knn_accuracy
from jepa_fast.eval.linear import LinearProbe, fit_linear_probe
from jepa_fast.eval.patches import patch_accuracy
from jepa_fast.eval.probes import ProbeComparison, compare_with_untrained, probe_all
from jepa_fast.eval.report import write_report

__all__ = [
    "Encode",
    "Features",
    "HeadScores",
    "LinearProbe",
    "MaskExample",
    "ProbeComparison",
    "WordMap",
    "compare_with_untrained",
    "extract",
    "fit_linear_probe",
    "knn_accuracy",
    "patch_accuracy",
    "probe_all",
    "score_distribution",
    "score_head",
    "write_report",
]
