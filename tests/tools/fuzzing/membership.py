"""The target `membership`: statements, rosters, tickets, and what strangers and members say to a member's desk."""

import asyncio
import logging
import tempfile
import time
from collections.abc import Collection
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from hivemind.p2p import PeerID

from bootstrap.membership.desk import VERSION, Desk, redeem_signature_data
from bootstrap.membership.gate import Bytes
from bootstrap.membership.own import OwnMembership
from bootstrap.membership.ticket import Ticket, hash_secret
from protocol.errors import BadUsage
from protocol.membership import membership_pb2 as pb
from protocol.membership.certificate import BadStatement, Role, SigningKey, read_statement
from protocol.membership.refusals import Refused
from tests.tools.fuzzing.choices import Choices, mutate_bytes
from tests.tools.fuzzing.messages import mutate_fields
from tests.tools.swarms import found, let_in

_PEER = "QmZLpNtJqNU3utELa92YAA5urQkAyqcg1GjRDbEqbZWBhP"
_SECRET = bytes(range(16))
_USES = 3


class _NoRounds:
    """There is no other member."""

    async def tell_all(self) -> int:
        return 0

    async def spread(self) -> None:
        """To nobody."""


@dataclass
class _Context:
    remote_id: PeerID


class Memberships:
    """Everything that is read of what others say about membership. Only what is genuine may change anything."""

    def __init__(self) -> None:
        self.inputs = 0
        self._loop = asyncio.new_event_loop()
        self._folder = tempfile.TemporaryDirectory()
        founder = found(Path(self._folder.name))
        self._ours = OwnMembership(founder, "peer")
        self._member = OwnMembership(let_in(founder), _PEER)
        self._ours.refresh()
        signer, now = self._ours.signer(), int(time.time())
        self._invitation = signer.invite(hash_secret(_SECRET), Role.USE, _USES, now + 9999, 9999)
        self._ours.learn([self._invitation])
        self._desk = Desk(self._ours, _NoRounds(), lambda: [f"/ip4/192.0.2.1/tcp/1/p2p/{_PEER}"])  # type: ignore[arg-type]
        # Signed by one who may not: a member speaks of others, and to others.
        false = self._member.signer(Role.USE)
        key = SigningKey.generate()
        self._false = (
            false.certify(key.public, Role.ADMIN, "mallory", now, 9999),
            false.revoke(founder.key.public, now),
            false.invite(b"2" * 16, Role.ADMIN, 9, now + 9999, 9999),
        )
        self._seeds = (
            self._member.certificate(), self._member.member.signed, self._invitation, self._ours.certificate(),
            *self._false,
        )  # fmt: skip
        self._ticket = Ticket(founder.root, _SECRET, 60 * (now // 60), (f"/ip4/192.0.2.1/tcp/1/p2p/{_PEER}",) * 2)
        logging.getLogger("bootstrap.membership.desk").setLevel(logging.ERROR)
        self._kinds = (self._statement, self._roster, self._sync, self._text, self._join, self._join, self._renew)

    def play(self, data: bytes) -> None:
        """A few inputs. Raises for anything but a refusal, or acceptance of what is genuine."""
        choices = Choices(data)
        while not choices.is_over:
            self.inputs += 1
            choices.pick(self._kinds)(choices)

    def check(self) -> None:
        """Nobody is in who was not let in, nobody is out."""
        roster = self._ours.roster
        assert (len(roster.revoked), len(roster.invitations)) == (0, 1)
        came = roster.used(next(iter(roster.invitations.values())))
        assert len(came) <= _USES
        assert set(roster.members) == {self._ours.member.key, self._member.member.key, *came}

    def close(self) -> None:
        """Delete the folders."""
        self._folder.cleanup()
        self._loop.close()

    def _statement(self, choices: Choices) -> None:
        seed = choices.pick(self._seeds)
        data = mutate_bytes(choices, seed)
        with suppress(BadStatement):
            assert read_statement(self._ours.root, data).signed in self._genuine()
        with suppress(Refused):
            self._ours.standing(choices.pick((_PEER, "peer", "x")), data)

    def _genuine(self) -> Collection[bytes]:
        return self._seeds[:4] if len(self._ours.roster.members) < 3 else {
            *self._seeds[:4], *(one.signed for one in self._ours.roster.members.values())
        }  # fmt: skip

    def _roster(self, choices: Choices) -> None:
        roster = pb.Roster()
        for _ in range(choices.below(4)):
            roster.statements.add().ParseFromString(choices.pick(self._seeds))
        mutate_fields(choices, roster)
        self._ours.merge(mutate_bytes(choices, roster.SerializeToString()) if choices.one_in(2) else b"")
        self._ours.merge(roster.SerializeToString())

    def _sync(self, choices: Choices) -> None:
        said = pb.Sync(digest=choices.raw(choices.below(40)))
        said.news.statements.add().ParseFromString(choices.pick(self._seeds))
        mutate_fields(choices, said)
        self._loop.run_until_complete(self._desk._sync(said, self._context(choices)))  # type: ignore[arg-type]

    def _renew(self, choices: Choices) -> None:
        said = pb.Renew()
        said.process.ParseFromString(choices.pick(self._seeds))
        if choices.one_in(2):
            mutate_fields(choices, said)
        self._loop.run_until_complete(self._desk._renew(said, self._context(choices)))  # type: ignore[arg-type]

    def _text(self, choices: Choices) -> None:
        genuine = self._ticket.to_text()
        text = mutate_bytes(choices, genuine.encode()).decode(errors="surrogateescape")
        with suppress(BadUsage):
            assert Ticket.from_text(text) == Ticket.from_text(genuine)

    def _join(self, choices: Choices) -> None:
        key, context = SigningKey(bytes([choices.below(9)]) * 32), self._context(choices)
        asked = pb.Join(version=VERSION, invitation=self._ticket.invitation, time=time.time())
        if not choices.one_in(3):
            asked.redeem.secret, asked.redeem.key, asked.redeem.name = _SECRET, key.public, "new"
            signed = redeem_signature_data(_SECRET, context.remote_id.to_base58(), "peer")
            asked.redeem.signature = key.sign(signed)
        if not choices.one_in(4):
            mutate_fields(choices, asked)
        data = asked.SerializeToString()
        if choices.one_in(4):
            data = mutate_bytes(choices, data)
        answer = self._loop.run_until_complete(self._desk._join(Bytes(data), context))  # type: ignore[arg-type]
        said = pb.Joined.FromString(answer)
        if said.HasField("grant"):
            assert _SECRET in data

    def _context(self, choices: Choices) -> _Context:
        return _Context(PeerID.from_base58(choices.pick((_PEER, _PEER[:-1] + "Q"))))
