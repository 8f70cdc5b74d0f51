"""How time and memory of text attention grow with captions, words and tokens.

`python benchmarks/growth.py` doubles one size at a time, from an eighth of a TC-JEPA layer's, for
`text_cross_attention` and for its plain PyTorch, forward and backward, all sizes in turns. It
writes benchmarks/results/growth.json, from which the README has its table. Run it on an idle
machine; it takes some 10 seconds on 2 cores.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from processes import ROOT

if str(ROOT) not in sys.path:  # started as a script, in a checkout that is not installed
    sys.path.append(str(ROOT))

import torch
from cases import CAPTIONS
from plain import PLAIN, run, values
from turns import median_seconds

from jepa_fast import ops
from jepa_fast.perf.files import write_json
from jepa_fast.perf.machine import commit, describe, uncommitted, versions
from jepa_fast.perf.memory import peak_allocation

WHOLE = {**CAPTIONS, "B": 1}
GROWS = {"captions": "C", "words a caption": "S", "tokens a block": "T"}
DOUBLINGS = 3
PROVIDERS = {"ours": ops.text_cross_attention, "eager": PLAIN["text_cross_attention"]}


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument(
        "--output", type=Path, default=ROOT / "benchmarks" / "results" / "growth.json"
    )
    options = parser.parse_args()
    results = {
        "machine": describe(options.device)["name"],
        "commit": commit(ROOT),
        "uncommitted": uncommitted(ROOT),
        "versions": versions(),
        "shape": WHOLE,
        "grows": {
            told: measure(sizes_of(key), options.rounds, options.device)
            for told, key in GROWS.items()
        },
    }
    write_json(options.output, results)


def sizes_of(key: str) -> dict[int, dict[str, int]]:
    """Shapes by the value of the size that grows, up to the whole layer's."""
    found = [-(-WHOLE[key] >> step) for step in range(DOUBLINGS, -1, -1)]
    return {size: {**WHOLE, key: size} for size in found}


def measure(
    shapes: Mapping[int, Mapping[str, int]], rounds: int, device: str
) -> dict[str, dict[str, Any]]:
    """Median seconds and peak bytes, beyond the inputs, of every provider at every size."""
    calls = {
        (name, size): _call(function, shape, device)
        for size, shape in shapes.items()
        for name, function in PROVIDERS.items()
    }
    seconds = median_seconds(calls, rounds, device)
    return {
        name: {
            str(size): {
                "seconds": seconds[name, size],
                "bytes": peak_allocation(calls[name, size], device),
            }
            for size in shapes
        }
        for name in PROVIDERS
    }


def _call(
    function: Callable[..., Any], shape: Mapping[str, int], device: str
) -> Callable[[], object]:
    """Forward and backward of one layer, all words there."""
    dtype = "bfloat16" if device == "cuda" else "float32"
    tokens = (shape["M"] * shape["B"], shape["T"], shape["d"])
    words = (shape["B"], shape["C"], shape["S"], shape["d"])
    q = values(*tokens, dtype=dtype, device=device, grad=True)
    k, v = (values(*words, dtype=dtype, device=device, seed=i, grad=True) for i in (1, 2))
    residual = values(*tokens, device=device, seed=3, grad=True)
    grads = [values(*tokens, device=device, seed=4), torch.ones((), device=device)]
    return lambda: run(function, (q, k, v, residual), grads)


if __name__ == "__main__":
    main()
