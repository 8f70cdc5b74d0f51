from __future__ import annotations

import json
import math
import os
import signal
import tarfile
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_runs import tiny, trainer_of

from jepa_fast.nn.attention import Block
from jepa_fast.train.build import build_model
from jepa_fast.train.checkpoint import load_checkpoint
from jepa_fast.train.config import TrainConfig
from jepa_fast.train.distributed import resolve_precision
from jepa_fast.train.errors import ConfigError, Interrupted, NonFiniteError
from jepa_fast.train.logs import read_rows
from jepa_fast.train.run import failures, pretrain, summary
from jepa_fast.train.schedules import warmup_cosine


def test_a_run_leaves_logs_and_checkpoints(tmp_path: Path) -> None:
    assert pretrain(tiny(tmp_path)) == []
    rows = read_rows(tmp_path)
    assert [row["step"] for row in rows] == [5, 10, 15, 20]
    assert rows[0]["epoch"] == pytest.approx(5 / 6)
    assert all(math.isfinite(value) for row in rows for value in row.values() if value is not None)
    assert {"loss", "target_rank", "target_std_mean", "prediction_std_min"} <= rows[0].keys()
    names = {path.name for path in tmp_path.iterdir()}
    assert {
        "config.yaml",
        "metrics.csv",
        "last.pt",
        "step-000000010.pt",
        "step-000000020.pt",
    } <= names
    assert load_checkpoint(tmp_path)["step"] == 20


def test_the_optimizer_follows_the_schedules(tmp_path: Path) -> None:
    trainer = trainer_of(tiny(tmp_path, "train.log_every=1", "train.steps=12"))
    trainer.fit()
    lr = [
        warmup_cosine(n, total=12, warmup=6, start=2e-4, peak=1e-3, final=1e-6)
        for n in range(1, 13)
    ]
    rows = read_rows(tmp_path)
    assert [row["lr"] for row in rows] == pytest.approx(lr)
    assert rows[-1]["weight_decay"] == pytest.approx(0.4)
    assert [row["momentum"] for row in rows][:2] == pytest.approx([0.996, 0.996 + 0.004 / 12])
    decayed, plain = trainer.optimizer.param_groups
    assert (decayed["weight_decay"], plain["weight_decay"]) == (pytest.approx(0.4), 0.0)
    names = dict(trainer.model.named_parameters())
    assert any(p is names["predictor.mask_token"] for p in decayed["params"])
    assert all(p.ndim == 1 for p in plain["params"])


def test_one_step_is_adamw_and_the_moving_average(tmp_path: Path) -> None:
    config = tiny(tmp_path, "train.steps=1")
    trainer = trainer_of(config)
    oracle = trainer_of(config)
    trainer.fit()

    batch = next(iter(oracle.loader))
    oracle.model.train()
    images, masks, text = oracle.prepare(batch, 0)
    oracle.model(images, masks, **text).loss.backward()
    teacher = [p.clone() for p in oracle.model.target_encoder.parameters()]
    lr = config.train.lr.start + (config.train.lr.peak - config.train.lr.start) / 6
    decayed = [p for p in oracle.model.parameters() if p.requires_grad and p.ndim > 1]
    plain = [p for p in oracle.model.parameters() if p.requires_grad and p.ndim == 1]
    torch.optim.AdamW(
        [{"params": decayed, "weight_decay": 0.4}, {"params": plain, "weight_decay": 0.0}], lr=lr
    ).step()
    for p, expected in zip(trainer.model.parameters(), oracle.model.parameters(), strict=True):
        if p.requires_grad:
            assert torch.allclose(p, expected, atol=1e-7)
    moved = zip(
        trainer.model.target_encoder.parameters(),
        teacher,
        oracle.model.encoder.parameters(),
        strict=True,
    )
    for p, before, student in moved:
        assert torch.allclose(p, 0.996 * before + 0.004 * student, atol=1e-7)


@pytest.mark.parametrize(("amx", "expected"), [(True, "bfloat16"), (False, "float32")])
def test_auto_precision_takes_what_is_fast_here(
    amx: bool, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)
    assert resolve_precision("auto", torch.device("cpu")) == expected
    assert resolve_precision("auto", torch.device("cuda")) == "bfloat16"
    assert resolve_precision("float32", torch.device("cuda")) == "float32"


def test_clipping_and_bfloat16(tmp_path: Path) -> None:
    overrides = ("train.clip_grad=0.01", "train.precision=bfloat16", "train.steps=2")
    trainer = trainer_of(tiny(tmp_path, *overrides))
    seen: list[torch.dtype] = []
    block = next(m for m in trainer.model.modules() if isinstance(m, Block))
    block.attn.qkv.register_forward_hook(lambda module, args, out: seen.append(out.dtype))
    trainer.fit()
    assert set(seen) == {torch.bfloat16}
    (row,) = read_rows(tmp_path)
    assert row["grad_norm"] is not None
    assert row["grad_norm"] > 0.01  # the norm before clipping
    assert all(p.dtype == torch.float32 for p in trainer.model.parameters())


@pytest.mark.parametrize(
    "overrides",
    [
        ("model.method=tcjepa", "model.conditioning=append"),
        ("model.method=tcjepa", "model.pool=attention", "model.per_caption=true"),
        ("model.method=tijepa", "model.objective=cross_modal", "model.width=16", "model.depth=1"),
        ("model.method=probijepa", "model.head=flow_matching", "model.head_options.hidden_dim=8"),
        ("masks.num_targets=2", "masks.min_context=4", "model.loss=l1"),
    ],
)
def test_options_of_the_methods_reach_their_models(tmp_path: Path, overrides: Any) -> None:
    assert pretrain(tiny(tmp_path, *overrides, "train.steps=2")) == []


def test_blocks_are_compiled_where_asked(tmp_path: Path, monkeypatch) -> None:
    compiled: list[Block] = []
    monkeypatch.setattr(Block, "compile", lambda block: compiled.append(block))
    build_model(tiny(tmp_path))
    assert compiled == []
    model = build_model(tiny(tmp_path, "train.compile=true"))
    assert len(compiled) == sum(isinstance(module, Block) for module in model.modules()) == 3


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path: Path) -> None:
    trainer = trainer_of(tiny(tmp_path, "train.checkpoint_every=6"))
    prepare = trainer.prepare

    def poisoned(batch: Any, step: int) -> Any:
        images, masks, text = prepare(batch, step)
        return (images * math.nan if step == 7 else images), masks, text

    trainer.prepare = poisoned
    with pytest.raises(
        NonFiniteError, match=r"not finite at step 7 \(noticed after step 10\)"
    ) as e:
        trainer.fit()
    assert f"last good checkpoint is {tmp_path / 'last.pt'}" in str(e.value)
    state = load_checkpoint(tmp_path)
    assert state["step"] == 6
    assert all(value.isfinite().all() for value in state["model"].values())


def test_weights_that_are_not_finite_are_not_saved(tmp_path: Path) -> None:
    trainer = trainer_of(tiny(tmp_path))
    with torch.no_grad():
        next(trainer.model.predictor.parameters()).fill_(math.inf)
    with pytest.raises(NonFiniteError, match=r"a weight is not finite.*there is no checkpoint yet"):
        trainer.save()
    assert not (tmp_path / "last.pt").exists()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_after_the_step_and_stops(tmp_path: Path, number: signal.Signals) -> None:
    trainer = trainer_of(tiny(tmp_path))
    prepare = trainer.prepare
    before = signal.getsignal(number)

    def told_to_stop(batch: Any, step: int) -> Any:
        if step == 3:
            os.kill(os.getpid(), number)
            if number == signal.SIGTERM:  # `timeout`, or torchrun and a scheduler, send two
                os.kill(os.getpid(), number)
        return prepare(batch, step)

    trainer.prepare = told_to_stop
    with pytest.raises(
        Interrupted, match=rf"stopped by {number.name}, saved .*last\.pt"
    ) as stopped:
        trainer.fit()
    assert stopped.value.signal_number == number
    assert load_checkpoint(tmp_path)["step"] == 4
    assert signal.getsignal(number) is before


def test_an_earlier_run_is_not_overwritten_unasked(tmp_path: Path) -> None:
    config = tiny(tmp_path, "train.steps=1")
    pretrain(config)
    with pytest.raises(ConfigError, match=r"holds a run already; --resume .* --overwrite"):
        pretrain(config)
    evaluation = {tmp_path / "eval.json", tmp_path / "report.html"}
    for path in {*evaluation, tmp_path / "notes.txt"}:
        path.write_text("of the run before")
    pretrain(config, overwrite=True)
    left = set(tmp_path.iterdir())
    assert not left & evaluation
    assert tmp_path / "notes.txt" in left
    (tmp_path / "last.pt").unlink()  # as in a copy without symbolic links
    with pytest.raises(ConfigError, match="holds a run already"):
        pretrain(config)
    assert load_checkpoint(tmp_path)["step"] == 1


@pytest.mark.parametrize("wrong", ["model.predictor_heads=5", "train.batch_size=64"])
def test_a_run_that_cannot_start_leaves_the_one_it_was_to_replace(
    tmp_path: Path, wrong: str
) -> None:
    pretrain(tiny(tmp_path, "train.steps=1"))
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(ConfigError):
        pretrain(tiny(tmp_path, wrong), overwrite=True)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


@pytest.mark.parametrize("kind", ["folder", "coco", "shards"])
def test_data_that_cannot_be_read_leave_the_run_that_was_to_be_replaced(
    tmp_path: Path, kind: str
) -> None:
    images, shard = tmp_path / "images", tmp_path / "x.tar"
    images.mkdir()
    entries = [{"id": number, "file_name": f"{number}.jpg"} for number in range(8)]
    for entry in entries:
        (images / str(entry["file_name"])).write_bytes(b"no picture")
    captions = [{"image_id": number, "caption": "nothing"} for number in range(8)]
    told = tmp_path / "captions.json"
    told.write_text(json.dumps({"images": entries, "annotations": captions}))
    with tarfile.open(shard, "w") as archive:
        archive.add(images / "0.jpg", "0.jpg")
    data, key = {
        "folder": (f"train: {images}", "data.train"),
        "coco": (f"train: {told}, train_images: {images}", "data.train_images"),
        "shards": (f"train: {shard}, train_length: 8", "data.train"),
    }[kind]
    run = tmp_path / "run"
    pretrain(tiny(run, "train.steps=1"))
    before = {path.name: path.read_bytes() for path in run.iterdir()}
    with pytest.raises(ConfigError, match=rf"^{key}: no readable sample in .*samples skipped"):
        pretrain(tiny(run, f"data={{kind: {kind}, {data}}}"), overwrite=True)
    assert {path.name: path.read_bytes() for path in run.iterdir()} == before


@pytest.mark.parametrize(("steps", "told"), [(6, True), (7, False)])
def test_a_warm_up_as_long_as_the_run_is_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, steps: int, told: bool
) -> None:
    trainer_of(tiny(tmp_path, f"train.steps={steps}"))  # an epoch of warm-up is 6 steps
    warning = "train.lr.warmup_epochs: expected less than the run's epochs, 1, got 1: it ends"
    assert (warning in caplog.text) is told


def test_without_a_warm_up_given_a_tenth_of_the_run_is_one(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    none = "train.lr.warmup_epochs=null"
    assert trainer_of(tiny(tmp_path, none, "train.steps=20")).warmup_steps == 2
    epochs = tiny(tmp_path, none, "train.steps=null", "train.epochs=5")  # of 6 steps
    assert trainer_of(epochs).warmup_steps == 3
    assert "warmup_epochs" not in caplog.text


def test_older_checkpoints_are_kept_besides_the_last(tmp_path: Path) -> None:
    short = ("train.steps=3", "train.checkpoint_every=1")
    for keep, steps in ((0, [3]), (1, [2, 3])):
        pretrain(tiny(tmp_path, *short, f"train.keep_checkpoints={keep}"), overwrite=True)
        names = sorted(path.name for path in tmp_path.glob("step-*.pt"))
        assert names == [f"step-{step:09d}.pt" for step in steps]


def test_one_logged_row_is_summed_up_as_one() -> None:
    row = {"step": 20, "loss": 0.2303, "target_rank": 9.0, "images_per_second": 100.0}
    assert summary([row]) == (
        "20 steps, loss 0.2303, effective rank of the targets 9, 100 images/s (one logged row; a "
        "lower train.log_every shows the course)"
    )
    end = {"step": 40, "loss": 0.2, "target_rank": 8.0, "images_per_second": 100.0}
    assert summary([row, end]) == (
        "40 steps, loss 0.2303 -> 0.2, effective rank of the targets 9 -> 8, 100 images/s"
    )


def rows_of(losses: list[float], rank: float = 9.0, std: float = 1.0) -> list[dict[str, Any]]:
    return [{"loss": loss, "target_rank": rank, "target_std_mean": std} for loss in losses]


def test_failures_of_a_finished_run() -> None:
    config = TrainConfig.model_validate(
        {"collapse": {"min_rank": 4, "min_std": 0.1}, "require_learning": True}
    )
    assert failures(rows_of([1.0, 0.8]), config) == []
    assert failures(rows_of([1.0, 1.2]), config) == [
        "the loss did not fall: 1 at first, 1.2 at the end"
    ]
    assert "one logged row" in failures(rows_of([1.0]), config)[0]
    assert failures(rows_of([1.0, 0.8], rank=3.0), config) == [
        "collapsed: the effective rank of the targets is 3, expected 4 or more"
    ]
    assert "mean standard deviation" in failures(rows_of([1.0, 0.8], std=0.01), config)[0]
    assert "nan" in failures(rows_of([1.0, 0.8], rank=None), config)[0]  # type: ignore[arg-type]
    # The last tenth of the rows is the end: one bad row among many good ones does not decide.
    falling = [1.0 - 0.01 * i for i in range(40)]
    assert failures(rows_of([*falling[:-1], 1.1]), config) == []
    lenient = TrainConfig()
    assert failures(rows_of([1.0, 2.0], rank=1.0, std=0.0), lenient) == []
