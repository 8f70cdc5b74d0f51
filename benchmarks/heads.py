"""The probabilistic heads beside each other, and beside deterministic I-JEPA, on equal terms.

`python benchmarks/heads.py` trains every variant with several seeds: same images, masks, steps,
schedule and encoder, and the same first weights of it. It probes the teachers, and asks the heads
about held-out targets: their likelihood, how often central intervals hold them, how far samples of
a token lie apart. What a step and a sample cost is measured on its own, in turns. It writes
benchmarks/results/recipes/heads.json, from which the README has its table, and heads.png beside it.

    python benchmarks/heads.py data.train=/data/train-*.tar data.val=/data/val-*.tar
    python benchmarks/heads.py --ablation components
    python benchmarks/heads.py --recipe tiny_imagenet100_mixture --jobs 1

On CIFAR-10 the runs are cut so that all of them finish within an hour on 2 cores, to one epoch, in
small batches for the steps, and flow matching is left out, which `--ablation flow` sets beside the
coupling flow; other recipes run as they say. Each run is a process with its share of the cores;
finished ones of the same commit and recipe are kept in --scratch, and the same command goes on from
there. What ablations share with each other, or with the comparison, is trained once.
"""

from __future__ import annotations

import argparse
import hashlib
import inspect
import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
import yaml
from processes import ROOT, run_python
from tables import HEAD_NAMES
from torch import nn

if str(ROOT) not in sys.path:  # started as a script, in a checkout that is not installed
    sys.path.append(str(ROOT))

from turns import median_seconds

from jepa_fast.eval.heads import SAMPLES
from jepa_fast.masks import BlockMaskSampler
from jepa_fast.nn import heads
from jepa_fast.optim import AdamWEma, parameter_groups, teacher_parameters
from jepa_fast.perf.files import write_json
from jepa_fast.perf.machine import commit, describe, uncommitted, versions
from jepa_fast.perf.memory import peak_allocation
from jepa_fast.perf.picture import new_figure, save
from jepa_fast.train.build import build_loader, build_model
from jepa_fast.train.config import Config, load_config, overridden, parse_config
from jepa_fast.train.distributed import (
    World,
    resolve_device,
    resolve_precision,
)
from jepa_fast.train.logs import read_rows

RECIPE = "cifar10_prob_mixture"
CUT = {RECIPE: {"epochs": 1, "batch_size": 32}}
"""What recipes that are cut have in `train` instead; the others run as they say."""

HEADS: dict[str, dict[str, Any]] = {
    "ijepa": {"method": "ijepa"},
    "mixture": {"head": "mixture"},
    "mixture_coordinate": {"head": "mixture", "head_options": {"event": "coordinate"}},
    "autoregressive": {"head": "autoregressive"},
    "flow": {"head": "flow"},
    "diffusion": {"head": "diffusion"},
    "flow_matching": {"head": "flow_matching"},
}
_BEYOND_THE_HOUR = {"flow_matching"}
ABLATIONS: dict[str, dict[str, dict[str, Any]]] = {
    "components": {
        f"K={k}": {"head": "mixture", "head_options": {"num_components": k}} for k in (1, 5, 16)
    },
    "family": {
        f"{family}, {event}": {
            "head": "mixture",
            "head_options": {"family": family, "event": event},
        }
        for event in ("joint", "coordinate")
        for family in ("gaussian", "logistic")
    },
    "couplings": {
        f"{n} couplings": {"head": "flow", "head_options": {"num_couplings": n}} for n in (2, 6, 10)
    },
    "timesteps": {
        f"{n} timesteps": {"head": "diffusion", "head_options": {"timesteps": n}}
        for n in (100, 1000)
    },
    "flow": {
        HEAD_NAMES["flow"]: {"head": "flow"},
        HEAD_NAMES["flow_matching"]: {"head": "flow_matching"},
    },
}
"""What variants put into the recipe's `model`; head options over those of the head's own recipe."""

TOKENS = 512  # that are sampled at once, where it is timed
_ROUNDS = 12  # of what is timed
_SEED = 0  # of what is timed: the same for all variants
_UNTRAINED = 3  # encoders without training, for scale


def main(arguments: Sequence[str] | None = None) -> None:
    """The command."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("overrides", nargs="*", help="key=value over every variant's recipe")
    parser.add_argument("--recipe", default=RECIPE, help="that of the mixture head (%(default)s)")
    parser.add_argument("--ablation", choices=ABLATIONS, help="variants of one head instead")
    parser.add_argument(
        "--variants",
        nargs="+",
        metavar="NAME",
        help=f"only these: of {', '.join(HEADS)}, or of the ablation",
    )
    parser.add_argument("--seeds", type=int, default=3, help="runs of each (%(default)s)")
    parser.add_argument(
        "--epochs", type=int, help="of a run; the warm-up is cut in proportion (as the recipe says)"
    )
    parser.add_argument(
        "--jobs", type=int, default=os.cpu_count(), help="runs at a time (cores: %(default)s)"
    )
    parser.add_argument(
        "--scratch",
        type=Path,
        default=ROOT / "build" / "heads",
        help="where runs are kept (build/heads)",
    )
    parser.add_argument(
        "--output",
        type=Path,
        help="a .json file, with the picture beside it (in benchmarks/results/recipes)",
    )
    parser.add_argument("--costs", type=Path, nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.costs:  # what a process of its own does for the command
        recipes, output = options.costs
        configs = {n: parse_config(values) for n, values in _read(recipes).items()}
        write_json(output, measure_costs(configs))
        return
    known = list(ABLATIONS[options.ablation] if options.ablation else HEADS)
    if unknown := set(options.variants or ()) - set(known):
        parser.error(f"--variants: expected some of {known}, got {sorted(unknown)}")
    left_out = _BEYOND_THE_HOUR if options.recipe == RECIPE else set()
    compare(options, options.variants or [name for name in known if name not in left_out])


def compare(options: argparse.Namespace, names: Sequence[str]) -> None:
    """Everything that the options ask for of these variants, into a JSON file and a picture."""
    began = time.perf_counter()
    measured, changed = commit(ROOT), uncommitted(ROOT)
    # With uncommitted changes there is no telling what finished runs are of: all start anew.
    folder = options.scratch / (f"{measured[:12]}-{time.time_ns()}" if changed else measured[:12])
    folder.mkdir(parents=True, exist_ok=True)
    runs = {
        name: Runs(
            recipe(name, options.recipe, options.ablation, options.epochs, options.overrides),
            folder,
            threads=max(1, (os.cpu_count() or 1) // options.jobs),
        )
        for name in names
    }

    # By seeds first: what was interrupted has all variants.
    wanted = [(name, seed) for seed in range(options.seeds) for name in names]

    def run(of: tuple[str, int]) -> dict[str, Any]:
        name, seed = of
        # All encoders begin alike, so the first stands for all without training.
        result = runs[name].result(seed, with_untrained=of == wanted[0])
        minutes = (time.perf_counter() - began) / 60
        print(f"{name}, seed {seed}: there after {minutes:.0f} minutes", flush=True)
        return result

    with ThreadPoolExecutor(options.jobs) as pool:
        found = list(pool.map(run, wanted))
    steps = {run["step"] for run in found}
    if len(steps) != 1:
        raise RuntimeError(f"the variants took different numbers of steps: {sorted(steps)}")
    costs = _costs(folder, {name: of.recipe for name, of in runs.items()})
    results = {
        "commit": measured,
        "uncommitted": changed,
        "versions": versions(),
        "machine": describe("cuda" if torch.cuda.is_available() else "cpu"),
        "recipe": options.recipe,
        "ablation": options.ablation,
        "overrides": options.overrides,
        "steps": steps.pop(),
        "samples": SAMPLES,
        "minutes": round((time.perf_counter() - began) / 60, 1),
        "untrained": found[0]["untrained"],
        "variants": {
            name: {
                "costs": costs[name],
                "runs": [
                    {"seed": seed, **{k: v for k, v in run.items() if k != "untrained"}}
                    for (of, seed), run in zip(wanted, found, strict=True)
                    if of == name
                ],
            }
            for name in names
        },
    }
    output = options.output or default_output(options.recipe, options.ablation)
    write_json(output, results)
    draw(results, output.with_suffix(".png"))


def default_output(recipe: str, ablation: str | None) -> Path:
    """Where results go: heads.json, or with the recipe's and the ablation's name in it."""
    words = ["heads"]
    if recipe != RECIPE:
        words.append(Path(recipe).stem.removesuffix("_mixture"))
    if ablation:
        words.append(ablation)
    return ROOT / "benchmarks" / "results" / "recipes" / f"{'_'.join(words)}.json"


# What is trained


def recipe(
    name: str,
    base: str = RECIPE,
    ablation: str | None = None,
    epochs: int | None = None,
    overrides: Sequence[str] = (),
) -> dict[str, Any]:
    """The configuration of a variant, as `parse_config` takes it.

    Args:
        name: one of `HEADS`, or of the ablation.
        base: recipe of the mixture head; those of other heads have its name with theirs in it.
        ablation: one of `ABLATIONS`.
        epochs: length of the run; None: that of `CUT`, or the recipe's.
        overrides: `key=value`, the same for all.
    """
    changes = deepcopy((ABLATIONS[ablation] if ablation else HEADS)[name])
    # A recipe whose name does not end in `mixture`, such as a file, serves all heads.
    its_own = base.removesuffix("mixture") + changes.get("head", "mixture")
    config = load_config(its_own if base.endswith("mixture") else base).as_dict()
    model = config["model"]
    if changes.get("method") == "ijepa":
        del model["head"], model["head_options"]
        model["method"] = "ijepa"
    else:
        head_options = {**(model["head_options"] or {}), **changes.pop("head_options", {})}
        model |= changes
        model["head_options"] = head_options or None
    train = config["train"]
    whole = train["epochs"]
    train |= CUT.get(base, {})
    if epochs is not None:
        train["epochs"] = epochs
    if train["lr"]["warmup_epochs"] is not None and train["epochs"] != whole:
        train["lr"]["warmup_epochs"] *= train["epochs"] / whole
    # A variant that learns nothing, or collapses, is a result.
    train |= {"require_learning": False, "collapse": {}}
    config["tensorboard"] = False
    return overridden(config, overrides)


def without_defaults(recipe: dict[str, Any]) -> dict[str, Any]:
    """The recipe without options that its head has anyway: what is left tells runs apart."""
    model = recipe["model"]
    if not model.get("head_options"):
        return recipe
    options = inspect.signature(heads.HEADS[model["head"]]).parameters
    kept = {
        name: value
        for name, value in model["head_options"].items()
        if name not in options or value != options[name].default
    }
    return {**recipe, "model": {**model, "head_options": kept or None}}


# Runs


@dataclass(frozen=True)
class Runs:
    """The runs of one variant, a process each.

    Args:
        recipe: its configuration.
        folder: of the runs of all variants.
        threads: of a run.
    """

    recipe: dict[str, Any]
    folder: Path
    threads: int

    def result(self, seed: int, with_untrained: bool) -> dict[str, Any]:
        """Trains, probes and measures a run; of that, what has not been done."""
        told = json.dumps(without_defaults(self.recipe), sort_keys=True).encode()
        run = self.folder / f"{hashlib.sha256(told).hexdigest()[:16]}-{seed}"
        result = run / "result.json"
        finished = _read(result) if result.exists() else None
        cli = ("-m", "jepa_fast.cli")
        if finished is None:
            file = run.with_suffix(".yaml")
            file.write_text(yaml.safe_dump(self.recipe))
            self._python(*cli, "pretrain", file, f"seed={seed}", f"output={run}", "--overwrite")
        if finished is None or (with_untrained and not finished["untrained"]):
            untrained = _UNTRAINED if with_untrained else 0
            self._python(*cli, "eval", run, "--untrained-seeds", untrained)
            write_json(result, _result(run))
        return _read(result)

    def _python(self, *arguments: object) -> None:
        run_python(self.threads, *arguments)


def _result(run: Path) -> dict[str, Any]:
    probed = _read(run / "eval.json")
    probes = probed["probes"].items()
    return {
        "step": probed["step"],
        "probes": {probe: values["trained"] for probe, values in probes},
        "untrained": {p: values["untrained"] for p, values in probes if values["untrained"]},
        "target_rank": read_rows(run)[-1]["target_rank"],
        **probed.get("head", {}),
    }


def _costs(folder: Path, recipes: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """What the variants cost, measured on all cores while nothing else runs."""
    asked, told = folder / "recipes.json", folder / "costs.json"
    write_json(asked, recipes)
    run_python(os.cpu_count() or 1, __file__, "--costs", asked, told)
    return _read(told)


def _read(file: Path) -> Any:
    return json.loads(file.read_text())


# What it costs


def measure_costs(configs: dict[str, Config]) -> dict[str, Any]:
    """Times and memory of training steps and samples, variants in turns.

    Returns, by variant:
        images_per_second: of whole training steps, without the loading of data.
        step_bytes: that a step takes at its peak, beyond weights, gradients and moments.
        parameters: trained ones, without the encoder: predictor and head.
        sample_microseconds: a token, one sample of each of `TOKENS` tokens at once; None without a
            distribution.
        one_sample_milliseconds: one sample of one token.
    """
    steps = {name: Step(config) for name, config in configs.items()}
    calls: dict[str, dict[str, Callable[[], object]]] = {
        "step": dict(steps),
        "sample": {n: step.sampler(TOKENS) for n, step in steps.items() if step.has_head},
        "one": {n: step.sampler(1) for n, step in steps.items() if step.has_head},
    }
    device = next(iter(steps.values())).device.type
    seconds = {kind: median_seconds(of, _ROUNDS, device) for kind, of in calls.items()}
    return {
        name: {
            "images_per_second": len(step.images) / seconds["step"][name],
            "step_bytes": peak_allocation(step, device),
            "parameters": step.parameters,
            "sample_microseconds": 1e6 * seconds["sample"][name] / TOKENS
            if step.has_head
            else None,
            "one_sample_milliseconds": 1e3 * seconds["one"][name] if step.has_head else None,
        }
        for name, step in steps.items()
    }


class Step:
    """One training step of a configuration, always on the same batch."""

    def __init__(self, config: Config) -> None:
        self.device = torch.device(resolve_device(config.device))
        torch.manual_seed(_SEED)
        self.model = build_model(config).to(self.device).train()
        self.has_head = config.model.method == "probijepa"
        batch = next(iter(build_loader(config, World(self.device))))
        self.images = batch.images.to(self.device)
        masks = BlockMaskSampler(self.model.encoder.grid, seed=_SEED, **config.masks.model_dump())
        self.masks = masks(0, len(self.images)).to(self.device)
        train = config.train
        self.clip = train.clip_grad
        self.halved = resolve_precision(train.precision, self.device) == "bfloat16"
        self.optimizer = AdamWEma(
            parameter_groups(self.model, train.weight_decay.start),
            lr=train.lr.start,
            betas=train.betas,
            eps=train.eps,
            targets=teacher_parameters(self.model),
        )
        self.momentum = train.momentum.start
        self.parameters = sum(
            p.numel() for n, p in self.model.trainable_parameters() if not n.startswith("encoder.")
        )

    def __call__(self) -> None:
        with self._autocast():
            loss = self.model(self.images, self.masks).loss
        loss.backward()
        if self.clip is not None:
            nn.utils.clip_grad_norm_(self.model.parameters(), self.clip)
        self.optimizer.step(momentum=self.momentum)
        self.optimizer.zero_grad()

    def sampler(self, tokens: int) -> Callable[[], object]:
        """Draws a sample for each of so many tokens, from what the predictor says of them."""
        with torch.no_grad():
            condition = self.model(self.images, self.masks).prediction.flatten(0, 1)
        # A batch may have fewer tokens.
        condition = condition.repeat(-(-tokens // len(condition)), 1)[:tokens]

        def sample() -> object:
            self.model.eval()
            with torch.no_grad():
                drawn = self.model.head.distribution(condition).sample(1)
            self.model.train()
            return drawn

        return sample

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.halved)


# The picture


def draw(results: dict[str, Any], path: Path) -> None:
    """PIT histograms, likelihoods and probes, side by side.

    Raises:
        PerfError: matplotlib is not installed.
    """
    figure = new_figure((15.5, 4.5))
    pits, likelihoods, accuracies = figure.subplots(1, 3)
    variants = results["variants"]
    judged = {n: v["runs"] for n, v in variants.items() if "nll" in v["runs"][0]}
    colours = {name: f"C{i}" for i, name in enumerate(variants)}
    names = {name: HEAD_NAMES.get(name, name) for name in variants}

    edges = [i / (SAMPLES + 1) for i in range(SAMPLES + 2)]
    for name, runs in judged.items():
        pit = [run["pit"] for run in runs if run["pit"] is not None]
        density = [(SAMPLES + 1) * fmean(ranks) for ranks in zip(*pit, strict=True)]
        if not density:
            continue
        pits.stairs(density, edges, color=colours[name], label=names[name])
    pits.axhline(1, color="0.4", linewidth=1, linestyle="--")
    pits.set(
        title="rank of held-out targets among samples",
        xlabel="rank",
        ylabel="density",
        ylim=(0, None),
    )
    pits.legend(fontsize=7, frameon=False)

    for name, runs in judged.items():
        _bar(likelihoods, names[name], [run["nll"] for run in runs], colours[name])
        normal = [run["normal_nll"] for run in runs if run["normal_nll"] is not None]
        if normal:
            likelihoods.plot(
                [names[name]], [fmean(normal)], marker="_", markersize=24, color="black"
            )
    likelihoods.set(title="NLL, nats a coordinate (black: of a fitted normal)")

    for name, value in variants.items():
        for probe, hatch in (("linear", None), ("knn", "//")):
            shares = [100 * run["probes"][probe] for run in value["runs"]]
            _bar(accuracies, names[name], shares, colours[name], hatch=hatch, alpha=0.6)
    for probe, shares in results["untrained"].items():
        mean = 100 * fmean(shares)
        accuracies.axhline(mean, color="0.4", linewidth=1, linestyle="--")
        told = f"{'kNN' if probe == 'knn' else probe},\nuntrained\nencoder"
        right = (1.01, mean)  # of the axes, where no bar is
        place = accuracies.get_yaxis_transform()
        accuracies.annotate(told, right, xycoords=place, fontsize=7, va="center")
    accuracies.set(title="linear probe (plain) and kNN (hatched), %")
    for axes in (likelihoods, accuracies):
        axes.tick_params(axis="x", rotation=30, labelsize=7)
    save(figure, path)


def _bar(axes: Any, name: str, values: Sequence[float | None], colour: str, **style: Any) -> None:
    """The mean of what is known, and its range."""
    known = [value for value in values if value is not None]
    if not known:
        return
    mean = fmean(known)
    ends = [[mean - min(known)], [max(known) - mean]]
    axes.bar([name], [mean], yerr=ends, color=colour, capsize=3, **style)


if __name__ == "__main__":
    main()
