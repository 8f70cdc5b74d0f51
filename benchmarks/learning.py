"""Whether text helps: TC-JEPA, what it is made of, and I-JEPA, on the scenes of the demo.

`python benchmarks/learning.py` trains each variant with several seeds, on the same scenes, for the
same number of steps, from the same encoder, and probes the teachers. It writes
benchmarks/results/recipes/learning.json, from which the README has its table. Each run is a process
of one thread; finished ones of the same commit are kept in --scratch, and the same command goes on
from there.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from concurrent.futures import ThreadPoolExecutor
from copy import deepcopy
from pathlib import Path
from statistics import fmean
from typing import Any

import yaml
from processes import ROOT, run_python

if str(ROOT) not in sys.path:  # started as a script, in a checkout that is not installed
    sys.path.append(str(ROOT))

from jepa_fast.perf.files import write_json
from jepa_fast.perf.machine import commit, uncommitted, versions
from jepa_fast.train.config import RECIPES
from jepa_fast.train.logs import read_rows

VARIANTS: dict[str, dict[str, Any]] = {
    "ijepa": {},
    "tcjepa": {},
    "no_regularisers": {"model": {"sparsity_weight": 0.0, "consistency_weight": 0.0}},
    "one_layer": {"model": {"text_layers": [0]}},
    "one_caption": {"text": {"captions": 1}},
    "append": {"model": {"conditioning": "append"}},
}
"""What departs from the demo's recipe; `ijepa` has none of what is about text."""
_LAST = 0.1  # the share of the steps that the prediction loss is a mean of


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--images", type=int, help="to train on (default: the demo's)")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="runs at a time")
    parser.add_argument("--scratch", type=Path, default=ROOT / "build" / "learning")
    parser.add_argument(
        "--output",
        type=Path,
        default=ROOT / "benchmarks" / "results" / "recipes" / "learning.json",
    )
    options = parser.parse_args()
    measured, changed = commit(ROOT), uncommitted(ROOT)
    folder = options.scratch / f"{measured[:12]}-{options.images or 'all'}"
    folder.mkdir(parents=True, exist_ok=True)
    # By seeds first: what was interrupted has all variants.
    wanted = [(name, seed) for seed in range(options.seeds) for name in VARIANTS]
    with ThreadPoolExecutor(options.jobs) as pool:
        found = list(pool.map(lambda run: _run(folder, *run, images=options.images), wanted))
    (steps,) = {result["step"] for result in found}
    results: dict[str, Any] = {name: [] for name in VARIANTS}
    for (name, _), result in zip(wanted, found, strict=True):
        results[name].append(result)
    write_json(
        options.output,
        {
            "commit": measured,
            "uncommitted": changed,
            "versions": versions(),
            "steps": steps,
            "variants": results,
        },
    )


def recipe(name: str, images: int | None = None) -> dict[str, Any]:
    """The configuration of a variant.

    Args:
        name: one of `VARIANTS`.
        images: how many to train on; None: as many as the demo.
    """
    config = yaml.safe_load((RECIPES / "demo.yaml").read_text())
    if name == "ijepa":
        del config["text"]
        shared = ("encoder", "encoder_options", "img_size", "init")
        config["model"] = {
            key: value
            for key, value in config["model"].items()
            if key in shared or key.startswith("predictor")
        }
        config["model"] |= {"method": "ijepa", "loss": "l2_norm"}  # TC-JEPA's prediction loss
    for section, values in deepcopy(VARIANTS[name]).items():
        config[section] |= values
    if images is not None:
        config["data"]["train_length"] = images
    # A variant that learns nothing, or collapses, is a result.
    config["train"] |= {"require_learning": False, "collapse": {}}
    return config


def _run(scratch: Path, name: str, seed: int, images: int | None) -> dict[str, Any]:
    """Trains and probes one run, unless that has been done."""
    folder = scratch / f"{name}-{seed}"
    probes = folder / "eval.json"
    if not probes.exists():
        file = scratch / f"{name}-{seed}.yaml"
        file.write_text(yaml.safe_dump(recipe(name, images)))
        cli = (1, "-m", "jepa_fast.cli")
        run_python(*cli, "pretrain", file, f"seed={seed}", f"output={folder}", "--overwrite")
        run_python(*cli, "eval", folder)
        print(f"{name}, seed {seed}: done", flush=True)
    rows = read_rows(folder)
    last = rows[-1]["step"]
    found = json.loads(probes.read_text())
    return {
        "seed": seed,
        "step": found["step"],
        # I-JEPA's loss is nothing else.
        "prediction_loss": fmean(
            row.get("prediction_loss", row["loss"])
            for row in rows
            if row["step"] > (1 - _LAST) * last
        ),
        "target_rank": rows[-1]["target_rank"],
        "probes": {probe: values["trained"] for probe, values in found["probes"].items()},
    }


if __name__ == "__main__":
    main()
