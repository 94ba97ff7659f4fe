"""What the data of a run holds that is read otherwise than it stands there, or not at all: counted, for the plan."""

from collections import Counter

_SHOWN = 6
"""Things of one kind that are named; the rest are counted only."""


class Notes:
    """Counts what is worth a line of the plan. Nothing of it stops a run; a user should have seen it."""

    def __init__(self) -> None:
        self._kinds: dict[str, Counter[str]] = {}

    def count(self, kind: str, what: str) -> None:
        """One more record or message with `what`; `kind` heads the line."""
        self._kinds.setdefault(kind, Counter())[what] += 1

    def lines(self) -> tuple[tuple[str, str], ...]:
        """A line for each kind: its head, and what was counted, the most frequent first."""
        return tuple((kind, _listed(counts)) for kind, counts in self._kinds.items())


def _listed(counts: Counter[str]) -> str:
    named = ", ".join(f"{what} ({number:,})" for what, number in counts.most_common(_SHOWN))
    return named if len(counts) <= _SHOWN else f"{named}, and {len(counts) - _SHOWN:,} more"
