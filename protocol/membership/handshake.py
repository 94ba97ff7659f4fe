"""How the two ends of a stream in a private swarm show each other that they are members, before anything else.

    caller                                       peer
      Knock{nonce a, mac(knock, ...)}     ->
                                          <-     Proof{nonce b, certificate, mac(peer, ...)}
      Proof{certificate, mac(caller, ...)}, Hello ->

A mac is made with the swarm's secret. It covers its role, both peer IDs as the carrier authenticated them, both nonces
and the certificate. So a recorded handshake is of no use in another one, no end can pass on what the other says, and
nobody shows a certificate to one who does not hold the secret. The secret lets nobody in: the certificate must be one
of the carrier's peer ID, from the swarm's root, in force, and not revoked, and stay so as long as the stream lives.
The peer reads only small frames, for a short time, from a caller that has not shown all that.
"""

import asyncio
import secrets
import weakref
from contextlib import suppress
from typing import Protocol

from protocol import swarm_pb2 as pb
from protocol.channel import Channel, Message, Standing
from protocol.errors import BadRequest, NotAllowed, NotAMember, PeerUnreachable, SwarmError
from protocol.membership.certificate import MAX_CERTIFICATE_BYTES, Role
from protocol.membership.refusals import Refusal, Refused
from protocol.membership.secret import SwarmSecret
from protocol.tensors import Limits

TIMEOUT = 10.0
"""Seconds that a caller has to send its first request, and a peer to show what it is."""
NONCE_BYTES = 32
_UNPROVED = Limits(max_header=MAX_CERTIFICATE_BYTES + 512, max_payload=0, max_tensors=0)
_FIRST_REQUEST = Limits(max_header=2**20, max_payload=0, max_tensors=0)
"""A Hello names every file of a checkpoint."""
_PURPOSE = "stream"


class Membership(Protocol):
    """This process, as a member of a private swarm."""

    @property
    def secret(self) -> SwarmSecret:
        """The swarm's."""

    def certificate(self) -> bytes:
        """That of this process's peer ID."""

    def standing(self, peer_id: str, certificate: bytes) -> Standing:
        """How `peer_id`, who shows a certificate, stands. Raises `Refused`."""


class Handshake:
    """Both ends of the handshake, for the process `local` (a peer ID); `membership` None: its swarm is open."""

    def __init__(self, local: str, membership: Membership | None):
        self._local = local
        self._membership = membership
        self._channels = weakref.WeakSet[Channel]()

    async def initiate(self, channel: Channel) -> None:
        """The caller's end, before the first request. Raises `NotAMember` when the peer is no member of our swarm."""
        if self._membership is None:
            return
        with _Bounded(channel, _UNPROVED):
            try:
                async with asyncio.timeout(TIMEOUT):
                    await self._knock(channel, self._membership)
            except TimeoutError as error:
                raise PeerUnreachable(f"Peer {channel.remote} proved nothing within {TIMEOUT:g} s.") from error
        self._channels.add(channel)

    async def respond(self, channel: Channel) -> Message:
        """The peer's end. Returns the first request of a caller that is a member.

        Raises `NotAMember` for one that is not, `PeerUnreachable` for one that is slow.
        """
        with _Bounded(channel, _FIRST_REQUEST):
            try:
                async with asyncio.timeout(TIMEOUT):
                    if self._membership is not None:
                        await self._let_in(channel, self._membership, await self._challenge(channel, self._membership))
                        self._channels.add(channel)
                    request = await channel.receive_request()
            except TimeoutError as error:
                raise PeerUnreachable(f"Peer {channel.remote} asked nothing within {TIMEOUT:g} s.") from error
        if isinstance(request.body, pb.Knock):
            raise NotAMember(Refusal.OPEN.sentence())
        return request

    def enforce(self) -> None:
        """Close the streams of those who are no members any more."""
        for channel in list(self._channels):
            try:
                channel.check_standing()
            except NotAMember:
                channel.close()

    async def _knock(self, channel: Channel, membership: Membership) -> None:
        ends, secret = (self._local, channel.remote), membership.secret
        knock = pb.Knock(nonce=secrets.token_bytes(NONCE_BYTES))
        knock.mac = secret.mac(_PURPOSE, *_transcript(b"knock", ends, knock, pb.Proof()))
        proof = (await channel.call(Message(knock))).body
        if not isinstance(proof, pb.Proof):
            raise BadRequest(f"Peer {channel.remote} did not answer a handshake.")
        if not secret.verify(proof.mac, _PURPOSE, *_transcript(b"peer", ends, knock, proof)):
            raise NotAMember(f"Peer {channel.remote} is no member of this swarm.")
        try:
            channel.standing = membership.standing(channel.remote, proof.certificate)
        except Refused as refused:
            raise refused.why.error(f"peer {channel.remote}") from None
        ours = pb.Proof(nonce=proof.nonce, certificate=membership.certificate())
        ours.mac = secret.mac(_PURPOSE, *_transcript(b"caller", ends, knock, ours))
        ours.ClearField("nonce")
        await channel.send(Message(ours))

    async def _challenge(self, channel: Channel, membership: Membership) -> bytes:
        """The certificate of a caller that holds the secret."""
        with _Bounded(channel, _UNPROVED):
            knock, secret = await _receive_knock(channel), membership.secret
            ends = (channel.remote, self._local)
            if not secret.verify(knock.mac, _PURPOSE, *_transcript(b"knock", ends, knock, pb.Proof())):
                raise NotAMember(Refusal.OTHER_SWARM.sentence())
            proof = pb.Proof(nonce=secrets.token_bytes(NONCE_BYTES), certificate=membership.certificate())
            proof.mac = secret.mac(_PURPOSE, *_transcript(b"peer", ends, knock, proof))
            await channel.send(Message(proof))
            answer = (await channel.receive_request()).body
            if not isinstance(answer, pb.Proof):
                raise NotAMember(Refusal.OTHER_SWARM.sentence())
            said = pb.Proof(nonce=proof.nonce, certificate=answer.certificate)
            if not secret.verify(answer.mac, _PURPOSE, *_transcript(b"caller", ends, knock, said)):
                raise NotAMember(Refusal.OTHER_SWARM.sentence())
            return answer.certificate

    async def _let_in(self, channel: Channel, membership: Membership, certificate: bytes) -> None:
        try:
            channel.standing = membership.standing(channel.remote, certificate)
        except Refused as refused:
            with suppress(SwarmError):  # the Hello is on its way: a stream closed before it loses the refusal
                await channel.receive_request()
            raise refused.why.error() from None


def require(channel: Channel, role: Role) -> None:
    """Raises `NotAllowed` when the other end has less than `role` in a private swarm; in an open one all may do all."""
    if channel.standing is not None and channel.standing.role < role:
        raise NotAllowed(
            f"This takes the role {role.name.lower()}, and the caller has less; join again with a ticket of "
            f"`peer invite --role {role.name.lower()}`."
        )


class _Bounded:
    """Smaller limits for a channel, until the end of the block."""

    def __init__(self, channel: Channel, limits: Limits):
        self._channel, self._limits = channel, limits

    def __enter__(self) -> None:
        self._channel.limits, self._limits = self._limits, self._channel.limits

    def __exit__(self, *error: object) -> None:
        self._channel.limits = self._limits


async def _receive_knock(channel: Channel) -> pb.Knock:
    try:
        knock = (await channel.receive_request()).body
    except BadRequest as error:
        raise NotAMember(Refusal.STRANGER.sentence()) from error
    if not isinstance(knock, pb.Knock):
        raise NotAMember(Refusal.STRANGER.sentence())
    if len(knock.nonce) != NONCE_BYTES:
        raise BadRequest(f"A Knock has a nonce of {NONCE_BYTES} bytes.")
    return knock


def _transcript(role: bytes, ends: tuple[str, str], knock: pb.Knock, proof: pb.Proof) -> tuple[bytes, ...]:
    """What a mac covers. `ends`: peer IDs of the caller and of the peer."""
    caller, peer = ends
    return role, caller.encode(), peer.encode(), knock.nonce, proof.nonce, proof.certificate
