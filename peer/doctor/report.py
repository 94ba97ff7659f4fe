"""What is shown of an examination: lines for people, plain data for programs."""

from collections.abc import Iterable, Iterator
from typing import Any

from rich.text import Text

from peer.doctor.check import Check, Finding, Findings, Verdict

_MARKS = {Verdict.OK: ("✓", "green"), Verdict.WARNING: ("!", "yellow"), Verdict.WRONG: ("✗", "bold red")}
_WIDTH = 12
"""Columns for a check's name."""


def lines(check: Check, found: Findings, is_terminal: bool) -> Iterator[Text]:
    """A check's findings: with marks on a terminal, with words elsewhere."""
    width = 1 if is_terminal else 7
    for number, finding in enumerate(found):
        mark, style = _MARKS[finding.verdict]
        text = Text(mark if is_terminal else f"{finding.verdict.value:{width}}", style=style)
        name = check.name if number == 0 or not is_terminal else ""
        yield text.append(f" {name:{_WIDTH}}", style="bold").append(finding.sentence, style="default")
        if finding.mend:
            yield Text(f"{'':{width + 1 + _WIDTH}}→ {finding.mend}", style="default")


def summary(found: Iterable[Finding]) -> str:
    """The last line."""
    counts = dict.fromkeys(Verdict, 0)
    for finding in found:
        counts[finding.verdict] += 1
    if counts[Verdict.WRONG]:
        return f"{counts[Verdict.WRONG]} thing(s) wrong: begin with the first of them."
    if counts[Verdict.WARNING]:
        return f"Nothing is wrong; {counts[Verdict.WARNING]} thing(s) could be better."
    return "All is well."


def as_json(findings: Iterable[tuple[Check, Finding]]) -> dict[str, Any]:
    """`{"well": bool, "findings": [{"check", "verdict": "ok" | "warning" | "wrong", "sentence", "mend"}, ...]}`."""
    listed = [
        {"check": check.name, "verdict": one.verdict.value, "sentence": one.sentence, "mend": one.mend}
        for check, one in findings
    ]
    return {"well": all(one["verdict"] != Verdict.WRONG for one in listed), "findings": listed}
