"""What the README shows, runs."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

README = Path(__file__).resolve().parents[1] / "README.md"


def _blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", README.read_text(), re.DOTALL | re.MULTILINE)


@pytest.mark.parametrize("number", range(len(_blocks("python"))))
def test_python_examples_run(number: int) -> None:
    exec(compile(_blocks("python")[number], f"README.md, example {number}", "exec"), {})


def test_commands_name_recipes_that_exist() -> None:
    from jepa_fast.train.config import load_config

    commands = [line for block in _blocks("console") for line in block.splitlines()]
    runs = [line.partition("#")[0].split() for line in commands if " pretrain " in line]
    assert runs
    for words in runs:
        recipe, *rest = words[words.index("pretrain") + 1 :]
        load_config(recipe, [word for word in rest if not word.startswith("--")])
