"""Audits a Triton kernel on a machine without a GPU: `python examples/audit_kernel.py`.

`python examples/audit_kernel.py --write baseline.json` writes what it found, to be committed, and
`python examples/audit_kernel.py baseline.json` compares with that. Exit codes are those of
`jepa-fast audit`: 1 something got worse, 3 there is no such file, 4 it was made with another
Triton, 6 the kernel cannot be compiled, 7 the file cannot be written.
"""

import argparse
import json
import sys
from pathlib import Path

import torch
import triton
import triton.language as tl

from jepa_fast.perf import Cost, Launch, PerfError, audit


@triton.jit
def scaled_sum(x, y, out, n, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = i < n
    total = 2.0 * tl.load(x + i, mask=inside) + tl.load(y + i, mask=inside)
    tl.store(out + i, total, mask=inside)


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("baseline", nargs="?", type=Path)
    parser.add_argument("--write", action="store_true")
    options = parser.parse_args()
    if options.write and options.baseline is None:
        parser.error("--write needs the file to write")
    n = 5000
    report = audit(
        scaled_sum,
        signature={"x": "*fp32:16", "y": "*fp32:16", "out": "*fp32:16", "n": "i32:16"},
        configs=[{"BLOCK": 1024, "num_warps": 4}],
        targets=["sm_80", "sm_90", "sm_100"],
        launch=Launch(
            grid=lambda config: (triton.cdiv(n, config["BLOCK"]),),
            arguments={"x": torch.ones(n), "y": torch.ones(n), "out": torch.empty(n), "n": n},
            minimum=Cost(read=8 * n, written=4 * n),
        ),
    )
    print(report)
    if options.baseline is None:
        return 0
    if options.write:
        options.baseline.write_text(json.dumps(report.to_json(), indent=2) + "\n")
        return 0
    findings = report.compare(options.baseline)
    for finding in findings:
        print(finding)
    return 1 if findings else 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except PerfError as error:
        print(error, file=sys.stderr)
        sys.exit(error.exit_code)
    except OSError as error:
        print(error, file=sys.stderr)
        sys.exit(7)
