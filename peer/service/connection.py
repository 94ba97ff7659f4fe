"""The stream of one client: its channel and account, its session, and waiting for work that is done for it."""

import asyncio
from collections.abc import Callable, Coroutine, Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from peer.compute.scheduler import Priority, Scheduler
from peer.kv_cache.session import Session
from peer.service.quotas import Account
from protocol import swarm_pb2 as pb
from protocol.channel import Channel, Message

T = TypeVar("T")
Item = TypeVar("Item")

HEARTBEAT = 2.0
"""Seconds between the signs of life that a client gets while its answer is computed."""


@dataclass
class Connection:
    """One stream from one client, and the session that lives on it."""

    channel: Channel
    account: Account
    scheduler: Scheduler
    client: str = field(init=False)
    """The client's peer ID."""
    session: Session | None = None
    forks: list[bytes] = field(default_factory=list)
    """Tokens of the session's copies; those that nobody opened end with this stream."""

    def __post_init__(self) -> None:
        self.client = self.channel.remote

    async def compute(self, priority: Priority, work: Callable[[], T]) -> T:
        """The result of `work`, run on the compute thread."""
        return await self.with_signs_of_life(self.scheduler.submit(priority, work, self.client))

    async def compute_batched(
        self,
        priority: Priority,
        run: Callable[[list[Item]], Sequence[T | BaseException]],
        item: Item,
        group: Hashable | None,
        size: int,
    ) -> T:
        """What becomes of `item`, run on the compute thread along with its group; see `Scheduler.submit_batched`."""
        return await self.with_signs_of_life(
            self.scheduler.submit_batched(priority, run, item, self.client, group, size)
        )

    def with_signs_of_life(self, future: "asyncio.Future[T]", sign: pb.Working | None = None) -> Coroutine[Any, Any, T]:
        """See the function."""
        return with_signs_of_life(self.channel, future, sign)


async def with_signs_of_life(channel: Channel, future: "asyncio.Future[T]", sign: pb.Working | None = None) -> T:
    """The result of a future that may take a while. Meanwhile the client gets a sign of life now and then."""
    try:
        while True:
            await asyncio.wait({future}, timeout=HEARTBEAT)
            if future.done():
                return future.result()
            await channel.send(Message(sign or pb.Working()))
    except BaseException:
        future.cancel()
        raise
    finally:
        del future  # it has the error, whose traceback has this frame: a circle that would hold the call's memory
