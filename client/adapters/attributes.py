"""Whether attributes of many objects have changed, asked at the speed of C.

Every decode step asks this about all adapters of a model, so it must not cost a call of Python's for each object.
"""

from collections.abc import Iterable
from itertools import repeat

import torch


class Attributes:
    """Attributes of objects, given as pairs of object and name, as they were when this was made.

    A list or a dict as a value is compared by what it holds. An attribute that is not there counts as `None`.
    """

    def __init__(self, watched: Iterable[tuple[object, str]]):
        pairs = list(watched)
        # Objects, not their `__dict__`: a module that is copied with this gets another dict than this would.
        self._owners, self._names = [owner for owner, _ in pairs], [name for _, name in pairs]
        values = map(getattr, self._owners, self._names, repeat(None))
        self._values = [_kept(value) for value in values]

    def changed(self) -> bool:
        """Whether any attribute is not as it was."""
        return list(map(getattr, self._owners, self._names, repeat(None))) != self._values

    def first_change(self) -> tuple[int, object, object]:
        """The number of the first pair that has changed, its value when this was made, and its value now."""
        now = map(getattr, self._owners, self._names, repeat(None))
        pairs = enumerate(zip(self._values, now, strict=True))
        return next((number, before, value) for number, (before, value) in pairs if before != value)


def _kept(value: object) -> object:
    """A value that stays as it is: PEFT keeps scaling factors as tensors for hot-swapping, and fills them in place."""
    if isinstance(value, dict):
        return {key: item.item() if isinstance(item, torch.Tensor) else item for key, item in value.items()}
    return value.copy() if isinstance(value, list) else value
