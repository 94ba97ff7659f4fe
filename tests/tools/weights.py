"""Members that give a model's files over streams in memory, rightly or wrongly, and the network that a fetch sees."""

import asyncio
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import asynccontextmanager
from pathlib import Path

import torch

from peer.service.entrance import Entrance
from peer.service.weights import Weights
from peer.weights.sharing import Shared, Sharing
from peer.weights.uploads import Uploads
from protocol import swarm_pb2 as pb
from protocol.channel import Channel, Message
from protocol.errors import NoConnection, PeerUnreachable, SwarmError
from protocol.membership.handshake import Handshake
from protocol.model.checkpoint import open_checkpoint
from protocol.records import ModelId
from protocol.tensors import Limits
from protocol.weights.cache import Cache
from protocol.weights.fetch import Fetch
from protocol.weights.making import hold
from protocol.weights.parts import Held, Parts
from tests.tools.fuzzing.carrier import MemoryStream, connect

PATIENCE = 0.5
MODEL = ModelId(name="tiny", config_hash="0" * 32, num_blocks=5)


def hold_folder(folder: Path, kept: Path) -> Held:
    """All files of a model."""
    held = hold(open_checkpoint(str(folder)), kept)
    assert held is not None
    return held


class Giver:
    """A member that gives what it holds, each piece as `change` makes it."""

    def __init__(self, held: Held, rate: float = 1e12):
        self.held = held
        self.given: list[int] = []
        """The pieces that were asked for and sent, in order."""
        sharing, self.uploads = Sharing(lambda: None), Uploads(rate)
        sharing.add(Shared(MODEL, held))
        self.entrance = Entrance(Handshake("giver", None), Weights(sharing, self.uploads), Limits())
        read = self.uploads.read

        async def counted(held: Held, number: int) -> bytes:
            data = await read(held, number)
            self.given.append(number)
            return data

        self.uploads.read = counted  # type: ignore[method-assign]

    async def handle(self, stream: MemoryStream) -> None:
        await self.entrance.handle(stream)


class Liar(Giver):
    """Answers requests for pieces by `lie`: a message; `None`: it is silent; it raises `SwarmError`: it breaks off."""

    def __init__(self, held: Held, lie: Callable[[Held, int], Message | None]):
        super().__init__(held)
        self._lie = lie

    async def handle(self, stream: MemoryStream) -> None:
        channel = Channel(stream, Limits(), 60)
        try:
            while True:
                body = (await channel.receive_request()).body
                if isinstance(body, pb.ReadPiece):
                    self.given.append(body.number)
                    if (answer := self._lie(self.held, body.number)) is not None:
                        await channel.send(answer)
                elif isinstance(body, pb.ReadHoldings):
                    count = len(self.held.manifest.pieces)
                    await channel.send(piece(b"\xff" * ((count + 7) // 8), "holdings"))
                elif isinstance(body, pb.ReadManifest):
                    await channel.send(piece(b'{"files":[]}', "manifest"))
        except SwarmError:
            pass
        finally:
            stream.close()


def piece(data: bytes, name: str = "piece") -> Message:
    return Message(pb.Result(), {name: torch.frombuffer(bytearray(data), dtype=torch.uint8)})


def flipped(held: Held, number: int) -> Message:
    data = bytearray(held.read(number))
    data[len(data) // 2] ^= 1
    return piece(bytes(data))


def silent(held: Held, number: int) -> None:
    return None


class Dying:
    """Gives `count` pieces, and breaks off in the middle of the next."""

    def __init__(self, count: int):
        self.left = count

    def __call__(self, held: Held, number: int) -> Message:
        self.left -= 1
        if self.left < 0:
            raise PeerUnreachable("dead")
        return piece(held.read(number))


class MemorySwarm:
    """The members that give a model, by their IDs. What a `Fetch` takes for its network."""

    def __init__(self, members: dict[str, Giver], me: str = "me", shares: bool = False):
        self.members, self._me, self.shares = members, me, shares
        self._serving = set[asyncio.Task[None]]()

    def me(self) -> str:
        return self._me

    async def open(self, peer_id: str) -> Channel:
        if peer_id not in self.members:
            raise NoConnection(f"Peer {peer_id} is not there.")
        near, far = connect(self._me, peer_id)
        task = asyncio.create_task(self.members[peer_id].handle(far))
        self._serving.add(task)
        task.add_done_callback(self._serving.discard)
        return Channel(near, Limits(), PATIENCE)

    async def holders(self, manifest: str) -> list[str]:
        return [name for name in self.members if name != self._me]


@asynccontextmanager
async def fetching(
    held: Held, folder: Path, members: dict[str, Giver], size: int = 2**30, **options: object
) -> AsyncIterator[tuple[Parts, Fetch]]:
    """The parts of a model that are in a cache in `folder`, and what fetches more of them."""
    cache = Cache(folder, size)
    folder.mkdir(parents=True, exist_ok=True)
    parts = cache.open(held.manifest, MODEL)
    yield parts, Fetch(parts, "tiny", MemorySwarm(members, **options), cache)  # type: ignore[arg-type]
    cache.close()


def assert_equal_files(parts: Parts, folder: Path, numbers: Iterable[int]) -> None:
    """These pieces lie in the parts' files as in those of the folder, whose sizes are the same."""
    for number in numbers:
        one = parts.manifest.pieces[number]
        path = parts.find(one.file)
        assert path is not None
        ours, theirs = path.read_bytes(), (folder / one.file).read_bytes()
        assert len(ours) == len(theirs)
        assert ours[one.start : one.end] == theirs[one.start : one.end]
