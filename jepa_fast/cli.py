"""The command `jepa-fast`.

Exit codes: 0 done; 1 the run failed (collapsed, did not learn, not finite) or something is missing;
2 the command, recipe or an override is wrong; 128 + n stopped by signal n, a training after saving
(SIGTERM: 143), so that `jepa-fast pretrain ... && next` does not go on with half a run.
"""

from __future__ import annotations

import argparse
import logging
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jepa_fast.errors import BackendError, CheckpointError, DataError
from jepa_fast.perf import commands as perf_commands
from jepa_fast.perf.commands import audit, bench, compare
from jepa_fast.perf.errors import PerfError
from jepa_fast.train.errors import ConfigError, Interrupted, NonFiniteError

if TYPE_CHECKING:
    from jepa_fast.train.config import Config

DONE, FAILED, WRONG = 0, 1, 2
UNMEASURED = 7
"""Of the commands whose 1 says that something got worse: they could not do their work."""
REPORT_SEEDS = 3
_MEASURING = {
    "bench": (bench, "benchmarks: a table, a results file and a picture"),
    "audit": (audit, "what compiler and interpreter prove of GPU kernels without a GPU"),
    "compare": (compare, "time and memory against another version: a gate for CI"),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; returns its exit code."""
    parser = _parser()
    # argparse takes positional arguments in one run only; overrides may also follow the flags.
    options, more = parser.parse_known_args(arguments)
    if unknown := [each for each in more if each.startswith("-") or "overrides" not in options]:
        parser.error(f"unrecognized arguments: {' '.join(unknown)}")
    if more:
        options.overrides += more
    level = logging.INFO if _is_first() else logging.ERROR
    logging.basicConfig(level=level, format="%(message)s", stream=sys.stderr)
    try:
        return options.command(options)
    except ConfigError as error:
        print(f"jepa-fast: {error}", file=sys.stderr)
        return WRONG
    except PerfError as error:
        print(f"jepa-fast: {error}", file=sys.stderr)
        return error.exit_code
    except Interrupted as stopped:
        print(f"jepa-fast: {stopped}", file=sys.stderr)
        return 128 + stopped.signal_number
    except KeyboardInterrupt:  # before or after a training, or for the second time
        print("jepa-fast: stopped by SIGINT", file=sys.stderr)
        return 128 + signal.SIGINT
    except (
        BackendError,
        CheckpointError,
        DataError,
        NonFiniteError,
        ImportError,
        OSError,  # no such file, no permission, a full disk
    ) as error:
        print(f"jepa-fast: {error}", file=sys.stderr)
        return getattr(options, "failed", FAILED)
    except RuntimeError as error:  # torch raises it wherever the main process just is
        if not str(error).startswith("DataLoader worker"):
            raise
        from jepa_fast.data.loader import SHORT

        print(f"jepa-fast: {str(error).strip().rstrip('.')}, {SHORT}", file=sys.stderr)
        return FAILED


def _is_first() -> bool:
    """Whether this is the first of torchrun's processes: all have the same to say, one says it."""
    return os.environ.get("RANK", "0") == "0"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="jepa-fast",
        description="Train and evaluate joint-embedding predictive architectures.",
        epilog=(__doc__ or "").partition("\n\n")[2],
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    # Not `config.recipe_names`: help, and `info`, need torch alone.
    recipes = sorted(path.stem for path in (Path(__file__).parent / "recipes").glob("*.yaml"))
    pretrain = commands.add_parser(
        "pretrain",
        help="train a model by a recipe",
        epilog=f"packaged recipes: {', '.join(recipes)}",
        allow_abbrev=False,
    )
    pretrain.set_defaults(command=_pretrain)
    pretrain.add_argument("recipe", help="name of a packaged recipe, or a YAML file")
    # Without a default, argparse calls a missing one required.
    pretrain.add_argument(
        "overrides", nargs="*", default=[], metavar="key=value", help="such as train.lr.peak=1e-3"
    )
    start = pretrain.add_mutually_exclusive_group()
    start.add_argument(
        "--resume",
        nargs="?",
        const="",
        metavar="CHECKPOINT",
        help="continue bit for bit from the output folder's last.pt, or from CHECKPOINT, with the "
        "run's own configuration and the overrides given now",
    )
    start.add_argument(
        "--overwrite", action="store_true", help="replace an earlier run in the output folder"
    )
    pretrain.add_argument(
        "--dry-run", action="store_true", help="print the resolved configuration and stop"
    )
    pretrain.add_argument(
        "--report",
        action="store_true",
        help="afterwards do as `eval --report` does",
    )

    evaluate = commands.add_parser(
        "eval", help="probes of a checkpoint, and what its head is worth", allow_abbrev=False
    )
    evaluate.set_defaults(command=_eval)
    evaluate.add_argument("checkpoint", help="a checkpoint, or the output folder of a run")
    evaluate.add_argument(
        "overrides",
        nargs="*",
        default=[],
        metavar="key=value",
        help="such as data.val=/data/val.tar",
    )
    evaluate.add_argument(
        "--untrained-seeds",
        type=int,
        metavar="N",
        help=f"also probe the same encoder untrained, with N seeds (with --report: {REPORT_SEEDS})",
    )
    evaluate.add_argument(
        "--output",
        metavar="JSON",
        help="where results go (default: eval.json beside the checkpoint)",
    )
    evaluate.add_argument(
        "--report", action="store_true", help="also write report.html beside the results"
    )

    commands.add_parser(
        "info", help="what this machine can run, and why not the rest"
    ).set_defaults(command=_info)
    commands.add_parser("build", help="build the native kernels").set_defaults(command=_build)
    for name, (module, told) in _MEASURING.items():
        command = commands.add_parser(
            name, help=told, epilog=perf_commands.EXIT_CODES, allow_abbrev=False
        )
        module.configure(command)
        command.set_defaults(command=module.run, failed=UNMEASURED)
    return parser


def _pretrain(options: argparse.Namespace) -> int:
    from jepa_fast.train.config import load_config

    _check_backend()
    resume = options.resume
    if resume and "=" in resume and not os.path.exists(resume):
        # `--resume key=value`: argparse takes the override for the flag's optional value.
        options.overrides.append(resume)
        resume = ""
    config = load_config(options.recipe, options.overrides)
    if resume is not None:
        from jepa_fast.train.saved import resumed_config

        config = resumed_config(
            resume or config.output, config, options.overrides, recipe=options.recipe
        )
    if options.dry_run:
        return _dry_run(config)
    if options.report:
        from jepa_fast.eval.report import require_for_reports

        require_for_reports()
        if getattr(config.data, "val", "digits have theirs") is None:
            raise ConfigError(
                "data.val: expected images that --report tests the encoder on, got none; "
                "data.val=... names them, and without --report none are needed"
            )
    from jepa_fast.train.run import pretrain

    problems = pretrain(config, resume=resume, overwrite=options.overwrite)
    if options.report and _is_first():
        # The checkpoint's configuration is the one given here.
        _evaluate(config.output, [], REPORT_SEEDS, None, True, trusted=config.as_dict())
    for problem in problems:
        print(f"FAILED: {problem}", file=sys.stderr)
    return FAILED if problems else DONE


def _check_backend() -> None:
    """Raises ConfigError, as the first operator would, but before anything is read."""
    from jepa_fast.ops import BACKENDS

    backend = os.environ.get("JEPA_FAST_BACKEND") or "auto"
    if backend not in ("auto", *BACKENDS):
        raise ConfigError(
            f"JEPA_FAST_BACKEND: expected auto or one of {', '.join(BACKENDS)}, got {backend!r}"
        )


def _dry_run(config: Config) -> int:
    """Print the configuration, having built the model without its weights."""
    import torch
    import yaml

    from jepa_fast.train.build import build_model

    with torch.device("meta"):
        model = build_model(config)
    # With `steps`, only the data tell how many epochs they are.
    warning = None if config.train.steps else config.train.warmup_warning(config.train.epochs)
    if warning is not None:
        print(warning, file=sys.stderr)
    print(yaml.safe_dump(config.as_dict(), sort_keys=False), end="")
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    print(f"# {trained / 1e6:.2f}M trained parameters")
    return DONE


def _eval(options: argparse.Namespace) -> int:
    if not _is_first():  # it runs in one process, also where torchrun started several
        return DONE
    _check_backend()
    seeds = options.untrained_seeds
    if seeds is None:
        seeds = REPORT_SEEDS if options.report else 0
    _evaluate(options.checkpoint, options.overrides, seeds, options.output, options.report)
    return DONE


def _evaluate(
    checkpoint: str,
    overrides: list[str],
    seeds: int,
    output: str | None,
    report: bool,
    trusted: dict[str, Any] | None = None,
) -> None:
    from jepa_fast.train.evaluate import evaluate

    found = evaluate(
        checkpoint,
        overrides,
        untrained_seeds=seeds,
        output=output,
        report=report,
        trusted=trusted,
    )
    print(found)


def _info(options: argparse.Namespace) -> int:
    from jepa_fast.info import describe

    print(describe())
    return DONE


def _build(options: argparse.Namespace) -> int:
    from jepa_fast.ops._build import BuildError, build

    try:
        record = build()
    except BuildError as error:
        print(f"jepa-fast: {error}", file=sys.stderr)
        return FAILED
    for part in record.parts:
        print(f"built the {part} kernels")
    for part, why in record.why_not.items():
        print(f"no {part} kernels: {why}", file=sys.stderr)
    return DONE if record.parts else FAILED


if __name__ == "__main__":
    sys.exit(main())
