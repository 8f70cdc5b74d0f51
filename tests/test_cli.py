from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from tiny_runs import write_recipe

import jepa_fast
from jepa_fast.cli import DONE, FAILED, WRONG, main
from jepa_fast.ops import _build
from jepa_fast.train.checkpoint import load_checkpoint
from jepa_fast.train.config import parse_config

Capture = pytest.CaptureFixture[str]


@pytest.fixture
def recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.chdir(tmp_path)
    return write_recipe(tmp_path / "tiny.yaml")


def test_a_dry_run_prints_a_configuration_that_can_be_run(recipe: str, capsys: Capture) -> None:
    assert main(["pretrain", recipe, "train.steps=3", "--dry-run"]) == DONE
    printed = capsys.readouterr().out
    assert parse_config(yaml.safe_load(printed)).train.steps == 3
    assert printed.endswith("M trained parameters\n")
    assert not Path("runs").exists()


def test_pretrain_then_eval(recipe: str, capsys: Capture, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO"):
        assert main(["pretrain", recipe, "train.steps=2"]) == DONE
    assert "runs/tiny: 2 steps, loss " in caplog.text
    assert " images/s" in caplog.text
    assert main(["eval", "runs/tiny", "--untrained-seeds", "2"]) == DONE
    header, *lines = capsys.readouterr().out.splitlines()
    assert header.split() == ["probe", "trained", "untrained,", "2", "seeds", "gain"]
    assert [line.split()[0] for line in lines] == ["knn", "linear", "patch"]
    results = json.loads(Path("runs/tiny/eval.json").read_text())
    assert results["step"] == 2
    assert results["images"] == {"known": 32, "asked": 24}
    assert all(len(probe["untrained"]) == 2 for probe in results["probes"].values())

    assert main(["eval", "runs/tiny/last.pt", "data.val_length=8", "--output", "mine.json"]) == DONE
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == [
        "knn",
        "linear",
        "patch",
    ]
    mine = json.loads(Path("mine.json").read_text())
    assert mine["images"]["asked"] == 8
    known = {name: probe["trained"] for name, probe in results["probes"].items()}
    assert mine["probes"].keys() == known.keys()


def test_a_report_follows_the_training(recipe: str, capsys: Capture) -> None:
    command = ["pretrain", recipe, "train.steps=2", "train.log_every=1", "model.method=tcjepa"]
    assert main([*command, "--report", "train.collapse.min_rank=1000"]) == FAILED
    printed = capsys.readouterr()
    assert "3 seeds" in printed.out
    assert "FAILED: collapsed: the effective rank of the targets is" in printed.err
    html = Path("runs/tiny/report.html").read_text()
    assert "collapsed: the effective rank" in html
    assert html.count("<img") >= 8


@pytest.mark.parametrize(
    ("command", "code", "message"),
    [
        ("pretrain nowhere", WRONG, "recipe: expected a .yaml file or one of"),
        ("pretrain RECIPE train.lr.peek=1", WRONG, "train.lr.peek: unknown key; nearest: train.lr"),
        ("pretrain RECIPE masks.min_context=64", WRONG, "masks: min_context: expected at most"),
        ("pretrain RECIPE model.predictor_heads=5", WRONG, "model: "),
        (
            "pretrain RECIPE --overwrite model.loss=l3",
            WRONG,
            "model.loss: expected 'smooth_l1', 'l1'",
        ),
        ("pretrain RECIPE --resume seed=x", WRONG, "seed: expected a valid integer"),
        ("pretrain RECIPE train.batch_size=64", WRONG, "train.batch_size: batch_size x world_size"),
        (
            "pretrain RECIPE data={kind: shards, train: nowhere-*.tar}",
            WRONG,
            "data.train: urls must match at least one shard",
        ),
        ("pretrain RECIPE --resume", FAILED, "no checkpoint at"),
        ("pretrain RECIPE model.method=tijepa model.encoder_weights=x.pt", WRONG, "which does not"),
        ("pretrain RECIPE model.method=tcjepa text.encoder=./t5", WRONG, "text.encoder: source:"),
        ("eval nowhere.pt", FAILED, "no checkpoint at nowhere.pt"),
        ("pretrain RECIPE output=tiny.yaml", FAILED, "File exists: 'tiny.yaml'"),
        (
            "pretrain RECIPE data={kind: folder, train: broken}",
            FAILED,
            "no readable sample in ImageFolder('broken'): 8 samples skipped: "
            "8 x image cannot be decoded (no known format)",
        ),
    ],
)
def test_what_goes_wrong_is_said_without_a_traceback(
    recipe: str, capsys: Capture, command: str, code: int, message: str
) -> None:
    Path("broken").mkdir()
    for number in range(8):
        Path("broken", f"{number}.jpg").write_bytes(b"no picture")
    first, *rest = command.replace("RECIPE", recipe).split(" ", 2)
    arguments = [first, *rest]
    if "{" not in command:
        arguments = command.replace("RECIPE", recipe).split()
    assert main(arguments) == code
    printed = capsys.readouterr()
    assert message in printed.err
    assert "Traceback" not in printed.err


def test_an_unknown_command_is_refused(capsys: Capture) -> None:
    for command in (
        ["pretrian"],
        ["info", "more"],
        ["pretrain", "demo", "--overwrit", "seed=3", "--dry-run"],
        ["pretrain", "demo", "--overwrite", "--resume"],
    ):
        with pytest.raises(SystemExit) as stopped:
            main(command)
        assert stopped.value.code == WRONG


def test_info_lists_every_operator(capsys: Capture) -> None:
    assert main(["info"]) == DONE
    printed = capsys.readouterr().out
    assert f"jepa_fast  {jepa_fast.__version__}" in printed
    assert "native library: " in printed
    from jepa_fast.ops._registry import OPERATORS

    lines = {line.split()[0]: line for line in printed.splitlines() if line}
    assert OPERATORS.keys() <= lines.keys()
    assert lines["gather_patches"].endswith("yes")


def test_info_needs_torch_alone(monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    for name in ("pydantic", "yaml", "tqdm", "tensorboard", "triton", "PIL", "sklearn"):
        monkeypatch.setitem(sys.modules, name, None)
    for name in ("jepa_fast.info", "jepa_fast.train.config"):  # to be imported anew
        monkeypatch.delitem(sys.modules, name, raising=False)
    assert main(["info"]) == DONE
    assert "triton: " in capsys.readouterr().out
    assert main(["pretrain", "demo"]) == FAILED
    error = capsys.readouterr().err
    assert error.startswith("jepa-fast: the configuration of a run needs ")
    assert error.endswith('pip install "jepa-fast[train]"\n')


def test_build_says_what_it_built_and_what_not(
    monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    record = _build.Record(parts=["cpu"], why_not={"cuda": "no CUDA compiler"})
    monkeypatch.setattr(_build, "build", lambda: record)
    assert main(["build"]) == DONE
    printed = capsys.readouterr()
    assert printed.out == "built the cpu kernels\n"
    assert printed.err == "no cuda kernels: no CUDA compiler\n"

    def fails() -> _build.Record:
        raise _build.BuildError("no C++ compiler")

    monkeypatch.setattr(_build, "build", fails)
    assert main(["build"]) == FAILED
    assert capsys.readouterr().err == "jepa-fast: no C++ compiler\n"


def test_sigterm_saves_and_the_run_goes_on(recipe: str, tmp_path: Path) -> None:
    """The one test of a whole process: told to stop by SIGTERM, it saves and ends with 143."""
    root = Path(__file__).parent.parent
    command = [sys.executable, "-m", "jepa_fast.cli", "pretrain", recipe, "train.steps=100000"]
    environment = {**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
    errors = tmp_path / "errors.txt"
    with errors.open("w") as stderr:
        process = subprocess.Popen(command, env=environment, stderr=stderr)
        metrics = tmp_path / "runs/tiny/metrics.jsonl"
        deadline = time.monotonic() + 120
        while not (metrics.exists() and metrics.read_text()) and time.monotonic() < deadline:
            assert process.poll() is None, errors.read_text()
            time.sleep(0.05)
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=60) == 143
    assert "stopped by SIGTERM, saved runs/tiny/last.pt; go on with --resume" in errors.read_text()
    step = load_checkpoint("runs/tiny")["step"]
    assert step > 0
    assert main(["pretrain", recipe, f"train.steps={step + 2}", "--resume"]) == DONE
    assert load_checkpoint("runs/tiny")["step"] == step + 2
