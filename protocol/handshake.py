"""How the two ends of a stream in a private swarm show each other that they hold its key, before anything else.

    caller                                  peer
      Knock{nonce a, ids of keys}    ->
                                     <-     Proof{nonce b, id of a key, mac(peer, ...)}
      Proof{mac(caller, ...)}, Hello ->

A mac covers its role, both peer IDs as the carrier authenticated them, both nonces and the ids. So a recorded handshake
is of no use in another one, and no end can pass on what the other says. The caller says nothing of itself to a peer
that has not proved its key; the peer reads only small frames, for a short time, from a caller that has not.
"""

import asyncio
import secrets
from collections.abc import Sequence

from protocol import swarm_pb2 as pb
from protocol.channel import Channel, Message
from protocol.errors import BadRequest, PeerFailed, PeerUnreachable, WrongKey
from protocol.swarm_key import NO_KEY, OPEN, REFUSED, Keyring, SwarmKey, key_with_id
from protocol.tensors import Limits

TIMEOUT = 10.0
"""Seconds that a caller has to send its first request, and a peer to prove its key."""
NONCE_BYTES = 32
MAX_KEYS = 16
_UNPROVED = Limits(max_header=4096, max_payload=0, max_tensors=0)
_FIRST_REQUEST = Limits(max_header=2**20, max_payload=0, max_tensors=0)
"""A Hello names every file of a checkpoint."""
_PURPOSE = "stream"


class Handshake:
    """Both ends of the handshake, for the member `local` with the keys of `keyring` (None: its swarm is open)."""

    def __init__(self, local: str, keyring: Keyring | None):
        self._local = local
        self._keyring = keyring

    async def initiate(self, channel: Channel) -> None:
        """The caller's end, before the first request. Raises `WrongKey` when the peer does not hold our key."""
        if self._keyring is None:
            return
        with _Bounded(channel, _UNPROVED):
            try:
                async with asyncio.timeout(TIMEOUT):
                    await self._knock(channel, self._keyring.current())
            except TimeoutError as error:
                raise PeerUnreachable(f"Peer {channel.remote} proved no key within {TIMEOUT:g} s.") from error

    async def respond(self, channel: Channel) -> Message:
        """The peer's end. Returns the first request of a caller that holds our key.

        Raises `WrongKey` for one that does not, `PeerUnreachable` for one that is slow.
        """
        with _Bounded(channel, _FIRST_REQUEST):
            try:
                async with asyncio.timeout(TIMEOUT):
                    if self._keyring is not None:
                        await self._challenge(channel, self._keyring.current())
                    request = await channel.receive_request()
            except TimeoutError as error:
                raise PeerUnreachable(f"Peer {channel.remote} asked nothing within {TIMEOUT:g} s.") from error
        if isinstance(request.body, pb.Knock):
            raise WrongKey(OPEN)
        return request

    def is_preferred(self, channel: Channel) -> bool:
        """Whether a new handshake would use the key of `channel`, as far as we can tell."""
        return self._keyring is None or channel.key_id == self._keyring.current()[0].id

    def check_current(self, channel: Channel) -> None:
        """Raises `PeerFailed` when the key of `channel` has been dropped since; a caller with another reconnects."""
        if self._keyring is not None and key_with_id(self._keyring.current(), channel.key_id) is None:
            raise PeerFailed("The key that this stream began with has been dropped; open another stream.")

    async def _knock(self, channel: Channel, keys: Sequence[SwarmKey]) -> None:
        knock = pb.Knock(nonce=secrets.token_bytes(NONCE_BYTES), keys=[key.id for key in keys])
        proof = (await channel.call(Message(knock))).body
        if not isinstance(proof, pb.Proof):
            raise BadRequest(f"Peer {channel.remote} did not answer a handshake.")
        key = key_with_id(keys, proof.key)
        ends = (self._local, channel.remote)
        if key is None or not key.verify(proof.mac, _PURPOSE, *_transcript(b"peer", ends, knock, proof)):
            raise WrongKey(f"Peer {channel.remote} does not hold the key of this swarm.")
        await channel.send(Message(pb.Proof(mac=key.mac(_PURPOSE, *_transcript(b"caller", ends, knock, proof)))))
        channel.key_id = key.id

    async def _challenge(self, channel: Channel, keys: Sequence[SwarmKey]) -> None:
        with _Bounded(channel, _UNPROVED):
            knock = await _receive_knock(channel)
            key = next((held for key_id in knock.keys if (held := key_with_id(keys, key_id))), None)
            if key is None:
                raise WrongKey(REFUSED)
            ends = (channel.remote, self._local)
            proof = pb.Proof(nonce=secrets.token_bytes(NONCE_BYTES), key=key.id)
            proof.mac = key.mac(_PURPOSE, *_transcript(b"peer", ends, knock, proof))
            await channel.send(Message(proof))
            answer = (await channel.receive_request()).body
            expected = _transcript(b"caller", ends, knock, proof)
            if not isinstance(answer, pb.Proof) or not key.verify(answer.mac, _PURPOSE, *expected):
                raise WrongKey(REFUSED)
            channel.key_id = key.id


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
        raise WrongKey(NO_KEY) from error
    if not isinstance(knock, pb.Knock):
        raise WrongKey(NO_KEY)
    if len(knock.nonce) != NONCE_BYTES or len(knock.keys) > MAX_KEYS:
        raise BadRequest(f"A Knock has a nonce of {NONCE_BYTES} bytes and at most {MAX_KEYS} keys.")
    return knock


def _transcript(role: bytes, ends: tuple[str, str], knock: pb.Knock, proof: pb.Proof) -> tuple[bytes, ...]:
    """What a mac covers. `ends`: peer IDs of the caller and of the peer."""
    caller, peer = ends
    return role, caller.encode(), peer.encode(), knock.nonce, proof.nonce, proof.key, b"".join(knock.keys)
