"""A model by its name, from the swarm: which of those that are offered, and the checkpoint of what is fetched."""

import asyncio
import json
import logging
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path

from protocol.errors import BadUsage, NoWeights
from protocol.model.checkpoint import Checkpoint, open_checkpoint
from protocol.records import ModelId, WeightsRecord
from protocol.weights.cache import Cache
from protocol.weights.fetch import Fetch, Network, fetch_manifest
from protocol.weights.files import write_whole
from protocol.weights.manifest import Manifest

logger = logging.getLogger(__name__)

_SHORT = 12
"""Letters of a manifest's hash that people are shown, and may type after NAME@."""


@dataclass(frozen=True)
class Offer:
    """A version of a model that some members give."""

    model: ModelId
    manifest: str
    holders: int
    whole: int
    """How many of the holders want no more of it, and are likely to have most."""

    @property
    def label(self) -> str:
        """NAME@HASH, as people may type it."""
        return f"{self.model.name}@{self.manifest[:_SHORT]}"


def offers(records: Iterable[WeightsRecord]) -> list[Offer]:
    """What is offered, that of most holders first."""
    given = [(record, one) for record in records for one in record.models]
    holders = Counter((one.model, one.manifest) for _, one in given)
    whole = Counter((one.model, one.manifest) for _, one in given if one.held and one.held >= one.wanted)
    found = [Offer(*key, count, whole[key]) for key, count in holders.items()]
    return sorted(found, key=lambda offer: (-offer.whole, -offer.holders, offer.manifest, offer.model.name))


class Pins:
    """Name -> the version that this machine uses under it, from its first use on. In a file of `folder`."""

    def __init__(self, folder: Path):
        self._path = folder / "pins.json"

    def get(self, name: str) -> str | None:
        """The hash of the manifest, if the name was used before."""
        found = self._read().get(name)
        return found if isinstance(found, str) else None

    def set(self, name: str, manifest: str | None) -> None:
        """Use this version from now on; `None`: forget the name. Raises `OSError`."""
        pins = {key: value for key, value in self._read().items() if key != name}
        if manifest is not None:
            pins[name] = manifest
        self._path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(self._path, json.dumps(pins, indent=1).encode())

    def _read(self) -> dict[str, object]:
        try:
            found = json.loads(self._path.read_bytes())
        except (OSError, ValueError):
            return {}
        return found if isinstance(found, dict) else {}


def choose(found: Iterable[Offer], asked: str, pins: Pins) -> Offer | None:
    """The offer to take for NAME, or NAME@HASH, if there is one; the user is told where there are others.

    Raises `BadUsage` where the name stands for another version than this machine has used under it.
    """
    found, name, version = list(found), asked, ""
    if all(offer.model.name != name for offer in found):
        name, _, version = asked.rpartition("@")
    named = [offer for offer in found if offer.model.name == name]
    if not named:
        return None
    versions: dict[str, Offer] = {}
    for offer in named:
        versions.setdefault(offer.manifest, offer)
    others = ", ".join(offer.label for offer in versions.values())
    if version:
        matching = [offer for offer in versions.values() if offer.manifest.startswith(version)]
        if len(matching) != 1:
            raise BadUsage(f"{asked} is not one of the versions that the swarm has; it has {others}.")
        return matching[0]
    pinned = pins.get(name)
    if pinned is not None and pinned not in versions:
        raise BadUsage(
            f"The swarm has {others}, and this machine has used {name}@{pinned[:_SHORT]} under that name; to change to "
            "another, give the name with its version."
        )
    chosen = versions[pinned] if pinned is not None else named[0]
    if len(versions) > 1:
        rest = ", ".join(offer.label for offer in versions.values() if offer is not chosen)
        logger.warning("using %s; the swarm has %s as well, by its whole name", chosen.label, rest)
    return chosen


class Obtained:
    """A model that is fetched from the swarm as it is needed: a `protocol.model.checkpoint.Source`."""

    def __init__(self, fetch: Fetch, model: ModelId, loop: asyncio.AbstractEventLoop):
        self.fetch, self.model, self.name = fetch, model, model.name
        self.label = f"{model.name}@{fetch.parts.manifest.hash[:_SHORT]}"
        self.digests: Mapping[str, str] = {file.name: file.digest for file in self.manifest.files if file.digest}
        self._loop = loop

    @property
    def manifest(self) -> Manifest:
        """What it consists of."""
        return self.fetch.parts.manifest

    def find(self, file: str) -> Path | None:
        """See `Source.find`."""
        return self.fetch.parts.find(file)

    def need(self, ranges: Mapping[str, Iterable[tuple[int, int]]]) -> None:
        """See `Source.need`. Not to be called on the event loop."""
        try:
            numbers = {
                number
                for file, spans in ranges.items()
                for start, end in spans
                for number in self.manifest.covering(file, start, end)
            }
        except KeyError as error:
            raise NoWeights(f"{self.label} has no file {error}.") from error
        future: Future[None] = asyncio.run_coroutine_threadsafe(self.fetch.run(numbers), self._loop)
        try:
            future.result()
        except BaseException:
            future.cancel()
            raise

    async def begin(self) -> None:
        """Have here what it takes to open the model: all but the weights, and of these the headers."""
        await self.fetch.run(await asyncio.to_thread(self._first))
        await self.fetch.run(await asyncio.to_thread(self._headers))

    def _first(self) -> list[int]:
        weights = self._weights()
        return [
            number
            for file, numbers in self.manifest.numbers.items()
            for number in (numbers[:1] if file in weights else numbers)
        ]

    def _headers(self) -> list[int]:
        places = {file: self.find(file) for file in self._weights()}
        return [
            number
            for file, path in places.items()
            if path is not None
            for number in self.manifest.covering(file, 0, _header_end(path))
        ]

    def _weights(self) -> list[str]:
        return [file.name for file in self.manifest.files if file.name.endswith(".safetensors")]

    def open(self) -> Checkpoint:
        """The checkpoint; what it lacks is fetched when it is read. Raises `UnsupportedModel`, `NoWeights`."""
        checkpoint = open_checkpoint(str(self.fetch.parts.folder), source=self)
        if checkpoint.model_id.config_hash != self.model.config_hash:
            raise NoWeights(f"What is given as {self.label} is another model than its record says, and is not used.")
        return checkpoint


def _header_end(path: Path) -> int:
    with path.open("rb") as file:
        return 8 + int.from_bytes(file.read(8), "little")


class Library:
    """The models that the swarm gives, and those that this machine has from it."""

    def __init__(self, network: Network, cache: Cache, pins: Pins):
        self._network, self.cache, self._pins = network, cache, pins

    async def offers(self) -> list[Offer]:
        """All that the swarm gives. Raises `PeerUnreachable`."""
        return offers(await self._network.look_up())

    async def find(self, name: str) -> Offer | None:
        """What the swarm has under NAME or NAME@HASH. Raises `BadUsage` as `choose`, `PeerUnreachable`."""
        return choose(await self.offers(), name, self._pins)

    async def obtain(self, offer: Offer, opened: Callable[["Obtained"], None] = lambda _: None) -> Obtained:
        """Begin to fetch; see `Obtained.begin`. `opened` is called before. Raises `NoWeights`, `BadUsage`: no room."""
        known = self.cache.manifest(offer.manifest)
        manifest = known if known is not None else await fetch_manifest(self._network, offer.manifest)
        return await self._begin(manifest, offer.model, opened)

    async def reopen(self, folder: Path, opened: Callable[["Obtained"], None] = lambda _: None) -> Obtained | None:
        """What a folder of the cache is of; `None` for any other folder."""
        known = self.cache.find(folder)
        return await self._begin(*known, opened) if known else None

    async def _begin(self, manifest: Manifest, model: ModelId, opened: Callable[["Obtained"], None]) -> Obtained:
        try:
            parts = self.cache.open(manifest, model)
            self._pins.set(model.name, manifest.hash)
        except OSError as error:
            raise BadUsage(f"{self.cache.root} cannot be written ({error.strerror}); see $HIVETUNE_CACHE.") from error
        fetch = Fetch(parts, model.name, self._network, self.cache)
        obtained = Obtained(fetch, model, asyncio.get_running_loop())
        opened(obtained)
        await obtained.begin()
        return obtained
