from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from PIL import Image
from tiny_runs import tiny, write_recipe

import jepa_fast
from jepa_fast.cli import DONE, FAILED, WRONG, main
from jepa_fast.ops import _build, _machine
from jepa_fast.train.checkpoint import load_checkpoint
from jepa_fast.train.config import parse_config, recipe_names
from jepa_fast.train.run import pretrain

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


@pytest.mark.parametrize(
    ("overrides", "told"),
    [
        (["train.steps=null", "train.epochs=2"], True),
        (["train.steps=null", "train.epochs=41"], False),
        (["train.steps=null", "train.epochs=2", "train.lr.warmup_epochs=null"], False),
        ([], False),  # 20 steps may be any number of epochs
    ],
)
def test_a_dry_run_tells_of_a_warm_up_as_long_as_the_run(
    recipe: str, capsys: Capture, overrides: list[str], told: bool
) -> None:
    command = ["pretrain", recipe, "train.lr.warmup_epochs=40", *overrides, "--dry-run"]
    assert main(command) == DONE
    printed = capsys.readouterr()
    warning = "train.lr.warmup_epochs: expected less than the run's epochs, 2, got 40"
    assert (warning in printed.err) is told
    assert "expected" not in printed.out


def test_help_lists_the_packaged_recipes(capsys: Capture) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["pretrain", "--help"])
    assert stopped.value.code == DONE
    listed = capsys.readouterr().out.partition("packaged recipes:")[2]
    assert listed.replace(",", "").split() == recipe_names()


@pytest.mark.parametrize(("command", "needed"), [("pretrain", "recipe"), ("eval", "checkpoint")])
def test_overrides_are_optional(capsys: Capture, command: str, needed: str) -> None:
    with pytest.raises(SystemExit) as stopped:
        main([command])
    assert stopped.value.code == WRONG
    assert capsys.readouterr().err.endswith(f"arguments are required: {needed}\n")


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


def test_eval_runs_in_the_first_of_several_processes(
    recipe: str, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    pretrain(tiny(Path("runs"), "train.steps=1"))
    monkeypatch.setenv("RANK", "1")
    assert main(["eval", "runs"]) == DONE
    assert capsys.readouterr().out == ""
    assert not Path("runs/eval.json").exists()
    monkeypatch.setenv("RANK", "0")
    assert main(["eval", "runs"]) == DONE
    assert capsys.readouterr().out.startswith("knn ")
    assert Path("runs/eval.json").exists()


def test_eval_says_what_it_probed_and_warns_of_probes_that_say_nothing(
    recipe: str, caplog: pytest.LogCaptureFixture
) -> None:
    pretrain(tiny(Path("runs"), "train.steps=1"))
    with caplog.at_level("INFO"):
        assert main(["eval", "runs", "eval.k=32", "--output", "x.json"]) == DONE
    told = "32 images to learn from, 24 to test on, classes: 10; results in x.json"
    assert told in caplog.text
    assert "eval.k" not in caplog.text
    assert "at least 2 classes" not in caplog.text
    for number in range(3):
        Path("images/a").mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (32, 32), (9 * number, 0, 0)).save(f"images/a/{number}.png")
    caplog.clear()
    data = "data={kind: folder, train: images, val: images}"
    with caplog.at_level("INFO"):
        assert main(["eval", "runs", data, "eval.k=4", "--report"]) == DONE
    assert "data: expected images of at least 2 classes, got one" in caplog.text
    assert "eval.k: expected at most the 3 labelled images" in caplog.text
    assert "classes: 1; results in runs/eval.json and runs/report.html" in caplog.text


def test_an_evaluation_that_fails_says_why_and_what_it_found(
    recipe: str, capsys: Capture, caplog: pytest.LogCaptureFixture
) -> None:
    pretrain(tiny(Path("runs"), "train.steps=1"))
    data = "data={kind: folder, train: images, val: images}"
    Path("images/a").mkdir(parents=True)
    for name in ("images/0.png", "images/a/1.png"):
        Image.new("RGB", (32, 32)).save(name)
    assert main(["eval", "runs", data]) == WRONG
    told = "runs cannot be probed: features must be at least 2 labelled ones, got 1"
    assert told in capsys.readouterr().err
    Image.new("RGB", (32, 32)).save("images/a/2.png")
    assert main(["eval", "runs", data, "--output", "/dev/full"]) == FAILED
    assert "No space left on device: '/dev/full'" in capsys.readouterr().err
    assert caplog.text.count("100.00%") == 2


def test_a_report_without_images_to_be_tested_on_is_refused_before_the_training(
    recipe: str, capsys: Capture
) -> None:
    Path("images").mkdir()
    data = "data={kind: folder, train: images}"
    assert main(["pretrain", recipe, data, "--report"]) == WRONG
    assert "data.val: expected images that --report tests the encoder on" in capsys.readouterr().err


@pytest.mark.parametrize("missing", ["jinja2", "matplotlib.figure"])
def test_a_report_that_cannot_be_made_is_no_surprise_after_the_training(
    recipe: str, missing: str, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    monkeypatch.setitem(sys.modules, missing, None)
    assert main(["pretrain", recipe, "--report"]) == FAILED
    assert "The report needs" in capsys.readouterr().err
    assert not Path("runs").exists()


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
        ("pretrain nowhere", WRONG, "recipe: expected a .yaml file or a packaged recipe, got"),
        ("pretrain cifar10_ijpea", WRONG, "got 'cifar10_ijpea'; nearest: cifar10_ijepa; packaged"),
        ("pretrain RECIPE train.lr.peek=1", WRONG, "train.lr.peek: unknown key; nearest: train.lr"),
        ("pretrain RECIPE masks.min_context=64", WRONG, "masks: min_context: expected at most"),
        ("pretrain RECIPE model.predictor_heads=5", WRONG, "model: "),
        (
            "pretrain RECIPE --overwrite model.loss=l3",
            WRONG,
            "model.loss: expected 'smooth_l1', 'l1'",
        ),
        ("pretrain RECIPE --resume seed=x", WRONG, "seed: expected a valid integer"),
        ("pretrain RECIPE train.batch_size=64", WRONG, "train.batch_size: expected at most the 48"),
        (
            "pretrain RECIPE data={kind: shards, train: nowhere-*.tar}",
            WRONG,
            "data.train: urls must match at least one shard",
        ),
        ("pretrain RECIPE model.predictor_dim=-5", WRONG, "model: predictor_dim: expected a pos"),
        ("pretrain RECIPE model.predictor_depth=0", WRONG, "model: predictor_depth: expected at l"),
        ("pretrain RECIPE model.predictor_depth=-1", WRONG, "expected at least one block, got -1"),
        ("pretrain RECIPE model.method=tijepa model.depth=0", WRONG, "depth: expected at least 1"),
        ("pretrain RECIPE model.method=tijepa model.width=-8", WRONG, "width: expected at least"),
        (
            "pretrain RECIPE model.method=tijepa model.objective=cross_modal model.predictor_dim=0",
            WRONG,
            "model: predictor_dim: expected at least 1, got 0",
        ),
        ("pretrain RECIPE data.noise=-3", WRONG, "data.train: noise must be in [0, 1], got -3.0"),
        ("pretrain RECIPE data.background=[5,-1]", WRONG, "background must be a range (low, high)"),
        ("pretrain RECIPE data.patch=3", WRONG, "data.train: patch must divide cell=8"),
        ("pretrain RECIPE seed=99999999999999999999999", WRONG, "seed: expected less than 9"),
        ("pretrain RECIPE device=cpu:foo", WRONG, "device: expected auto, cpu, cuda or cuda:<num"),
        ("pretrain RECIPE --resume", FAILED, "no checkpoint at"),
        ("pretrain RECIPE model.method=tijepa model.encoder_weights=x.pt", WRONG, "which does not"),
        ("pretrain RECIPE model.method=tcjepa text.encoder=./t5", WRONG, "text.encoder: source:"),
        ("eval nowhere.pt", FAILED, "no checkpoint at nowhere.pt"),
        ("pretrain RECIPE output=tiny.yaml", WRONG, "output: expected a folder that can be writt"),
        ("pretrain RECIPE output=/proc/x/y", WRONG, "that can be written to, got /proc/x/y ("),
        (
            "pretrain RECIPE data={kind: folder, train: broken}",
            WRONG,
            "data.train: no readable sample in ImageFolder('broken'): 8 samples skipped: "
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


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--untrained-seeds", "-1"], "untrained_seeds: expected 0 or more, got -1"),
        (["data.probe_length=1"], "data: expected at least 2 images for probes to learn from, got"),
        (["data.patch=8"], "data.patch: expected one label for each of the encoder's (8, 8) patch"),
        (["data.augment.centre=0.5"], "data.augment.centre: expected 1 where patches have labels"),
        (["device=cpu:foo"], "device: expected auto, cpu, cuda or cuda:<number>, got 'cpu:foo'"),
        (["--output", "nowhere/x.json"], "output: expected a file in a folder that exists, got n"),
        (["--output", "runs"], "output: expected a file in a folder that exists, got runs"),
        (["--output", "/proc/x.json"], "output: expected a file that can be written, got /proc/x."),
    ],
)
def test_what_cannot_be_probed_is_said_before_the_probes(
    recipe: str,
    capsys: Capture,
    monkeypatch: pytest.MonkeyPatch,
    arguments: list[str],
    message: str,
) -> None:
    pretrain(tiny(Path("runs"), "train.steps=1"))
    monkeypatch.setattr("jepa_fast.train.evaluate._probe", lambda *arguments: pytest.fail("began"))
    assert main(["eval", "runs", *arguments]) == WRONG
    assert message in capsys.readouterr().err


def test_eval_without_labels_of_patches_takes_any_patch_size(recipe: str, capsys: Capture) -> None:
    pretrain(tiny(Path("runs"), "train.steps=1"))
    assert main(["eval", "runs", "data.patch=null", "data.augment.centre=0.5"]) == DONE
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == ["knn", "linear"]


def change_config(checkpoint: Path, section: str, **values: Any) -> None:
    """Give the configuration in a checkpoint other values, as somebody who sends one could."""
    state = load_checkpoint(checkpoint)
    state["config"][section] |= values
    torch.save(state, checkpoint)


def test_a_checkpoint_runs_no_command_that_the_user_does_not_repeat(
    recipe: str, capsys: Capture
) -> None:
    with tarfile.open("digits.tar", "w") as shard:
        for number in range(16):
            Image.new("RGB", (32, 32), (15 * number, 0, 0)).save("image.png")
            Path("label").write_text(str(number % 2))
            shard.add("image.png", f"{number}.png")
            shard.add("label", f"{number}.cls")
    piped = ["data.train=pipe:cat digits.tar", "data.val=pipe:cat digits.tar"]
    data = "data={kind: shards, train: '', train_length: 16, val_length: 16}"
    # The command that the user gives now is the user's own.
    assert main(["pretrain", recipe, data, *piped, "train.steps=1", "--report"]) == DONE
    assert main(["eval", "runs/tiny"]) == WRONG
    error = capsys.readouterr().err
    assert 'data.train: the checkpoint\'s configuration has "pipe:cat digits.tar", which' in error
    assert "repeat it as an override, data.train=" in error
    assert main(["eval", "runs/tiny", piped[0]]) == WRONG
    assert "data.val: the checkpoint's" in capsys.readouterr().err
    assert main(["eval", "runs/tiny", *piped]) == DONE


@pytest.mark.parametrize(
    "url", ["pipe:touch pwned", "https://x/a.tar::PIPE:touch pwned", "s3://a::{p,}ipe:touch pwned"]
)
def test_commands_are_found_however_they_are_written(
    recipe: str, capsys: Capture, url: str
) -> None:
    pretrain(tiny(Path("runs"), "train.steps=1"))
    state = load_checkpoint("runs")
    state["config"]["data"] = {"kind": "shards", "train": url, "train_length": 8, "val": "x.tar"}
    torch.save(state, "evil.pt")
    assert main(["eval", "evil.pt"]) == WRONG
    assert "data.train: the checkpoint's configuration has" in capsys.readouterr().err
    assert main(["eval", "evil.pt", "data={kind: digits, val_length: 8, probe_length: 8}"]) == DONE
    assert not Path("pwned").exists()


def test_a_checkpoint_cannot_ask_to_trust_remote_code(recipe: str, capsys: Capture) -> None:
    pretrain(tiny(Path("runs"), "train.steps=1"))
    change_config(Path("runs/last.pt"), "text", trust_remote_code=True)
    assert main(["eval", "runs"]) == WRONG
    error = capsys.readouterr().err
    assert "text.trust_remote_code: the checkpoint's configuration has true" in error
    assert "repeat it as an override, text.trust_remote_code=true" in error
    assert main(["eval", "runs", "text.trust_remote_code=true"]) == DONE


def test_a_report_tells_of_skipped_samples(recipe: str) -> None:
    for name in ("a", "b"):
        Path("images", name).mkdir(parents=True)
        for number in range(8):
            Image.new("RGB", (32, 32), (9 * number, 0, 0)).save(f"images/{name}/{number}.png")
    Path("images/a/0.png").write_bytes(b"no picture")
    data = "data={kind: folder, train: images, val: images}"
    assert main(["pretrain", recipe, data, "train.steps=2", "--report"]) == DONE
    html = Path("runs/tiny/report.html").read_text()
    for name in ("Training", "Images that probes learn from", "Images that probes are tested on"):
        assert f"{name}: 1 samples skipped: 1 x image cannot be decoded" in html


def test_a_backend_that_does_not_exist_is_named(
    recipe: str, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    monkeypatch.setenv("JEPA_FAST_BACKEND", "tritn")
    for command in (["pretrain", recipe], ["eval", "runs"]):
        assert main(command) == WRONG
        assert "JEPA_FAST_BACKEND: expected auto or one of cuda, " in capsys.readouterr().err


@pytest.mark.parametrize(
    ("error", "code", "told"),
    [
        (KeyboardInterrupt(), 130, "jepa-fast: stopped by SIGINT"),
        (
            RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed. "),
            FAILED,
            "jepa-fast: DataLoader worker (pid 7) is killed by signal: Killed, as where memory, or",
        ),
    ],
)
def test_what_stops_a_run_from_outside_is_no_traceback(
    recipe: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: Capture,
    error: BaseException,
    code: int,
    told: str,
) -> None:
    def stopped(*arguments: object, **options: object) -> None:
        raise error

    monkeypatch.setattr("jepa_fast.train.run.build_model", stopped)
    assert main(["pretrain", recipe]) == code
    assert capsys.readouterr().err.splitlines()[-1].startswith(told)


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


def test_an_import_hook_may_hide_triton(monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    class Hidden:
        @staticmethod
        def find_spec(name: str, path: Any = None, target: Any = None) -> None:
            if name == "triton":
                raise ImportError("hidden")

    for name in [name for name in sys.modules if name.partition(".")[0] == "triton"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(sys, "meta_path", [Hidden, *sys.meta_path])
    _machine._missing_triton.cache_clear()
    try:
        assert main(["info"]) == DONE
    finally:
        _machine._missing_triton.cache_clear()
    assert "triton is not installed" in capsys.readouterr().out


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


def test_resuming_keeps_the_overrides_of_the_run(
    recipe: str, caplog: pytest.LogCaptureFixture, capsys: Capture
) -> None:
    overrides = ["train.lr.peak=1e-5", "masks.num_targets=2"]
    assert main(["pretrain", recipe, *overrides, "train.steps=3"]) == DONE
    with caplog.at_level("INFO"):
        assert main(["pretrain", recipe, "train.steps=5", "--resume"]) == DONE
    assert "train.lr.peak: tiny.yaml has 0.001, the run goes on with its own 1e-05" in (
        caplog.text.replace(f"{Path(recipe).parent}/", "")
    )
    assert "train.steps is 5 here, and was 3 before" in caplog.text
    assert "train.lr.peak is" not in caplog.text
    assert "resumed at step 3 of 5" in caplog.text
    state = load_checkpoint("runs/tiny")
    written = yaml.safe_load(Path("runs/tiny/config.yaml").read_text())
    assert state["config"] == written
    assert (written["train"]["lr"]["peak"], written["masks"]["num_targets"]) == (1e-5, 2)

    assert main(["pretrain", recipe, "--resume", "--dry-run", "seed=0"]) == DONE
    printed = yaml.safe_load(capsys.readouterr().out)
    assert (printed["train"]["steps"], printed["train"]["lr"]["peak"]) == (5, 1e-5)


def test_a_run_is_not_resumed_past_its_end_or_by_another_recipe(
    recipe: str, capsys: Capture
) -> None:
    assert main(["pretrain", recipe, "train.steps=3"]) == DONE
    before = Path("runs/tiny/config.yaml").read_text()
    assert main(["pretrain", recipe, "train.steps=2", "--resume"]) == WRONG
    assert "train.steps: expected at least the 3 steps that the check" in capsys.readouterr().err
    assert main(["pretrain", "demo", "output=runs/tiny", "--resume"]) == WRONG
    error = capsys.readouterr().err
    assert (
        "model.method: expected ijepa, as the run in runs/tiny has, got tcjepa from demo" in error
    )
    assert Path("runs/tiny/config.yaml").read_text() == before


def test_a_resumed_run_goes_where_the_recipe_says(recipe: str) -> None:
    assert main(["pretrain", recipe, "train.steps=3", "output=runs/first"]) == DONE
    assert main(["pretrain", recipe, "train.steps=4", "--resume", "runs/first"]) == DONE
    assert load_checkpoint("runs/first")["step"] == 3
    assert load_checkpoint("runs/tiny")["step"] == 4


def test_resuming_runs_no_command_of_the_checkpoint(recipe: str, capsys: Capture) -> None:
    assert main(["pretrain", recipe, "train.steps=1"]) == DONE
    change_config(Path("runs/tiny/last.pt"), "text", trust_remote_code=True)
    assert main(["pretrain", recipe, "train.steps=2", "--resume"]) == WRONG
    assert "text.trust_remote_code: the checkpoint's configuration has true" in (
        capsys.readouterr().err
    )
    trusted = "text.trust_remote_code=true"
    assert main(["pretrain", recipe, "train.steps=2", trusted, "--resume"]) == DONE
    shards = {"kind": "shards", "train": "pipe:touch pwned", "train_length": 8, "val": None}
    state = load_checkpoint("runs/tiny")
    torch.save(state | {"config": state["config"] | {"data": shards}}, "runs/tiny/last.pt")
    Path(recipe).write_text("{model: {method: ijepa}, data: {kind: shards, train: x.tar}}")
    assert main(["pretrain", recipe, trusted, "--resume"]) == WRONG
    assert "data.train: the checkpoint's configuration has \"pipe:touch" in capsys.readouterr().err
    assert not Path("pwned").exists()
