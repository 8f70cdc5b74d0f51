"""What the README shows, runs."""

from __future__ import annotations

import re
from pathlib import Path

import yaml

README = Path(__file__).resolve().parents[1] / "README.md"


def _blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", README.read_text(), re.DOTALL | re.MULTILINE)


def test_python_examples_run_one_after_another() -> None:
    names: dict[str, object] = {}
    for number, block in enumerate(_blocks("python"), 1):
        exec(compile(block, f"README.md, example {number}", "exec"), names)
    assert number >= 3


def test_yaml_examples_are_configurations() -> None:
    from jepa_fast.train.config import parse_config

    assert _blocks("yaml")
    for block in _blocks("yaml"):
        parse_config({"output": "runs/own", **yaml.safe_load(block)})


def test_commands_name_recipes_that_exist() -> None:
    from jepa_fast.train.config import load_config

    commands = [line for block in _blocks("console") for line in block.splitlines()]
    runs = [line.partition("#")[0].split() for line in commands if " pretrain " in line]
    assert runs
    for words in runs:
        recipe, *rest = words[words.index("pretrain") + 1 :]
        load_config(recipe, [word for word in rest if not word.startswith("--")])
