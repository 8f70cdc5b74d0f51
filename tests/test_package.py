"""What `import jepa_fast` costs and needs."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import jepa_fast
from jepa_fast import perf

OPTIONAL = (
    "flash_attn",
    "jinja2",
    "matplotlib",
    "nvtx",
    "PIL",
    "pydantic",
    "sklearn",
    "tensorboard",
    "timm",
    "torchvision",
    "tqdm",
    "transformers",
    "triton",
    "webdataset",
    "xformers",
    "yaml",
)


def _python(program: str) -> str:
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_import_brings_in_nothing_but_torch() -> None:
    """What is fast about the import is what it leaves out: no module that torch had not loaded."""
    new = _python(
        "import sys, torch; before = set(sys.modules)\n"
        "import jepa_fast\n"
        "print(*sorted({name.partition('.')[0] for name in set(sys.modules) - before}))"
    ).split()
    assert set(new) - set(sys.stdlib_module_names) == {"jepa_fast"}


def test_everything_public_imports_without_the_optional_packages() -> None:
    """A package that is blocked is one that the operators, masks and models do without."""
    _python(
        f"import sys; sys.modules.update(dict.fromkeys({OPTIONAL!r}))\n"
        "import jepa_fast\n"
        "for name in jepa_fast.__all__: getattr(jepa_fast, name)\n"
        "import torch\n"
        "x = torch.arange(6.).view(1, 3, 2)\n"
        "assert jepa_fast.ops.gather_patches(x, torch.tensor([[2]])).tolist() == [[[4., 5.]]]\n"
        "jepa_fast.IJepa('vit_tiny_patch16', img_size=32)"
    )


@pytest.mark.parametrize("name", jepa_fast.__all__)
def test_public_names_exist_and_are_documented(name: str) -> None:
    value = getattr(jepa_fast, name)
    assert name == "__version__" or value.__doc__
    assert name in dir(jepa_fast)


@pytest.mark.parametrize(
    "path",
    [
        "jepa_fast.data.HashedWords",
        "jepa_fast.eval.score_head",
        "jepa_fast.host_memory.keep_host_memory",
        "jepa_fast.models.vicreg.VICREG_WEIGHTS",
        "jepa_fast.nn.heads.Head",
        "jepa_fast.nn.words.quantize_words",
        "jepa_fast.optim.AdamWEma",
        "jepa_fast.train.build.load_model",
    ],
)
def test_paths_of_the_documentation_need_no_import_but_that_of_the_package(path: str) -> None:
    """Asked of `__getattr__`: what other tests have imported is there in any case."""
    *modules, name = path.split(".")[1:]
    found: Any = jepa_fast
    for module in modules:
        found = found.__getattr__(module)
    assert hasattr(found, name)


def test_all_names_leave_those_of_torch_and_python_alone() -> None:
    assert {"eval", "nn", "optim"}.isdisjoint(jepa_fast.__all__)
    assert {"eval", "nn", "optim"} <= set(dir(jepa_fast))


def test_unknown_names_raise() -> None:
    with pytest.raises(AttributeError, match="no attribute 'IJEPA'"):
        _ = jepa_fast.IJEPA
    with pytest.raises(AttributeError, match=r"'jepa_fast.nn' has no attribute 'word'"):
        _ = jepa_fast.nn.word
    assert {"heads", "words"} <= set(dir(jepa_fast.nn))


def test_type_checkers_see_what_perf_loads_at_first_use() -> None:
    """As Any, its decorator would be an error under `mypy --strict`."""
    source = Path(perf.__file__).read_text()
    (block,) = (each for each in ast.parse(source).body if isinstance(each, ast.If))
    seen = {
        alias.asname: f"{each.module}.{alias.name}"
        for each in block.body
        if isinstance(each, ast.ImportFrom)
        for alias in each.names
    }
    expected = {name: f"jepa_fast.perf.{module}.{name}" for name, module in perf._PUBLIC.items()}
    expected |= {name: f"jepa_fast.ranges.{name}" for name in perf._RANGES}
    assert seen == expected
