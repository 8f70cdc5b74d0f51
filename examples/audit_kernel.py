"""Audits a Triton kernel on a machine without a GPU: `python examples/audit_kernel.py`.

With a file's name, `python examples/audit_kernel.py baseline.json`, it also compares with the
report in that file and fails if something got worse; it writes the file where there is none.
"""

import json
import sys
from pathlib import Path

import torch
import triton
import triton.language as tl

from jepa_fast.perf import Cost, Launch, audit


@triton.jit
def scaled_sum(x, y, out, n, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = i < n
    total = 2.0 * tl.load(x + i, mask=inside) + tl.load(y + i, mask=inside)
    tl.store(out + i, total, mask=inside)


def main() -> int:
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
    if len(sys.argv) < 2:
        return 0
    baseline = Path(sys.argv[1])
    if not baseline.exists():
        baseline.write_text(json.dumps(report.to_json(), indent=2))
    findings = report.compare(baseline)
    for finding in findings:
        print(finding)
    return 1 if findings else 0


if __name__ == "__main__":
    sys.exit(main())
