"""How much was run together."""

from dataclasses import dataclass


@dataclass
class BatchCounts:
    """How many steps of generations, or training calls, were run, and in how many passes of the trunk."""

    items: int = 0
    passes: int = 0

    def count(self, items: int) -> None:
        """One more pass, with so many items."""
        self.items += items
        self.passes += 1
