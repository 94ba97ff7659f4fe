"""Which models this member gives to others, and what it has of each."""

from collections.abc import Callable
from dataclasses import dataclass

from protocol.errors import BadRequest
from protocol.records import MAX_SHARED, ModelId, SharedModel
from protocol.weights.fetch import Fetch
from protocol.weights.parts import Held


@dataclass(frozen=True)
class Shared:
    """One model."""

    model: ModelId
    held: Held
    fetch: Fetch | None = None
    """What brings more of it here."""

    def describe(self) -> SharedModel:
        """As it is announced."""
        held = int(self.held.manifest.sizes[self.held.holdings()].sum())
        progress = self.fetch.progress if self.fetch is not None else None
        left = progress.total - progress.done if progress is not None else 0
        rate = progress.rate if progress is not None else 0.0
        return SharedModel(
            model=self.model, manifest=self.held.manifest.hash, held=held, wanted=held + left, rate=round(rate)
        )


class Sharing:
    """The models that this member gives; `changed` is called when there is another."""

    def __init__(self, changed: Callable[[], None]):
        self._models: dict[str, Shared] = {}
        self._changed = changed

    def __len__(self) -> int:
        return len(self._models)

    @property
    def is_fetching(self) -> bool:
        """Whether one of them is on its way here."""
        return any(one.fetch is not None and one.fetch.progress is not None for one in self._models.values())

    def add(self, shared: Shared) -> None:
        """Give a model from now on, or another state of one."""
        self._models[shared.held.manifest.hash] = shared
        self._changed()

    def remove(self, manifest: bytes) -> None:
        """Give a model no more."""
        if self._models.pop(manifest.hex(), None) is not None:
            self._changed()

    def find(self, manifest: bytes) -> Held:
        """What is here of a model. Raises `BadRequest` for one that is not given."""
        shared = self._models.get(manifest.hex())
        if shared is None:
            raise BadRequest(f"This member does not give the model {manifest.hex()[:12] or '(none)'}….")
        return shared.held

    def describe(self) -> tuple[SharedModel, ...]:
        """All of them, as they are announced: the newest where there are too many."""
        return tuple(one.describe() for one in list(self._models.values())[-MAX_SHARED:])
