"""What checks found, for CI: Markdown for a job's summary, JUnit XML for its tests."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ElementTree
from collections.abc import Sequence
from dataclasses import dataclass

_COLOR = re.compile(r"\x1b\[[0-9;]*m")
_NOT_OF_XML = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")
"""Characters that no XML may hold, not even escaped, and halves of some, which no UTF-8 may."""


@dataclass(frozen=True)
class Check:
    """One thing that was checked.

    Args:
        name: of it.
        ok: whether it passed.
        message: in a line, what was found.
        lines: whatever else there is to say.
        told: False where it passes because nothing could be told.
    """

    name: str
    ok: bool
    message: str = ""
    lines: tuple[str, ...] = ()
    told: bool = True


def verdict(checks: Sequence[Check]) -> str:
    """All checks in a line."""
    if not checks:
        return "nothing was checked"
    failed = sum(not check.ok for check in checks)
    text = f"{failed} of {len(checks)} got worse" if failed else "nothing got worse"
    unknown = sum(not check.told for check in checks)
    return f"{text}, {unknown} could not be told" if unknown else text


def markdown(
    title: str, checks: Sequence[Check], details: str = "", headline: str | None = None
) -> str:
    """A heading, the verdict, and a table of the checks, failed ones first.

    Args:
        title: without the `#`.
        checks: in the order to be shown.
        details: text of fixed width, folded away below.
        headline: instead of the verdict.
    """
    failed = [check for check in checks if not check.ok]
    passed = [check for check in checks if check.ok]
    text = [
        f"## {_plain(title)}",
        "",
        f"**{verdict(checks) if headline is None else headline}**",
        "",
    ]
    if checks:
        text += ["| | what | |", "|---|---|---|"]
        text += [
            f"| {_mark(check)} | {_cell(check.name)} | {_cell(_told(check))} |"
            for check in [*failed, *passed]
        ]
        text.append("")
    if details:
        text += [
            "<details><summary>all numbers</summary>",
            "",
            "```text",
            _plain(details),
            "```",
            "",
        ]
        text += ["</details>", ""]
    return "\n".join(text)


def _mark(check: Check) -> str:
    if not check.ok:
        return "**worse**"
    return "ok" if check.told else "?"


def _told(check: Check) -> str:
    return "<br>".join(each for each in (check.message, *check.lines) if each)


def _cell(text: str) -> str:
    return _plain(text).replace("|", "\\|").replace("\n", " ")


def _plain(text: str) -> str:
    """Without colours of a terminal; what else a file could not hold is named by its number."""
    return _NOT_OF_XML.sub(lambda found: ascii(found[0])[1:-1], _COLOR.sub("", text))


def junit(suite: str, checks: Sequence[Check]) -> str:
    """The checks as JUnit XML: a test case each, failures and skipped ones with their messages."""
    failures = sum(not check.ok for check in checks)
    root = ElementTree.Element("testsuites")
    counts = {"tests": str(len(checks)), "failures": str(failures), "errors": "0"}
    counts["skipped"] = str(sum(check.ok and not check.told for check in checks))
    parent = ElementTree.SubElement(root, "testsuite", {"name": suite, **counts})
    for check in checks:
        case = ElementTree.SubElement(parent, "testcase", classname=suite, name=_plain(check.name))
        text = _plain("\n".join(check.lines))
        message = _plain(check.message)
        if not check.ok:
            ElementTree.SubElement(case, "failure", message=message).text = text
        elif not check.told:
            ElementTree.SubElement(case, "skipped", message=message)
        elif text:
            ElementTree.SubElement(case, "system-out").text = text
    ElementTree.indent(root)
    return ElementTree.tostring(root, encoding="unicode", xml_declaration=True) + "\n"
