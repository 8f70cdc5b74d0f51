"""The README's tables, from the results under benchmarks/results and nothing else.

`python benchmarks/tables.py` (`make tables`) writes anew what stands in README.md between

    <!-- table: NAME -->
    <!-- end of table -->

and `--check` shows what would change instead, with exit code 1 if anything would. NAME is one of
`TABLES`; some take a machine, as in `<!-- table: operators nvidia-h100 -->`, which is the name of
its results file. Needs the standard library alone.
"""

from __future__ import annotations

import argparse
import difflib
import json
import math
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from decimal import ROUND_HALF_UP, Decimal
from pathlib import Path
from statistics import fmean
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
if str(ROOT) not in sys.path:  # started as a script, in a checkout that is not installed
    sys.path.append(str(ROOT))

from jepa_fast.perf.files import write_text  # noqa: E402

_BEGIN = re.compile(r"<!--\s*table:\s*(.*?)\s*-->")
_END = "<!-- end of table -->"
_ROUNDS = 30


class TableError(Exception):
    """The README or a result is not as it has to be; says where and what to do."""


class Results:
    """The committed results below a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def read(self, name: str) -> Any:
        """The result in the file `name`.

        Raises:
            TableError: there is no such file, or it is not JSON.
        """
        path = self.folder / name
        try:
            return json.loads(path.read_text())
        except FileNotFoundError as error:
            raise TableError(
                f"there is no result {path}: commit it, or take the table's markers out"
            ) from error
        except ValueError as error:
            raise TableError(f"{path} is not JSON: {error}") from error

    def names(self, pattern: str) -> list[str]:
        """Files that match, in order.

        Raises:
            TableError: there are none.
        """
        found = sorted(str(path.relative_to(self.folder)) for path in self.folder.glob(pattern))
        if not found:
            raise TableError(
                f"there is no result {self.folder / pattern}: commit it, or take the table's "
                "markers out"
            )
        return found


# What the README shows


def demo(results: Results) -> list[str]:
    """Probes of the demo, trained and untrained."""
    probes = results.read("recipes/demo.json")["probes"]
    seeds = {len(probe["untrained"]) for probe in probes.values()}
    told = {
        "knn": "kNN, class of the scene",
        "linear": "linear, class of the scene",
        "patch": "linear, digit behind a patch",
    }
    rows = []
    for name, probe in probes.items():
        gain = 100 * (probe["trained"] - fmean(probe["untrained"]))
        rows.append(
            [
                told[name],
                _percent(probe["trained"], ties_up=True),
                _mean_and_range(probe["untrained"], ties_up=True),
                f"{gain:+.1f} points",
            ]
        )
    return _table(["probe", "trained", f"untrained, {_one(seeds)} seeds", "gain"], rows)


_CIFAR10 = (
    "ijepa",
    "tcjepa",
    "prob_mixture",
    "prob_autoregressive",
    "prob_flow",
    "prob_diffusion",
    "tijepa",
)


def cifar10(results: Results) -> list[str]:
    """Probes and speed of the CIFAR-10 recipes."""
    rows = []
    for name in _CIFAR10:
        result = results.read(f"recipes/cifar10_{name}.json")
        row = [f"`cifar10_{name}`", f"{result['epochs']:g}"]
        for probe in ("knn", "linear"):
            found = result["probes"][probe]
            row += [_mean_and_range(found["untrained"]), _percent(found["trained"])]
        speed = result["images_per_second"]  # None: of another machine than the others'
        rows.append([*row, "-" if speed is None else f"{speed:.0f}"])
    heads = ["recipe", "epochs", "kNN, untrained", "kNN", "linear, untrained", "linear"]
    return _table([*heads, "images/s, 2 cores"], rows)


_LEARNING = {
    "ijepa": "I-JEPA",
    "tcjepa": "TC-JEPA",
    "no_regularisers": "without regularisers",
    "one_layer": "text after the first block only",
    "one_caption": "one caption an image",
    "append": "words appended to the sequence",
}


def learning(results: Results) -> list[str]:
    """TC-JEPA, what it is made of, and I-JEPA: prediction loss and probes."""
    variants = results.read("recipes/learning.json")["variants"]
    rows = []
    for name, told in _LEARNING.items():
        losses = [run["prediction_loss"] for run in variants[name]]
        row = [told, f"{fmean(losses):.2f} ({min(losses):.2f} to {max(losses):.2f})"]
        for probe in ("patch", "linear", "knn"):
            row.append(_mean_and_range([run["probes"][probe] for run in variants[name]]))
        rows.append(row)
    heads = ["", "prediction loss", "digit behind a patch, linear", "scene, linear", "scene, kNN"]
    return _table(heads, rows)


HEAD_NAMES = {
    "ijepa": "I-JEPA, deterministic",
    "mixture": "mixture, joint",
    "mixture_coordinate": "mixture, per coordinate",
    "autoregressive": "autoregressive",
    "flow": "coupling flow",
    "diffusion": "diffusion",
    "flow_matching": "flow matching",
}


def heads(results: Results) -> list[str]:
    """The probabilistic heads beside each other, and beside I-JEPA."""
    result = results.read("recipes/heads.json")
    rows = []
    untrained = result["untrained"]
    row = ["encoder without training", *(_mean_and_range(untrained[p]) for p in ("knn", "linear"))]
    rows.append([*row, *9 * ["-"]])
    for name, variant in result["variants"].items():
        runs, costs = variant["runs"], variant["costs"]
        row = [HEAD_NAMES.get(name, name)]
        row += [
            _mean_and_range([run["probes"][probe] for run in runs]) for probe in ("knn", "linear")
        ]
        row.append(f"{fmean(run['target_rank'] for run in runs):.0f}")
        row.append(f"{costs['parameters'] / 1e6:.2f} M")
        row += _described(runs) if "nll" in runs[0] else 4 * ["-"]
        row.append(f"{costs['images_per_second']:.0f}")
        row.append(f"{costs['step_bytes'] / 2**20:.0f} MiB")
        latency = costs["sample_microseconds"]
        row.append("-" if latency is None else _microseconds(latency))
        rows.append(row)
    heads = ["", "kNN", "linear", "effective rank of targets", "parameters of predictor and head"]
    return _table(
        [*heads, *_DESCRIBED, "images/s", "memory of a step", "a sample of a token"], rows
    )


_DESCRIBED = (
    "NLL, nats a coordinate",
    "better than a normal by",
    "targets within central 50 / 80 / 95 %",
    "spread of samples",
)


_NOT_FINITE = "not finite"


def _described(runs: Sequence[Mapping[str, Any]]) -> list[str]:
    """How well a head's distributions describe held-out targets: the columns of `_DESCRIBED`."""
    nll, normal, coverage, diversity = (
        None if any(run[key] is None for run in runs) else [run[key] for run in runs]
        for key in ("nll", "normal_nll", "coverage", "diversity")
    )
    row = [_NOT_FINITE if nll is None else f"{fmean(nll):.3f}"]
    row.append("-" if nll is None or normal is None else f"{fmean(normal) - fmean(nll):.2f}")
    if coverage is None:
        row.append("-")
    else:
        covered = (fmean(run[percent] for run in coverage) for percent in ("50", "80", "95"))
        row.append(" / ".join(f"{100 * share:.0f}" for share in covered) + " %")
    return [*row, _NOT_FINITE if diversity is None else f"{fmean(diversity):.2f}"]


def ablations(results: Results, *names: str) -> list[str]:
    """What the heads' options change.

    Args:
        names: of ablations: `<!-- table: ablations components timesteps -->`.
    """
    rows = []
    for ablation in names:
        for name, variant in results.read(f"recipes/heads_{ablation}.json")["variants"].items():
            runs, costs = variant["runs"], variant["costs"]
            row = [ablation, name, f"{costs['parameters'] / 1e6:.2f} M"]
            row.append(f"{fmean(run['target_rank'] for run in runs):.0f}")
            row += _described(runs)
            row.append(f"{costs['images_per_second']:.0f}")
            rows.append([*row, _microseconds(costs["sample_microseconds"])])
    heads = ["ablation", "", "parameters of predictor and head", "effective rank of targets"]
    return _table([*heads, *_DESCRIBED, "images/s", "a sample of a token"], rows)


def _microseconds(time: float) -> str:
    return f"{time:.3g} µs" if time < 1000 else f"{time:.0f} µs"


def public_ijepa(results: Results) -> list[str]:
    """The public I-JEPA code beside `cifar10_ijepa`."""
    public = results.read("recipes/public_ijepa.json")
    ours = results.read("recipes/cifar10_ijepa.json")
    probes = ours["probes"]
    seeds = _one({len(probe["untrained"]) for probe in probes.values()})
    slow, fast = public["images_per_second"]
    return _table(
        ["", "kNN", "linear", "images/s, 2 cores"],
        [
            ["public code, untrained", *map(_percent, public["untrained"].values()), ""],
            [
                "public code, trained",
                *map(_percent, public["trained"].values()),
                f"{slow} to {fast}",
            ],
            [
                f"`cifar10_ijepa`, untrained, {seeds} seeds",
                *(_mean_and_range(probes[name]["untrained"]) for name in ("knn", "linear")),
                "",
            ],
            [
                "`cifar10_ijepa`, trained",
                *(_percent(probes[name]["trained"]) for name in ("knn", "linear")),
                f"{ours['images_per_second']:.0f}",
            ],
        ],
    )


def operators(results: Results, machine: str = "") -> list[str]:
    """The operators on one machine, a row a case."""
    return _races([r for r in _records(results, machine) if not _is_step(r)], "case")


def steps(results: Results, machine: str = "") -> list[str]:
    """The models' whole training steps on one machine, a row a case."""
    records = _records(results, machine)
    return _races([r for r in records if _is_step(r) and r["operator"] != _PACKING], "step")


_PACKING = "packing_step"
_CONTEXTS = {
    "truncated": "cut to the shortest of the batch",
    "padded": "padded to the longest of the batch",
    "padded_static": "padded to the longest there can be",
    "packed_to_fit": "packed, a row as long as it takes",
    "ours": "packed, a row of fixed length",
}


def packing(results: Results, machine: str = "", case: str = "") -> list[str]:
    """What becomes of contexts of different lengths: tokens, flops and speed, by one case."""
    records = _records(results, machine)
    records = [r for r in records if (r["operator"], r["case"]) == (_PACKING, case)]
    if not records:
        raise TableError(f"the result has no {_PACKING} {case}")
    (record,) = records
    cut = record["providers"]["truncated"]["ratio"]
    rows = []
    for name, what in _CONTEXTS.items():
        of = record["numbers"][name]
        # Times over those of ours, both from the same rounds: what is left is the ratio of the two.
        ratio = 1.0 if name == "ours" else record["providers"][name]["ratio"]
        row = [what, *(f"{of[f'context_tokens_{kind}']:.1f}" for kind in ("used", "computed"))]
        row += [f"{of[f'{part}_flops'] / 1e9:.2f}" for part in ("encoder", "predictor", "step")]
        rows.append([*row, f"{cut / ratio:.2f}x"])
    heads = ["contexts", "context tokens an image, used", "computed"]
    heads += ["context encoder, GFLOP an image", "predictor", "step"]
    return _table([*heads, "images/s, of the first row's"], rows)


def _records(results: Results, machine: str) -> list[Any]:
    if not re.fullmatch(r"[a-z0-9][a-z0-9-]*", machine):
        raise TableError(
            f"{machine!r} is not a machine's name, as in `<!-- table: operators nvidia-h100 -->` "
            "for nvidia-h100.json"
        )
    result = results.read(f"{machine}.json")
    dirty = {run["id"] for run in result["runs"] if run["dirty"]}
    for record in result["records"]:
        name = f"{machine}.json: {record['operator']} {record['case']}"
        if record["quick"] or record["rounds"] < _ROUNDS:
            raise TableError(f"{name} is of {record['rounds']} rounds, in a quick run")
        if record["run"] in dirty:
            raise TableError(f"{name} is of uncommitted changes")
    return result["records"]


def _is_step(record: dict[str, Any]) -> bool:
    return record["operator"].endswith("_step")


def _races(records: Sequence[dict[str, Any]], what: str) -> list[str]:
    """Speed-ups over eager PyTorch, torch.compile and libraries, and over the best of them.

    On a CPU only ratios from one run count; on a GPU there are also times and shares.
    """
    if not records:
        raise TableError(f"the result has no {what}")
    (device,) = {record["device"] for record in records}
    heads = [what, "over eager", "over `torch.compile`", "over libraries", "over the best"]
    has_variants = any(record["variants"] for record in records)
    heads += ["variants of ours"] * has_variants + ["peak memory, of eager's"]
    if device == "cuda":
        heads += ["ms", "of the ceiling"]
    rows = []
    for record in records:
        providers = record["providers"]
        variants = record["variants"]
        known = {"ours", "eager", "compile", *variants}
        libraries = [name for name in providers if name not in known]
        headline = record["headline"]
        best = f"**{headline['ratio']:.2f}x** ({headline['against']})" if headline else "-"
        row = [
            f"`{record['operator']}` {record['case']}",
            _ratio(providers.get("eager")),
            _ratio(providers.get("compile")),
            _ratios(providers, libraries),
            best,
            *[_ratios(providers, variants)] * has_variants,
            _memory(providers["ours"], providers.get("eager")),
        ]
        if device == "cuda":
            share = record["share_of_ceiling"]
            of = "-" if share is None else f"{100 * share:.0f} % ({record['bound']})"
            row += [f"{providers['ours']['milliseconds']:.3g}", of]
        rows.append(row)
    return _table(heads, rows)


def _ratio(provider: dict[str, Any] | None) -> str:
    return "-" if provider is None or provider["ratio"] is None else f"{provider['ratio']:.2f}x"


def _ratios(providers: dict[str, Any], names: Sequence[str]) -> str:
    return ", ".join(f"{name} {_ratio(providers[name])}" for name in names) or "-"


def _memory(ours: dict[str, Any], eager: dict[str, Any] | None) -> str:
    if eager is None or not eager["peak_bytes"] or ours["peak_bytes"] is None:
        return "-"
    return f"{ours['peak_bytes'] / eager['peak_bytes']:.2f}x"


def growth(results: Results) -> list[str]:
    """Time and memory of text attention at sizes that double."""
    rows = []
    for told, providers in results.read("growth.json")["grows"].items():
        sizes = list(providers["ours"])
        row = [told, " / ".join(sizes)]
        for name in ("ours", "eager"):
            found = [providers[name][size] for size in sizes]
            first = found[0]["seconds"]
            row.append(" / ".join(f"{each['seconds'] / first:.1f}" for each in found))
            row.append(" / ".join(f"{each['bytes'] / 2**20:.1f}" for each in found) + " MiB")
        rows.append(row)
    heads = ["what grows", "to", "time, of the first's", "peak memory"]
    return _table([*heads, "eager: time", "peak memory"], rows)


def power(results: Results) -> list[str]:
    """How often the regression gate notices a slow-down, and how large it measures it to be."""
    result = results.read("power.json")
    rows = []
    for row in result["rows"]:
        low, high = wilson(row["detected"], row["trials"])
        rows.append(
            [
                f"{100 * row['slowdown']:g} %" if row["slowdown"] else "none",
                f"{row['detected']} of {row['trials']}",
                f"{100 * low:.1f} to {100 * high:.1f} %",
                f"{100 * row['median_estimate']:+.1f} %",
                f"{row['median_seconds']:.0f} s",
            ]
        )
    headings = ["slow-down", "noticed", "95 % interval", "measured, median", "a comparison takes"]
    return _table(headings, rows)


def audit(results: Results, *words: str) -> list[str]:
    """What compiled kernels take, a row a kernel, configuration and chip.

    Args:
        words: what to show, by Triton's version (the newest otherwise), chips and compilers:
            `<!-- table: audit 3.9 sm_90 triton -->`.
    """
    versions = [word for word in words if re.fullmatch(r"\d+\.\d+", word)]
    kernels = _audit(results, *versions)["kernels"]
    if kernels is None:
        raise TableError("that audit left the compiled kernels out: run it with them")
    for kind in ("chip", "compiler"):
        known = {kernel[kind] for kernel in kernels}
        if wanted := known.intersection(words):
            kernels = [kernel for kernel in kernels if kernel[kind] in wanted]
        words = tuple(word for word in words if word not in known)
    if unknown := [word for word in words if word not in versions]:
        raise TableError(f"nothing in the audit is called {', '.join(unknown)}")
    rows = []
    for kernel in kernels:
        mix = kernel["instructions"]
        occupancy = kernel["occupancy"]
        rows.append(
            [
                f"`{kernel['name']}`",
                kernel["chip"],
                str(kernel["registers"]),
                f"{kernel['shared']:,} B",
                "?" if occupancy is None else f"{100 * occupancy:.0f} %",
                _spills(kernel),
                _widths(mix["loads"], mix["tma"], stores=False),
                _widths(mix["stores"], mix["tma"], stores=True),
            ]
        )
    heads = ["kernel", "chip", "registers", "shared memory", "occupancy", "spills"]
    return _table([*heads, "loads", "stores"], rows)


def traffic(results: Results, version: str = "*") -> list[str]:
    """What calls move against the least that they have to, by the audit with Triton `version`."""
    calls = _audit(results, version)["traffic"]
    if calls is None:
        raise TableError("that audit left the traffic out: run it with it")
    rows = []
    for call in calls:
        row = [f"`{call['name']}`", str(_total(call, "launches"))]
        row.append(str(sum(call["torch_operations"].values())))
        for way in ("read", "written"):
            asked, distinct = _total(call, way), _total(call, f"{way}_unique")
            row += _moved(asked, distinct, call[f"minimum_{way}"])
        rows.append(row)
    heads = ["call", "launches", "PyTorch's"]
    for way in ("read", "written"):
        heads += [f"least {way}", way, f"{way}, a byte once"]
    return _table(heads, rows)


def _audit(results: Results, version: str = "*") -> Any:
    names = results.names(f"audit/triton-{version}.json")
    newest = max(names, key=lambda name: [int(part) for part in re.findall(r"\d+", name)])
    return results.read(newest)


def _spills(kernel: dict[str, Any]) -> str:
    mix = kernel["instructions"]
    accesses, stack = mix["local_loads"] + mix["local_stores"], kernel["stack"] + kernel["local"]
    return f"{accesses} ({stack} B)" if accesses or stack else "none"


def _widths(widths: dict[str, int], bulk: dict[str, int], stores: bool) -> str:
    """Bytes that a thread moves at once, widest first, and bulk copies. (JSON's keys are text.)"""
    found = [f"{width} B x {widths[width]}" for width in sorted(widths, key=int, reverse=True)]
    found += [f"{name} x {count}" for name, count in bulk.items() if ("ST" in name) == stores]
    return ", ".join(found) or "none"


def _total(call: dict[str, Any], number: str) -> int:
    return sum(moved[number] for moved in call["kernels"].values())


def _moved(asked: int, distinct: int, least: int | None) -> list[str]:
    """The least, and multiples of it; bytes where there is no least to divide by."""
    if not least:
        return ["?" if least is None else "0 B", f"{asked:,} B", f"{distinct:,} B"]
    return [f"{least:,} B", f"{asked / least:.2f}x", f"{distinct / least:.2f}x"]


TABLES: dict[str, Callable[..., list[str]]] = {
    "demo": demo,
    "learning": learning,
    "cifar10": cifar10,
    "heads": heads,
    "ablations": ablations,
    "public_ijepa": public_ijepa,
    "operators": operators,
    "steps": steps,
    "packing": packing,
    "growth": growth,
    "power": power,
    "audit": audit,
    "traffic": traffic,
}
"""Generators by name: called with the results and the marker's further words."""


# The README


def render(readme: str, results: Results) -> str:
    """The README with every table as the results have it.

    Raises:
        TableError: a marker that names no table or has no end, or a result that is missing.
    """
    lines = readme.splitlines()
    kept: list[str] = []
    place = 0
    while place < len(lines):
        line = lines[place]
        kept.append(line)
        place += 1
        if line.strip() == _END:
            raise TableError(f"line {place}: {_END} without a table's beginning")
        begin = _BEGIN.fullmatch(line.strip())
        if begin is None:
            continue
        start = place
        while place < len(lines) and lines[place].strip() != _END:
            if _BEGIN.fullmatch(lines[place].strip()):
                break
            place += 1
        if place == len(lines) or lines[place].strip() != _END:
            raise TableError(f"line {start}: the table {begin[1]!r} has no {_END}")
        try:
            kept += ["", *_generate(begin[1], results), "", lines[place]]
        except TableError as error:
            raise TableError(f"line {start}: table {begin[1]!r}: {error}") from error
        place += 1
    return "\n".join(kept) + "\n"


def _generate(marker: str, results: Results) -> list[str]:
    name, *words = marker.split() or [""]
    if name not in TABLES:
        raise TableError(f"there is no such table; there are: {', '.join(TABLES)}")
    try:
        return TABLES[name](results, *words)
    except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
        raise TableError(
            f"cannot be made of its result: {type(error).__name__}: {error}"
        ) from error


def wilson(successes: int, trials: int) -> tuple[float, float]:
    """The 95 % interval of a share by Wilson's score, which holds near 0 and 1, too."""
    if not 0 <= successes <= trials or trials == 0:
        raise ValueError(f"expected 0 <= successes <= trials, trials > 0, got {successes}/{trials}")
    z = 1.959963984540054
    share = successes / trials
    middle = share + z**2 / (2 * trials)
    half = z * math.sqrt(share * (1 - share) / trials + z**2 / (4 * trials**2))
    scale = 1 + z**2 / trials
    return max(0.0, (middle - half) / scale), min(1.0, (middle + half) / scale)


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    for row in rows:
        if len(row) != len(heads):
            raise ValueError(f"expected {len(heads)} cells, got {len(row)}")
    # A cell without text gets one space, as one would write it.
    lines = ["| " + " | ".join(cells) + " |" for cells in (heads, *rows)]
    lines = [line.replace("|  |", "| |").replace("|  |", "| |") for line in lines]
    return [lines[0], "|" + "---|" * len(heads), *lines[1:]]


def _percent(share: float, ties_up: bool = False) -> str:
    """`"78.5 %"`. `ties_up` rounds what `jepa-fast eval` prints, which has two digits; of so many
    images as are probed here, one share in two is a tie then.
    """
    if ties_up:
        printed = Decimal(f"{100 * share:.2f}")
        return f"{printed.quantize(Decimal('0.1'), ROUND_HALF_UP)} %"
    return f"{share:.1%}".replace("%", " %")


def _mean_and_range(shares: Sequence[float], ties_up: bool = False) -> str:
    mean, low, high = (_percent(x, ties_up) for x in (fmean(shares), min(shares), max(shares)))
    return f"{mean} ({low.removesuffix(' %')} to {high.removesuffix(' %')})"


def _one(values: set[int]) -> int:
    if len(values) != 1:
        raise ValueError(f"expected as many seeds for every probe, got {sorted(values)}")
    return values.pop()


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit codes: 0 done, or nothing to change; 1 `--check` found a difference; 2 an error."""
    parser = argparse.ArgumentParser(description="Write the README's tables from the results.")
    parser.add_argument(
        "--check", action="store_true", help="show what would change, write nothing"
    )
    parser.add_argument("--readme", type=Path, default=ROOT / "README.md")
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results")
    options = parser.parse_args(arguments)
    try:
        before = options.readme.read_text()
        after = render(before, Results(options.results))
    except (OSError, TableError) as error:
        print(f"{options.readme.name}: {error}", file=sys.stderr)
        return 2
    if before == after:
        return 0
    if not options.check:
        write_text(options.readme, after)
        return 0
    difference = difflib.unified_diff(
        before.splitlines(), after.splitlines(), "README.md", "from the results", lineterm=""
    )
    print("\n".join(difference))
    print("The README's tables are not those of the results: run `make tables`.", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
