"""What a check is, and what it finds."""

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from enum import StrEnum

from peer.doctor.case import Case


class Verdict(StrEnum):
    """How bad a finding is: `WRONG` is what keeps a machine from joining, serving or using the swarm."""

    OK = "ok"
    WARNING = "warning"
    WRONG = "wrong"


@dataclass(frozen=True)
class Finding:
    """What a check has found: a sentence, and a mend where there is something to do."""

    verdict: Verdict
    sentence: str
    mend: str = ""


Findings = Sequence[Finding]


@dataclass(frozen=True)
class Check:
    """A check by the name that people and programs see."""

    name: str
    run: Callable[[Case], Awaitable[Findings]]


def ok(sentence: str) -> Finding:
    """Nothing to do."""
    return Finding(Verdict.OK, sentence)


def warning(sentence: str, mend: str = "") -> Finding:
    """Not as it should be, but it need not do harm."""
    return Finding(Verdict.WARNING, sentence, mend)


def wrong(sentence: str, mend: str) -> Finding:
    """To be mended."""
    return Finding(Verdict.WRONG, sentence, mend)
