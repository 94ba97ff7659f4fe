"""Keeping up with a private swarm: news are passed on, rosters compared, our own certificate renewed in time."""

import asyncio
import logging
import random
import time
from collections.abc import Callable, Collection
from typing import Any, TypeVar

from google.protobuf.message import Message
from hivemind.p2p import PeerID

from bootstrap.membership.gate import Gate
from bootstrap.membership.own import OwnMembership
from protocol.errors import BadUsage, NotAMember
from protocol.membership import membership_pb2 as pb
from protocol.name import NAME

SYNC, RENEW = f"{NAME}.membership.sync", f"{NAME}.membership.renew"
"""What members ask each other, see `desk`."""
LOOK = 1.0
"""Seconds between two looks at what other processes of this machine have written down."""
COMPARE = 10.0
"""Seconds between two comparisons with another member. Who is told nothing hears of a revocation by these."""
_AGAIN = 60.0
"""Seconds between two attempts to renew a certificate."""
_TIMEOUT = 2.0
_FORWARD = 6
"""Members that are told what has just been heard; they tell others."""
_log = logging.getLogger(__name__)
T = TypeVar("T")


class Rounds:
    """Talks to other members about membership."""

    def __init__(self, membership: OwnMembership, gate: Gate, neighbours: Callable[[], Collection[PeerID]]):
        """`neighbours`: the members that are known now."""
        self._ours, self._gate, self._neighbours = membership, gate, neighbours
        self._renewal = 0.0
        self._refusal = ""
        """What others said last who refuse this machine."""

    async def run(self) -> None:
        """Until cancelled."""
        compared = 0.0
        while True:
            try:
                if self._ours.refresh():
                    await self.spread()
                if time.monotonic() > compared + COMPARE:
                    compared = time.monotonic()
                    await self._compare_with_one()
                    await self._renew_in_time()
            except (BadUsage, OSError) as error:  # the folder was forgotten, or the disk is full
                _log.error("%s This process goes on with what it knows.", error)
                await asyncio.sleep(_AGAIN)
            await asyncio.sleep(LOOK)

    async def spread(self) -> None:
        """Tell some of the other members what we know, and learn what they know."""
        others = list(self._neighbours())
        await asyncio.gather(*map(self._tell, random.sample(others, min(len(others), _FORWARD))))

    async def tell_all(self) -> int:
        """Tell all members that are known; how many have heard it."""
        return sum(await asyncio.gather(*map(self._tell, self._neighbours())))

    async def _tell(self, peer_id: PeerID) -> bool:
        roster = self._ours.roster
        news = pb.Roster.FromString(roster.to_bytes())
        return await self._exchange(peer_id, pb.Sync(digest=roster.digest(), news=news))

    async def _compare_with_one(self) -> None:
        others = list(self._neighbours())
        if others:
            other, before = random.choice(others), self._ours.roster.digest()
            if await self._exchange(other, pb.Sync(digest=before)) and self._ours.roster.digest() != before:
                await self.spread()

    async def _exchange(self, peer_id: PeerID, said: pb.Sync) -> bool:
        answer = await self._ask(peer_id, SYNC, said, pb.Sync)
        if answer is None:
            return False
        self._ours.merge(answer.news.SerializeToString())
        if answer.digest not in (said.digest, self._ours.roster.digest()) and not said.HasField("news"):
            await self._tell(peer_id)
        return True

    async def _renew_in_time(self) -> None:
        """Ask for a new certificate when half of the time of the old one is over."""
        member = self._ours.member
        if time.time() < (member.issued + member.expires) / 2 or time.monotonic() < self._renewal:
            return
        self._renewal = time.monotonic() + _AGAIN
        asked = pb.Renew(process=pb.Signed.FromString(self._ours.certificate()))
        for peer_id in self._neighbours():
            answer = await self._ask(peer_id, RENEW, asked, pb.Renewed)
            if answer is not None and answer.HasField("certificate"):
                self._ours.learn([answer.certificate.SerializeToString()])
                _log.info("renewed the membership in %s", self._ours.folder.name)
                return

    async def _ask(self, peer_id: PeerID, method: str, message: Message, answer: type[T]) -> T | None:
        try:
            async with asyncio.timeout(_TIMEOUT):
                result: Any = await self._gate.call_protobuf_handler(peer_id, method, message, answer)
                self._refusal = ""
                return result  # type: ignore[no-any-return]
        except NotAMember as error:
            if str(error) != self._refusal:
                _log.error("Others in the swarm %s refuse this machine: %s", self._ours.folder.name, error)
            self._refusal = str(error)
            return None
        except Exception as error:  # hivemind raises errors of many kinds
            _log.debug("%s was not answered by %s: %r", method, peer_id, error)
            return None
