"""What checks found, for CI: Markdown for a job's summary, JUnit XML for its tests."""

from __future__ import annotations

import xml.etree.ElementTree as ElementTree
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Check:
    """One thing that was checked.

    Args:
        name: of it.
        ok: whether it passed.
        message: in a line, what was found.
        lines: whatever else there is to say.
    """

    name: str
    ok: bool
    message: str = ""
    lines: tuple[str, ...] = ()


def markdown(title: str, checks: Sequence[Check], details: str = "") -> str:
    """A heading, the verdict, and a table of the checks, failed ones first.

    Args:
        title: without the `#`.
        checks: in the order to be shown.
        details: text of fixed width, folded away below.
    """
    failed = [check for check in checks if not check.ok]
    passed = [check for check in checks if check.ok]
    verdict = f"{len(failed)} of {len(checks)} got worse" if failed else "nothing got worse"
    text = [f"## {title}", "", f"**{verdict}**", ""]
    if checks:
        text += ["| | what | |", "|---|---|---|"]
        text += [
            f"| {'ok' if check.ok else '**worse**'} | {_cell(check.name)} | {_cell(_told(check))} |"
            for check in [*failed, *passed]
        ]
        text.append("")
    if details:
        text += ["<details><summary>all numbers</summary>", "", "```text", details, "```", ""]
        text += ["</details>", ""]
    return "\n".join(text)


def _told(check: Check) -> str:
    return "<br>".join(each for each in (check.message, *check.lines) if each)


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


def junit(suite: str, checks: Sequence[Check]) -> str:
    """The checks as JUnit XML: a test case each, failures with their messages."""
    failures = sum(not check.ok for check in checks)
    root = ElementTree.Element("testsuites")
    counts = {"tests": str(len(checks)), "failures": str(failures), "errors": "0"}
    parent = ElementTree.SubElement(root, "testsuite", {"name": suite, **counts})
    for check in checks:
        case = ElementTree.SubElement(parent, "testcase", classname=suite, name=check.name)
        text = "\n".join(check.lines)
        if not check.ok:
            ElementTree.SubElement(case, "failure", message=check.message).text = text
        elif text:
            ElementTree.SubElement(case, "system-out").text = text
    ElementTree.indent(root)
    return ElementTree.tostring(root, encoding="unicode", xml_declaration=True) + "\n"
