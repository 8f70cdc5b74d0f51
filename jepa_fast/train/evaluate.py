"""From a checkpoint to probe results, what its head is worth, and a report."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from jepa_fast.data import Batch, DigitScenes, HashedWords, Loader
from jepa_fast.data.batch import UNKNOWN
from jepa_fast.data.skips import SkipLog
from jepa_fast.eval.figures import MaskExample, WordMap
from jepa_fast.eval.heads import HeadScores, score_head
from jepa_fast.eval.probes import ProbeComparison, compare_with_untrained, probe_all
from jepa_fast.eval.report import require_for_reports, write_report
from jepa_fast.masks import BlockMasks, BlockMaskSampler
from jepa_fast.train.build import (
    Prepare,
    build_model,
    build_probe_loader,
    build_text,
    build_transform,
    naming,
)
from jepa_fast.train.checkpoint import WEIGHTS, load_checkpoint, load_weights
from jepa_fast.train.config import Config, overridden, parse_config
from jepa_fast.train.distributed import resolve_device
from jepa_fast.train.errors import ConfigError
from jepa_fast.train.logs import naming_file, read_rows
from jepa_fast.train.run import REPORT, RESULTS, failures, summary
from jepa_fast.train.saved import refuse_foreign_code

_log = logging.getLogger(__name__)
_PICTURES = 4  # images shown in a report
_HEAD_IMAGES = 250  # whose targets a head is asked about


@dataclass(frozen=True)
class Evaluation:
    """probes: `untrained` is empty without untrained seeds. head: of a probabilistic model."""

    probes: list[ProbeComparison]
    head: HeadScores | None

    def __str__(self) -> str:
        lines = [format_probes(self.probes)] if self.probes else []
        return "\n".join([*lines, *([] if self.head is None else [str(self.head)])])


def evaluate(
    checkpoint: str | Path,
    overrides: Sequence[str] = (),
    *,
    untrained_seeds: int = 0,
    output: str | Path | None = None,
    report: bool = False,
    trusted: Mapping[str, Any] | None = None,
) -> Evaluation:
    """Probe the teacher of a checkpoint: kNN, linear, and per patch where patches have labels.

    A probabilistic head is asked about targets of validation images.

    Args:
        checkpoint: file, or the output folder of a run.
        overrides: `key=value` over the run's own configuration, such as `data.val=...`.
        untrained_seeds: also probe so many untrained models of the same kind.
        output: JSON file for the results; None: `eval.json` beside the checkpoint.
        report: also write `report.html` beside the checkpoint.
        trusted: plain values of a configuration that is the caller's own, as `overrides` are.

    Raises:
        ConfigError, CheckpointError: there is no such checkpoint, its data are not here, or they
            cannot be probed as asked. Or the checkpoint's configuration would run code, by a
            `pipe:` URL or `trust_remote_code`, that neither `overrides` nor `trusted` ask for.
        ImportError: a report needs what is not installed.
    """
    if untrained_seeds < 0:
        raise ConfigError(f"untrained_seeds: expected 0 or more, got {untrained_seeds}")
    path = Path(checkpoint)
    folder = path if path.is_dir() else path.parent
    results_path = Path(output) if output else folder / RESULTS
    state = load_checkpoint(path, parts=WEIGHTS)
    if results_path.is_dir() or not results_path.parent.is_dir():
        raise ConfigError(f"output: expected a file in a folder that exists, got {results_path}")
    _check_writable(results_path, "name another with --output")
    if report:
        require_for_reports()
        _check_writable(folder / REPORT, "do without --report, or copy the checkpoint")
    config = parse_config(state["config"], overrides, source=str(checkpoint))
    refuse_foreign_code(config, overridden(dict(trusted or {}), overrides))
    device = torch.device(resolve_device(config.device))
    model = build_model(config).to(device)
    load_weights(model, state)
    known, asked = (build_probe_loader(config, split, device) for split in ("probe", "val"))
    _check_probes(config, known, model)
    question = _HeadQuestion(config, model, asked) if _has_head(config) else None

    started = time.perf_counter()
    learned, tested = _Labels(known), _Labels(question or asked)
    try:
        probes = _probe(config, model, learned, tested, device, untrained_seeds)
    except ValueError as error:  # what only the features, or all labels, show
        raise ConfigError(f"{checkpoint} cannot be probed: {error}") from error
    head = question.scores(model, device) if question else None
    if not probes and head is None:
        raise ConfigError(
            "data: nothing to probe, since the images of data.train or data.val have no labels; "
            "give labelled ones, such as data={kind: folder, train: ..., val: ...}"
        )
    results = {
        "checkpoint": str(checkpoint),
        "step": state["step"],
        "images": {"known": len(known.source), "asked": len(asked.source)},
        "skipped": {"known": known.skipped, "asked": asked.skipped},
        "seconds": round(time.perf_counter() - started, 1),
        "probes": {p.name: {"trained": p.trained, "untrained": p.untrained} for p in probes},
        **({} if head is None else {"head": asdict(head)}),
    }
    found = Evaluation(probes, head)
    try:
        with naming_file(results_path):
            results_path.write_text(json.dumps(results, indent=2) + "\n")
    except OSError:
        _log.error("%s", found)  # perhaps the work of hours
        raise
    if report:
        trained = SkipLog()
        for rank in state.get("ranks", ()):
            trained.reasons.update(rank["loader"]["skipped"])
        skips = {
            "Training": trained,
            "Images that probes learn from": known.skips,
            "Images that probes are tested on": asked.skips,
        }
        notes = [f"{name}: {some.summary()}" for name, some in skips.items() if some]
        _report(folder, config, model, probes, head, next(iter(asked)), device, notes)
    if "knn" in results["probes"]:
        _warn_of_empty_probes(learned, tested, config.eval.k)
    written = f"{results_path} and {folder / 'report.html'}" if report else f"{results_path}"
    _log.info(
        "%d images to learn from, %d to test on, classes: %d; results in %s",
        *(learned.images, tested.images, len(learned.classes | tested.classes), written),
    )
    return found


def _check_writable(path: Path, fix: str) -> None:
    """Find out before the probes. A file that is there stays as it is, and no new one is left.

    Raises:
        ConfigError: it cannot be written.
    """
    try:
        new = not path.exists()
        path.open("a").close()
    except OSError as error:
        raise ConfigError(
            f"output: expected a file that can be written, got {path} ({error.strerror}); {fix}"
        ) from error
    if new:
        path.resolve().unlink()


class _Labels:
    """Passes batches on, and keeps in mind what the last pass over them showed.

    images: how many there were. labelled: those with a label. classes: their labels.
    """

    def __init__(self, batches: Iterable[Batch]) -> None:
        self.batches = batches
        self.images = self.labelled = 0
        self.classes: set[int] = set()

    def __iter__(self) -> Iterator[Batch]:
        self.images = self.labelled = 0
        for batch in self.batches:
            known = batch.labels[batch.labels != UNKNOWN].tolist()
            self.images += len(batch)
            self.labelled += len(known)
            self.classes.update(known)
            yield batch


def _warn_of_empty_probes(learned: _Labels, tested: _Labels, k: int) -> None:
    """Of labels, or neighbours, with which the probes of images say nothing."""
    if len(learned.classes | tested.classes) < 2:
        _log.warning(
            "data: expected images of at least 2 classes, got one: every probe is right, whatever "
            "the encoder; a folder has a sub-folder for each class"
        )
    if k > learned.labelled:
        _log.warning(
            "eval.k: expected at most the %d labelled images that probes learn from, got %d: all "
            "of them vote; lower it",
            *(learned.labelled, k),
        )


def _check_probes(config: Config, known: Loader, model: Any) -> None:
    """What probes would notice only after they have begun."""
    if len(known.source) < 2:
        raise ConfigError(
            f"data: expected at least 2 images for probes to learn from, got {len(known.source)}"
        )
    scenes = known.source
    if not isinstance(scenes, DigitScenes) or scenes.patch is None:
        return
    rows, columns = (side * scenes.cell // scenes.patch for side in scenes.grid)
    without = "data.patch=null leaves the patch probe out"
    if (rows, columns) != tuple(model.encoder.grid):
        raise ConfigError(
            f"data.patch: expected one label for each of the encoder's {model.encoder.grid} "
            f"patches, got {scenes.patch}, which gives {(rows, columns)}; {without}"
        )
    centre = config.data.augment.centre
    if centre != 1:
        raise ConfigError(
            f"data.augment.centre: expected 1 where patches have labels, got {centre}; {without}"
        )


def format_probes(probes: Sequence[ProbeComparison]) -> str:
    """A table of the probes, as text."""
    if not any(probe.untrained for probe in probes):
        return "\n".join(f"{probe.name:<8} {probe.trained:>8.2%}" for probe in probes)
    seeds = len(probes[0].untrained)
    lines = [f"{'probe':<8} {'trained':>8}   {f'untrained, {seeds} seeds':<36} gain"]
    for p in probes:
        untrained = f"{p.mean:.2%} (std {p.std:.2%}, {p.low:.2%}..{p.high:.2%})"
        lines.append(f"{p.name:<8} {p.trained:>8.2%}   {untrained:<36} {100 * p.gain:+.2f} points")
    return "\n".join(lines)


def _probe(
    config: Config,
    model: Any,
    known: Iterable[Batch],
    asked: Iterable[Batch],
    device: torch.device,
    untrained_seeds: int,
) -> list[ProbeComparison]:
    options: dict[str, Any] = {
        "device": device,
        **config.eval.model_dump(include={"k", "patches_per_image"}),
    }
    if untrained_seeds == 0:
        found = probe_all(model.encode, known, asked, **options)
        return [ProbeComparison(name, value, ()) for name, value in found.items()]
    return compare_with_untrained(
        model.encode,
        lambda: build_model(config).to(device).encode,
        known,
        asked,
        seeds=range(untrained_seeds),
        **options,
    )


def _has_head(config: Config) -> bool:
    """Whether there is a probabilistic head, and something is to be asked of it."""
    return config.model.method == "probijepa" and config.eval.head_tokens > 0


class _HeadQuestion:
    """The images whose targets a head is asked about, kept while probes read all of them.

    They come from all over the data, where classes may come one after another.

    Raises:
        ConfigError: masks that cannot be drawn on this grid.
    """

    def __init__(self, config: Config, model: Any, loader: Loader) -> None:
        self.loader = loader
        self.batch_size, self.tokens = config.eval.batch_size, config.eval.head_tokens
        with naming("masks"):
            # One seed for all runs: they are asked about the same patches.
            self.sampler = BlockMaskSampler(model.encoder.grid, seed=0, **config.masks.model_dump())
        self.images = torch.empty(0)

    def __iter__(self) -> Iterator[Batch]:
        total = len(self.loader.source)
        wanted = {i * total // _HEAD_IMAGES for i in range(_HEAD_IMAGES)}
        kept, seen = [], 0
        for batch in self.loader:
            mine = [i for i in range(len(batch.images)) if seen + i in wanted]
            kept.append(batch.images[mine])
            seen += len(batch.images)
            yield batch
        self.images = torch.cat(kept)

    def scores(self, model: Any, device: torch.device) -> HeadScores:
        """What the head says.

        Raises:
            ConfigError: fewer than 2 targets.
        """
        training = model.training
        try:
            return score_head(model.eval(), self._batches(device), self.tokens)
        except ValueError as error:
            raise ConfigError(
                f"data.val: the head cannot be asked: {error}; eval.head_tokens=0 leaves that out"
            ) from error
        finally:
            model.train(training)

    def _batches(self, device: torch.device) -> Iterator[tuple[Tensor, BlockMasks]]:
        first = 0
        for images in self.images.split(self.batch_size):
            masks = self.sampler(0, first + torch.arange(len(images)))
            yield images.to(device), masks.to(device)
            first += len(images)


def _report(
    folder: Path,
    config: Config,
    model: Any,
    probes: list[ProbeComparison],
    head: HeadScores | None,
    batch: Batch,
    device: torch.device,
    notes: list[str],
) -> None:
    model.eval()
    rows = read_rows(folder)
    problems = failures(rows, config.train) if rows else []
    findings = [(False, problem) for problem in problems]
    if rows:
        findings.append((not problems, summary(rows)))
    for p in (p for p in probes if p.untrained):
        verb = "beyond" if p.beyond_spread else "within"
        findings.append((p.beyond_spread, f"{p}: {verb} the spread of the untrained encoders"))
    text = build_text(config, device)
    few = _first(batch, _PICTURES)
    images, masks, _ = Prepare(config, model, text, device)(few, 0)
    pictures = build_transform(config, train=False).denormalise(images).cpu()
    valid = masks.context_mask if masks.context_mask is not None else masks.context >= 0
    if isinstance(text, HashedWords):
        hashed = "Words have fixed hashed vectors, not those of a pretrained text encoder."
        notes = [hashed, *notes]
    write_report(
        folder / REPORT,
        title=f"{folder.name}: {type(model).__name__}",
        rows=rows,
        probes=[p for p in probes if p.untrained],
        head=head,
        masks=[
            MaskExample(
                pictures[i], masks.context[i][valid[i]].cpu(), masks.targets[i].cpu(), masks.grid
            )
            for i in range(len(few))
        ],
        word_maps=_word_maps(config, model, text, few, images, pictures),
        findings=findings,
        notes=notes,
        config=config.as_dict(),
        limits={
            name: least
            for name, least in (
                ("target_rank", config.train.collapse.min_rank),
                ("target_std_mean", config.train.collapse.min_std),
            )
            if least > 0
        },
    )


def _first(batch: Batch, count: int) -> Batch:
    return Batch(
        batch.images[:count], batch.labels[:count], batch.ids[:count], batch.captions[:count]
    )


def _word_maps(
    config: Config, model: Any, text: Any, batch: Batch, images: Tensor, pictures: Tensor
) -> list[WordMap]:
    """Similarity of patches to the words of one caption an image, another one for every image."""
    if config.model.method != "tcjepa" or config.model.conditioning != "words":
        return []
    told = [some[i % len(some)] if some else "" for i, some in enumerate(batch.captions)]
    words = text([[caption] for caption in told], 1).to(images.device)
    similarity = model.similarity_map(
        images, None, words.words, words.word_mask, words.caption_mask
    ).cpu()
    return [
        WordMap(
            picture,
            split,
            similarity[i, 0, :, : len(split)],
            model.encoder.grid,
            caption,
        )
        for i, (picture, caption) in enumerate(zip(pictures, told, strict=True))
        if (split := text.split(caption))
    ]
