"""The README's tables are those of the committed results."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks import tables
from jepa_fast.perf.audit_report import CallTraffic, CompiledKernel, Moved, Report
from jepa_fast.perf.machine_code import Instructions

ROOT = Path(__file__).resolve().parents[1]


class Copy:
    """README and results in a folder of their own, to be changed."""

    def __init__(self, folder: Path) -> None:
        self.readme = folder / "README.md"
        self.results = folder / "results"
        shutil.copy(ROOT / "README.md", self.readme)
        shutil.copytree(ROOT / "benchmarks/results", self.results)

    def run(self, *options: str) -> int:
        places = ["--readme", str(self.readme), "--results", str(self.results)]
        return tables.main([*options, *places])

    def write(self, name: str, value: Any) -> None:
        path = self.results / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(value))

    def show(self, marker: str) -> str:
        """The table that a README with this one marker gets."""
        self.readme.write_text(f"<!-- table: {marker} -->\nold\n<!-- end of table -->\n")
        assert self.run() == 0
        return self.readme.read_text()


@pytest.fixture
def copy(tmp_path: Path) -> Copy:
    return Copy(tmp_path)


@pytest.fixture
def invented(tmp_path: Path) -> Copy:
    """For results that a test writes: none of the committed ones are there."""
    made = Copy(tmp_path)
    shutil.rmtree(made.results)
    return made


def test_the_readme_is_what_the_results_say(capsys: pytest.CaptureFixture[str]) -> None:
    assert tables.main(["--check"]) == 0, capsys.readouterr().out
    markers = (ROOT / "README.md").read_text().count("<!-- table:")
    assert markers >= 3


def test_it_runs_as_a_script_without_torch(copy: Copy) -> None:
    program = (
        "import runpy, sys; sys.modules['torch'] = None; "
        f"sys.argv = ['tables.py', '--check', '--readme', {str(copy.readme)!r}]; "
        f"runpy.run_path({str(ROOT / 'benchmarks/tables.py')!r}, run_name='__main__')"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, cwd=copy.results
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_another_result_is_a_difference_until_written(
    copy: Copy, capsys: pytest.CaptureFixture[str]
) -> None:
    assert copy.run("--check") == 0
    before = copy.readme.read_text()
    path = copy.results / "recipes/cifar10_ijepa.json"
    result = json.loads(path.read_text())
    result["probes"]["knn"]["trained"] = 0.381
    path.write_text(json.dumps(result))
    assert copy.run("--check") == 1
    shown = capsys.readouterr()
    assert "-| `cifar10_ijepa` | 25 | 31.1 % (29.9 to 32.8) | 37.1 % " in shown.out
    assert "+| `cifar10_ijepa` | 25 | 31.1 % (29.9 to 32.8) | 38.1 % " in shown.out
    assert "run `make tables`" in shown.err
    assert copy.readme.read_text() == before
    assert copy.run() == 0
    after = copy.readme.read_text()
    changed = [
        (old, new)
        for old, new in zip(before.splitlines(), after.splitlines(), strict=True)
        if old != new
    ]
    assert len(changed) == 2  # cifar10, and beside the public code
    assert all(new == old.replace("37.1 %", "38.1 %") for old, new in changed)
    assert copy.run("--check") == 0


def test_an_edited_table_is_a_difference(copy: Copy) -> None:
    text = copy.readme.read_text()
    assert text.count("| 276 |") == 2
    copy.readme.write_text(text.replace("| 276 |", "| 277 |", 1))
    assert copy.run("--check") == 1


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("<!-- table: none -->\n<!-- end of table -->\n", "line 1: table 'none': there is no such"),
        ("<!-- table: -->\n<!-- end of table -->\n", "line 1: table '': there is no such table"),
        ("a\n<!-- table: demo -->\nb\n", "line 2: the table 'demo' has no <!-- end of table -->"),
        (
            "<!-- table: demo -->\n<!-- table: cifar10 -->\n<!-- end of table -->\n",
            "line 1: the table 'demo' has no <!-- end of table -->",
        ),
        ("a\n<!-- end of table -->\n", "line 2: <!-- end of table --> without"),
        ("<!-- table: demo fast -->\n<!-- end of table -->\n", "table 'demo fast'"),
        ("<!-- table: power -->\n<!-- end of table -->\n", r"power.json: commit it, or take"),
        ("<!-- table: operators ../x -->\n<!-- end of table -->\n", "not a machine's name"),
        ("<!-- table: operators -->\n<!-- end of table -->\n", "machine"),
    ],
)
def test_bad_markers_are_errors_and_nothing_is_written(
    text: str, message: str, copy: Copy, capsys: pytest.CaptureFixture[str]
) -> None:
    (copy.results / "power.json").unlink(missing_ok=True)
    copy.readme.write_text(text)
    for options in ((), ("--check",)):
        assert copy.run(*options) == 2
        assert message in capsys.readouterr().err
    assert copy.readme.read_text() == text


@pytest.mark.parametrize(
    ("content", "message"),
    [("{", "is not JSON"), ("{}", "KeyError: 'probes'"), ("[]", "TypeError")],
)
def test_bad_results_are_errors(
    content: str, message: str, copy: Copy, capsys: pytest.CaptureFixture[str]
) -> None:
    (copy.results / "recipes/demo.json").write_text(content)
    before = copy.readme.read_text()
    assert copy.run() == 2
    error = capsys.readouterr().err
    assert message in error
    assert "demo" in error
    assert copy.readme.read_text() == before


def test_a_missing_readme_is_an_error(copy: Copy, capsys: pytest.CaptureFixture[str]) -> None:
    copy.readme.unlink()
    assert copy.run() == 2
    assert "README.md" in capsys.readouterr().err
    assert not copy.readme.exists()


@pytest.mark.parametrize(
    ("successes", "trials", "low", "high"),
    # By scipy.stats.binomtest(...).proportion_ci(method="wilson").
    [(39, 40, 0.8711863, 0.9955732), (0, 100, 0.0, 0.0369935), (5, 10, 0.2365931, 0.7634069)],
)
def test_wilson(successes: int, trials: int, low: float, high: float) -> None:
    assert tables.wilson(successes, trials) == pytest.approx((low, high), abs=1e-6)
    mirrored = tables.wilson(trials - successes, trials)
    assert mirrored == pytest.approx((1 - high, 1 - low), abs=1e-6)


def test_wilson_refuses_what_is_no_share() -> None:
    for successes, trials in ((1, 0), (3, 2), (-1, 2)):
        with pytest.raises(ValueError, match="expected"):
            tables.wilson(successes, trials)


def test_power(invented: Copy) -> None:
    rows = [
        {
            "slowdown": 0.1,
            "trials": 40,
            "detected": 39,
            "median_estimate": 0.0951,
            "median_seconds": 21.4,
        },
        {
            "slowdown": 0.0,
            "trials": 100,
            "detected": 0,
            "median_estimate": -0.0012,
            "median_seconds": 33.0,
        },
    ]
    invented.write("power.json", {"machine": {}, "tolerance": 0.05, "rows": rows})
    assert invented.show("power").splitlines() == [
        "<!-- table: power -->",
        "",
        "| slow-down | noticed | 95 % interval | measured, median | a comparison takes |",
        "|---|---|---|---|---|",
        "| 10 % | 39 of 40 | 87.1 to 99.6 % | +9.5 % | 21 s |",
        "| none | 0 of 100 | 0.0 to 3.7 % | -0.1 % | 33 s |",
        "",
        "<!-- end of table -->",
    ]


def test_learning(invented: Copy) -> None:
    def run(loss: float, patch: float) -> dict[str, Any]:
        return {"prediction_loss": loss, "probes": {"patch": patch, "linear": 0.5, "knn": 0.25}}

    variants = {name: [run(3.0, 0.5)] for name in tables._LEARNING}
    variants["tcjepa"] = [run(4.0, 0.7), run(5.0, 0.8), run(4.2, 0.75)]
    invented.write("recipes/learning.json", {"variants": variants})
    _, _, head, _, ijepa, tcjepa, *_ = invented.show("learning").splitlines()
    assert head.split(" | ")[1:3] == ["prediction loss", "digit behind a patch, linear"]
    assert ijepa == (
        "| I-JEPA | 3.00 (3.00 to 3.00) | 50.0 % (50.0 to 50.0) | 50.0 % (50.0 to 50.0) | "
        "25.0 % (25.0 to 25.0) |"
    )
    assert tcjepa.startswith("| TC-JEPA | 4.40 (4.00 to 5.00) | 75.0 % (70.0 to 80.0) | 50.0 %")


def _packing_results(**more: Any) -> dict[str, Any]:
    ratios = {"ours": None, "padded": 0.8, "padded_static": 1.25, "packed_to_fit": 0.625}
    numbers = {
        "context_tokens_used": 87.84,
        "context_tokens_computed": 114.0,
        "encoder_flops": 4.5184e9,
        "predictor_flops": 11.331e9,
        "step_flops": 18.339e9,
    }
    names = [*ratios, "truncated"]
    record = _record(
        "packing_step",
        "cpu",
        case="tiny",
        providers={name: _provider(1.0, ratios.get(name, 0.5), 1) for name in names},
        numbers={name: {**numbers, "context_tokens_used": 60.0 + len(name)} for name in names},
        **more,
    )
    return _results(record, _record("ema_update_", "cpu"), _record("ijepa_step", "cpu"))


def test_packing(invented: Copy) -> None:
    invented.write("chip.json", _packing_results())
    head = "contexts | context tokens an image, used | computed | context encoder, GFLOP an image"
    assert invented.show("packing chip tiny").splitlines()[2:-2] == [
        f"| {head} | predictor | step | images/s, of the first row's |",
        "|---|---|---|---|---|---|---|",
        "| cut to the shortest of the batch | 69.0 | 114.0 | 4.52 | 11.33 | 18.34 | 1.00x |",
        "| padded to the longest of the batch | 66.0 | 114.0 | 4.52 | 11.33 | 18.34 | 0.62x |",
        "| padded to the longest there can be | 73.0 | 114.0 | 4.52 | 11.33 | 18.34 | 0.40x |",
        "| packed, a row as long as it takes | 73.0 | 114.0 | 4.52 | 11.33 | 18.34 | 0.80x |",
        "| packed, a row of fixed length | 64.0 | 114.0 | 4.52 | 11.33 | 18.34 | 0.50x |",
    ]
    for other in ("operators chip", "steps chip"):
        assert "packing_step" not in invented.show(other)


@pytest.mark.parametrize(
    ("marker", "more", "message"),
    [
        ("packing chip huge", {}, "the result has no packing_step huge"),
        ("packing chip", {}, "the result has no packing_step"),
        ("packing chip tiny", {"rounds": 29}, "is of 29 rounds"),
    ],
)
def test_packing_that_is_not_there(
    invented: Copy,
    capsys: pytest.CaptureFixture[str],
    marker: str,
    more: dict[str, Any],
    message: str,
) -> None:
    invented.write("chip.json", _packing_results(**more))
    invented.readme.write_text(f"<!-- table: {marker} -->\n<!-- end of table -->\n")
    assert invented.run() == 2
    assert message in capsys.readouterr().err


def _kernel(name: str, chip: str, **more: Any) -> CompiledKernel:
    values: dict[str, Any] = {
        "kernel": "f",
        "compiler": "triton",
        "config": {"BLOCK": 1024},
        "threads": 128,
        "registers": 32,
        "stack": 0,
        "local": 0,
        "shared": 2048,
        "occupancy": 0.75,
        "instructions": Instructions(loads={4: 1, 16: 8}, stores={16: 4}),
    }
    return CompiledKernel(name=name, chip=chip, **{**values, **more})


def _audit_report() -> Report:
    spilled = Instructions(local_loads=3, local_stores=2, tma={"UTMALDG": 2, "UTMASTG": 1})
    return Report(
        versions={"triton": "3.10.0"},
        kernels=[
            _kernel("ema-plain", "sm_80"),
            _kernel("ema-plain", "sm_90", stack=16, occupancy=None, instructions=spilled),
        ],
        traffic=[
            CallTraffic("ema", {"f": Moved(2, 1000, 500, 300, 300)}, {"aten::add": 1}, 500, 300),
            CallTraffic("other", {"f": Moved(1, 1000, 1000, 8, 8)}, {}, None, 0),
        ],
    )


def test_audit_takes_the_newest_and_shows_kernels(invented: Copy) -> None:
    report = _audit_report()
    invented.write("audit/triton-3.10.json", report.to_json())
    invented.write("audit/triton-3.9.json", {**report.to_json(), "kernels": []})
    shown = invented.show("audit").splitlines()[2:-2]
    head = "kernel | chip | registers | shared memory | occupancy | spills | loads | stores"
    assert shown == [
        f"| {head} |",
        "|---|---|---|---|---|---|---|---|",
        "| `ema-plain` | sm_80 | 32 | 2,048 B | 75 % | none | 16 B x 8, 4 B x 1 | 16 B x 4 |",
        "| `ema-plain` | sm_90 | 32 | 2,048 B | ? | 5 (16 B) | UTMALDG x 2 | UTMASTG x 1 |",
    ]
    assert invented.show("audit sm_90 3.10").splitlines()[2:-2] == [*shown[:2], shown[3]]
    assert invented.show("audit sm_80 sm_90 triton").splitlines()[2:-2] == shown
    assert invented.show("audit 3.9").splitlines()[2:-2] == shown[:2]


def test_traffic_is_shown_against_the_least(invented: Copy) -> None:
    invented.write("audit/triton-3.10.json", _audit_report().to_json())
    assert invented.show("traffic").splitlines()[4:-2] == [
        "| `ema` | 2 | 1 | 500 B | 2.00x | 1.00x | 300 B | 1.00x | 1.00x |",
        "| `other` | 1 | 0 | ? | 1,000 B | 1,000 B | 0 B | 8 B | 8 B |",
    ]


def test_audits_without_what_is_asked_for(
    invented: Copy, capsys: pytest.CaptureFixture[str]
) -> None:
    empty = Report(versions={}, kernels=None, traffic=None)
    invented.write("audit/triton-3.10.json", empty.to_json())
    invented.write("audit/triton-3.9.json", _audit_report().to_json())
    for marker, message in (
        ("audit", "left the compiled kernels out"),
        ("traffic", "left the traffic out"),
        ("audit 3.8", "triton-3.8.json: commit it"),
        ("audit 3.9 sm_100 triton", "nothing in the audit is called sm_100"),
    ):
        invented.readme.write_text(f"<!-- table: {marker} -->\n<!-- end of table -->\n")
        assert invented.run() == 2
        assert message in capsys.readouterr().err


def _provider(milliseconds: float, ratio: float | None, peak: int) -> dict[str, Any]:
    return {"milliseconds": milliseconds, "spread": 0.02, "peak_bytes": peak, "ratio": ratio}


def _record(operator: str, device: str, **more: Any) -> dict[str, Any]:
    record: dict[str, Any] = {
        "operator": operator,
        "case": "vit_b",
        "device": device,
        "providers": {
            "ours": _provider(0.1234, 1.0, 50),
            "eager": _provider(0.5, 4.05, 200),
            "compile": _provider(0.25, 2.0, 100),
            "foreach_lerp": _provider(0.15, 1.25, 50),
        },
        "variants": [],
        "rounds": 30,
        "quick": False,
        "run": "one",
        "headline": {"against": "foreach_lerp", "ratio": 1.25},
        "share_of_ceiling": 0.78,
        "bound": "memory",
    }
    return {**record, **more}


def _results(*records: dict[str, Any], dirty: bool = False) -> dict[str, Any]:
    return {"runs": [{"id": "one", "dirty": dirty}], "records": list(records)}


def test_a_gpu_has_times_and_shares_a_cpu_has_ratios(invented: Copy) -> None:
    heads = (
        "| case | over eager | over `torch.compile` | over libraries | over the best "
        "| peak memory, of eager's |"
    )
    cells = (
        "| `ema_update_` vit_b | 4.05x | 2.00x | foreach_lerp 1.25x "
        "| **1.25x** (foreach_lerp) | 0.25x |"
    )
    for device, more_heads, more in (
        ("cpu", "", ""),
        ("cuda", " ms | of the ceiling |", " 0.123 | 78 % (memory) |"),
    ):
        records = [_record("ema_update_", device), _record("ijepa_step", device)]
        invented.write("chip-1.json", _results(*records))
        shown = invented.show("operators chip-1").splitlines()
        assert shown[2] == heads + more_heads
        assert shown[4:-2] == [cells + more]
        assert invented.show("steps chip-1").splitlines()[4:-2] == [
            (cells + more).replace("ema_update_", "ijepa_step")
        ]


def test_what_was_not_raced_is_a_dash(invented: Copy) -> None:
    record = _record(
        "mixture_nll",
        "cuda",
        providers={"ours": _provider(1.0, 1.0, 0), "eager": _provider(2.0, 2.0, 0)},
        share_of_ceiling=None,
    )
    invented.write("chip.json", _results(record))
    row = invented.show("operators chip").splitlines()[4]
    assert row.startswith("| `mixture_nll` vit_b | 2.00x | - | - | **1.25x** (foreach_lerp) | - |")
    assert row.endswith(" 1 | - |")


def test_variants_of_ours_are_no_libraries(invented: Copy) -> None:
    providers = {name: _provider(1.0, ratio, 10) for name, ratio in (("ours", 1.0), ("fast", 0.5))}
    record = _record("ijepa_step", "cpu", providers=providers, variants=["fast"], headline=None)
    invented.write("chip.json", _results(record, _record("ijepa_step", "cpu")))
    _, _, heads, _, one, other, *_ = invented.show("steps chip").splitlines()
    assert "| over the best | variants of ours | peak memory" in heads
    assert one == "| `ijepa_step` vit_b | - | - | - | - | fast 0.50x | - |"
    assert "| **1.25x** (foreach_lerp) | - | 0.25x |" in other


@pytest.mark.parametrize(
    ("more", "dirty", "message"),
    [
        ({"quick": True, "rounds": 30}, False, "ema_update_ vit_b is of 30 rounds, in a quick run"),
        ({"rounds": 3}, False, "ema_update_ vit_b is of 3 rounds"),
        ({}, True, "ema_update_ vit_b is of uncommitted changes"),
    ],
)
def test_what_is_not_by_the_protocol_is_not_shown(
    invented: Copy,
    capsys: pytest.CaptureFixture[str],
    more: dict[str, Any],
    dirty: bool,
    message: str,
) -> None:
    invented.write("chip.json", _results(_record("ema_update_", "cpu", **more), dirty=dirty))
    invented.readme.write_text("<!-- table: operators chip -->\n<!-- end of table -->\n")
    assert invented.run() == 2
    assert message in capsys.readouterr().err


def test_a_machine_without_such_records(invented: Copy, capsys: pytest.CaptureFixture[str]) -> None:
    invented.write("chip.json", _results(_record("ema_update_", "cpu")))
    invented.readme.write_text("<!-- table: steps chip -->\n<!-- end of table -->\n")
    assert invented.run() == 2
    assert "the result has no step" in capsys.readouterr().err
