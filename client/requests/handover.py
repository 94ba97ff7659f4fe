"""Results that peers hand to each other: when they do, and what the client does where it fails.

Over links of d seconds one way, n spans answer after (n + 1) d instead of 2 n d. The peers' part of it is
`peer/service/handover.py`.
"""

import itertools
import logging
import secrets
import time
from collections.abc import Sequence

import torch

from client.swarm.routes import Hop
from client.swarm.swarm import Swarm
from protocol import swarm_pb2 as pb
from protocol.channel import PUSH_TOKEN_BYTES, Message
from protocol.errors import NotPushed, SwarmError

_GRACE = 1.0
"""Seconds after the answer of the peer before it in which a push to a peer must have arrived."""
logger = logging.getLogger(__name__)


def should_hand_over(swarm: Swarm, hops: Sequence[Hop]) -> bool:
    """Whether the peers of `hops` had better hand their results to each other."""
    if len(hops) < 2 or swarm.config.verify:  # what does not come by here cannot be computed again by others
        return False
    peers, health = [hop.peer.peer_id for hop in hops], swarm.health
    return max([health.round_trips.get(peer, 0.0) for peer in peers]) >= swarm.config.hand_over_above and not any(
        health.are_apart(one, other) or health.are_apart(other, one)  # a backward goes the other way
        for one, other in itertools.pairwise(peers)
    )


class Boundary:
    """Between two hops: the result of the one is pushed over it by its peer, or by the client where that peer cannot.

    `name`: of the tensor in the request to the second peer, which awaits it.
    """

    def __init__(self, swarm: Swarm, before: Hop, after: Hop, name: str):
        self.token = secrets.token_bytes(PUSH_TOKEN_BYTES)
        self.before, self.after = before, after
        self._swarm, self._name = swarm, name
        self._passed: torch.Tensor | None = None
        self._since = float("inf")

    async def passed(self, result: torch.Tensor | None, pushed: bool) -> None:
        """The peer before it has answered: with its result, unless that was pushed."""
        self._passed, self._since = result, time.monotonic()
        if not pushed:
            try:
                await self._help()
            except SwarmError as error:  # of the peer after it, which will be found out on its own stream
                logger.debug("a result could not be passed on: %s", error)

    async def on_working(self, sign: pb.Working) -> None:
        """The peer after it gives a sign of life. Raises `NotPushed` when a push is lost that is not held here."""
        if sign.waiting and time.monotonic() - self._since > _GRACE:
            await self._help()

    async def _help(self) -> None:
        self._swarm.health.could_not_reach(self.before.peer.peer_id, self.after.peer.peer_id)
        if self._passed is None:
            raise NotPushed(f"Peer {self.before.peer.peer_id} pushed a result that did not arrive.")
        async with self._swarm.connections.channel(self.after.peer.peer_id) as channel:
            await channel.send(Message(pb.Push(token=self.token), {self._name: self._passed}))
        self._since = float("inf")


def boundaries(swarm: Swarm, hops: Sequence[Hop], name: str) -> list[Boundary | None]:
    """The boundaries before and after each of `hops`, one more than hops: there is none before the first and after the
    last."""
    return [None, *(Boundary(swarm, *pair, name) for pair in itertools.pairwise(hops)), None]


def link(before: Boundary | None, after: Boundary | None, copy: bool) -> pb.HandOver:
    """What the peer between two boundaries is told. `copy`: it answers with its result too."""
    return pb.HandOver(
        awaits=before.token if before else b"",
        to=after.after.peer.peer_id if after else "",
        token=after.token if after else b"",
        copy=copy,
    )
