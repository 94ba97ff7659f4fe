"""How often work was done in one go."""

from dataclasses import dataclass


@dataclass
class Tally:
    """How many steps of generations, or training calls, were run, in how many calls of the trunk."""

    steps: int = 0
    calls: int = 0

    def count(self, steps: int) -> None:
        """One more call."""
        self.steps += steps
        self.calls += 1
