"""What the data and evaluation modules say where an optional package is missing."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from jepa_fast.data import DigitScenes, ShardSource
from jepa_fast.data.digits import _digits
from jepa_fast.data.images import decode_image
from jepa_fast.eval import write_report

OPTIONAL = ("sklearn", "webdataset", "braceexpand", "PIL", "torchvision", "matplotlib", "jinja2")


@pytest.fixture
def blocked(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if none of the optional packages were installed."""
    for name in list(sys.modules):
        if name.partition(".")[0] in OPTIONAL:
            monkeypatch.delitem(sys.modules, name)
    for name in OPTIONAL:
        monkeypatch.setitem(sys.modules, name, None)


def test_importing_needs_no_optional_package() -> None:
    block = f"import sys; sys.modules.update(dict.fromkeys({OPTIONAL}))"
    code = f"{block}; import jepa_fast.data, jepa_fast.eval"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[1])


@pytest.mark.usefixtures("blocked")
@pytest.mark.parametrize(
    ("use", "package"),
    [
        (lambda: DigitScenes(1), "sklearn"),
        (lambda: ShardSource("x-{0..1}.tar"), "braceexpand"),
        (lambda: decode_image(b"", "x"), "PIL"),
        (lambda: write_report(Path("never"), title="x"), "jinja2"),
    ],
)
def test_a_missing_package_names_the_extra(use: Callable[[], object], package: str) -> None:
    _digits.cache_clear()
    with pytest.raises(ImportError, match=rf'needs {package}: pip install "jepa-fast\[train\]"'):
        use()
