"""One HTML file that shows how a run went. It needs no other file, no network and no script."""

from __future__ import annotations

import platform
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib import metadata, resources
from pathlib import Path
from typing import Any

import torch

from jepa_fast.data.extras import require
from jepa_fast.eval import figures
from jepa_fast.eval.figures import MaskExample, WordMap
from jepa_fast.eval.heads import HeadScores
from jepa_fast.eval.probes import ProbeComparison

Rows = Sequence[Mapping[str, float | None]]

# Title, what it tells, and the logged values of each chart that gets a place of its own.
_CHARTS: tuple[tuple[str, str, dict[str, str]], ...] = (
    ("Loss", "", {"loss": "loss", "prediction_loss": "prediction"}),
    (
        "Effective rank",
        "RankMe of a batch's tokens; near 1 everything has become one direction.",
        {"target_rank": "target", "prediction_rank": "prediction"},
    ),
    (
        "Spread",
        "Standard deviation a dimension: mean, and the narrowest dimension.",
        {
            "target_std_mean": "target, mean",
            "prediction_std_mean": "prediction, mean",
            "target_std_min": "target, minimum",
            "prediction_std_min": "prediction, minimum",
        },
    ),
    (
        "Text regularisers",
        "Sparsity of the patch-word similarity, and its consistency over layers.",
        {"sparsity": "sparsity", "consistency": "consistency"},
    ),
    (
        "Positive cosines",
        "Share of patch-word pairs with a positive cosine; at 0 the regularisers are dead.",
        {"positive_cosine_share": "share"},
    ),
    (
        "Attention entropy",
        "Of a patch's attention over a caption's words; 1, or the largest value, is uniform.",
        {"attention_entropy": "entropy"},
    ),
    ("Throughput", "Images a second.", {"images_per_second": "images a second"}),
)
_PROBES = {"knn": "kNN", "linear": "Linear probe", "patch": "Patch probe"}
_PACKAGES = ("torch", "numpy", "torchvision", "webdataset", "scikit-learn", "transformers", "timm")


def write_report(
    path: str | Path,
    *,
    title: str,
    rows: Rows = (),
    probes: Sequence[ProbeComparison] = (),
    head: HeadScores | None = None,
    masks: Sequence[MaskExample] = (),
    word_maps: Sequence[WordMap] = (),
    findings: Sequence[tuple[bool, str]] = (),
    notes: Sequence[str] = (),
    config: Mapping[str, Any] | None = None,
    versions: Mapping[str, str] | None = None,
    limits: Mapping[str, float] | None = None,
) -> Path:
    """Writes the report of a run; what is not given is left out.

    rows: the metrics log, one mapping a row, each with "step"; None stands for a value that was not
        finite.
    probes: from `compare_with_untrained`.
    head: from `score_head`.
    masks: images with their context and target blocks.
    word_maps: images with the similarity of their patches to words.
    findings: (good, sentence), shown at the top.
    notes: sentences such as how many samples were skipped.
    config: settings, may be nested.
    versions: default `installed_versions()`.
    limits: levels to draw into the charts of these metrics, such as {"target_rank": 4}.

    Returns the path.

    Raises ImportError naming the extra if matplotlib or jinja2 is missing, ValueError if a row has
    no step or a probe no untrained encoder beside it.
    """
    if any("step" not in row for row in rows):
        raise ValueError('rows must each have a "step", got one without')
    if alone := [probe.name for probe in probes if not probe.untrained]:
        raise ValueError(
            "probes: expected them beside untrained encoders, as of compare_with_untrained, "
            f"got {', '.join(alone)} alone"
        )
    jinja2 = require_for_reports()
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    template = resources.files("jepa_fast.eval").joinpath("report.html").read_text("utf-8")
    charts, more = _charts(rows, limits or {})
    html = environment.from_string(template).render(
        title=title,
        findings=findings,
        tiles=_tiles(rows, probes),
        charts=charts,
        more_charts=more,
        probes=[_probe(probe) for probe in probes],
        head=head
        and {"told": str(head), "ranks": _themed(figures.ranks, head.pit) if head.pit else None},
        masks=[(figures.plain_image(each.image), figures.masked_image(each)) for each in masks],
        word_maps=[_word_map(each) for each in word_maps],
        notes=notes,
        config=list(_flat(config or {})),
        versions=installed_versions() if versions is None else versions,
    )
    path = Path(path)
    path.write_text(html, encoding="utf-8")
    return path


def require_for_reports() -> Any:
    """The module jinja2. Raises ImportError naming the extra if it or matplotlib is missing."""
    jinja2 = require("jinja2", "The report")
    require("matplotlib.figure", "The report")
    return jinja2


def installed_versions() -> dict[str, str]:
    """Versions of what a run's numbers depend on, and the machine."""
    found = {"jepa-fast": _version("jepa-fast"), "python": platform.python_version()}
    found |= {name: _version(name) for name in _PACKAGES}
    found["machine"] = (
        f"{platform.system()} {platform.machine()}, {torch.get_num_threads()} threads"
    )
    if torch.cuda.is_available():
        found["gpu"] = torch.cuda.get_device_name()
    return {name: version for name, version in found.items() if version}


def _version(package: str) -> str:
    if package == "jepa-fast":
        from jepa_fast import __version__

        return __version__
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return ""


def _charts(rows: Rows, limits: Mapping[str, float]) -> tuple[list[Any], list[Any]]:
    """(title, what it tells, light picture, dark picture) of the known charts, and of the rest."""
    logged = list(dict.fromkeys(key for row in rows for key in row if key not in ("step", "epoch")))
    rest = dict.fromkeys(logged)
    charts = []
    for title, tells, names in _CHARTS:
        present = {key: label for key, label in names.items() if key in rest}
        # A prediction loss that is the whole loss would hide it.
        if "prediction_loss" in present and all(
            row.get("loss") == row.get("prediction_loss") for row in rows
        ):
            del present["prediction_loss"]
        if present:
            charts.append(_chart(title, tells, rows, present, limits))
        for key in names:
            rest.pop(key, None)
    more = [_chart(_spoken(key), "", rows, {key: _spoken(key)}, limits) for key in rest]
    return charts, more


def _chart(
    title: str, tells: str, rows: Rows, names: Mapping[str, str], limits: Mapping[str, float]
) -> tuple[str, str, str, str]:
    limit = next((limits[key] for key in names if key in limits), None)
    return title, tells, *_themed(figures.curve, rows, names, limit=limit)


def _themed(draw: Callable[..., str], *arguments: Any, **options: Any) -> tuple[str, str]:
    """The same picture on light and on dark ground."""
    light, dark = (draw(*arguments, theme=theme, **options) for theme in ("light", "dark"))
    return light, dark


def _tiles(rows: Rows, probes: Sequence[ProbeComparison]) -> list[tuple[str, str, str]]:
    """(name, value, remark) of the few numbers that say most."""
    tiles = []
    losses = [row["loss"] for row in rows if row.get("loss") is not None]
    if losses:
        tiles.append(("Loss", f"{losses[-1]:.3f}", f"from {losses[0]:.3f}"))
    speeds = sorted(row["images_per_second"] or 0 for row in rows if "images_per_second" in row)
    if speeds:
        tiles.append(("Throughput", f"{speeds[len(speeds) // 2]:,.0f}", "images/s, median"))
    ranks = [row["target_rank"] for row in rows if row.get("target_rank") is not None]
    if ranks:
        tiles.append(("Effective rank", f"{ranks[-1]:.1f}", f"from {ranks[0]:.1f}"))
    for probe in probes:
        remark = f"{100 * probe.gain:+.1f} over untrained"
        tiles.append((_PROBES.get(probe.name, probe.name), f"{probe.trained:.1%}", remark))
    return tiles


def _probe(probe: ProbeComparison) -> dict[str, Any]:
    """A row of the table; `at` are places on its scale in percent."""
    values = (probe.trained, *probe.untrained)
    low, high = min(values), max(values)
    room = max(0.15 * (high - low), 0.01)
    low, high = max(low - room, 0.0), min(high + room, 1.0)

    def at(value: float) -> str:
        return f"{100 * (value - low) / (high - low):.1f}"

    return {
        "name": _PROBES.get(probe.name, probe.name),
        "trained": f"{probe.trained:.1%}",
        "untrained": f"{probe.mean:.1%}",
        "std": f"{100 * probe.std:.1f}",
        "range": f"{probe.low:.1%} to {probe.high:.1%}",
        "seeds": len(probe.untrained),
        "gain": f"{100 * probe.gain:+.1f}",
        "beyond": probe.beyond_spread,
        "below": probe.trained < probe.low,
        "at": {"trained": at(probe.trained), "untrained": [at(v) for v in probe.untrained]},
        "scale": (f"{low:.0%}", f"{high:.0%}"),
    }


def _word_map(each: WordMap) -> dict[str, Any]:
    low, high = figures.similarity_range(each)
    return {
        "caption": each.caption,
        "image": figures.plain_image(each.image),
        "words": [(word, figures.word_image(each, i)) for i, word in enumerate(each.words)],
        "low": f"{low:.2f}",
        "high": f"{high:.2f}",
    }


def _flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """Nested settings as (dotted name, value)."""
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", str(value)


def _spoken(key: str) -> str:
    return key.replace("_", " ").capitalize()
