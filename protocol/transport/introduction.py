"""How the caller of a direct connection shows who it is. The peer shows it by the certificate that its record names.

    caller                                         peer
      (TLS 1.3, and the certificate is the one that the peer's record names)
                                            <-     nonce (32 bytes)
      lengths, public key, signature        ->
                                            <-     accepted (1 byte)

The signature covers the peer's certificate, its peer ID and the nonce, so that it is of no use at another peer or at
another time. The caller's peer ID follows from its key. A caller that is refused is told nothing.
"""

import secrets
import struct
from collections.abc import Callable
from dataclasses import dataclass

from protocol.errors import BadRequest, PeerUnreachable
from protocol.name import NAME
from protocol.stream import Stream

NONCE_BYTES = 32
MAX_PUBLIC_KEY, MAX_SIGNATURE = 1024, 1024
"""Bytes; of an RSA key of 4,096 bits they are 550 and 512."""
_PURPOSE = f"{NAME} direct introduction 1\0".encode()
_LENGTHS = struct.Struct("<HH")
_ACCEPTED = b"\x01"


@dataclass(frozen=True)
class Credentials:
    """Who a member is, and how it tells who others are."""

    peer_id: str
    public_key: bytes
    sign: Callable[[bytes], bytes]
    """Data -> its signature by `public_key`."""
    signer: Callable[[bytes, bytes, bytes], str | None]
    """Public key, data, signature -> the peer ID of the key's owner, if the signature is one of the data by it."""


async def introduce(stream: Stream, me: Credentials, fingerprint: bytes, patience: float) -> None:
    """As the caller of the peer `stream.remote`, whose certificate has the SHA-256 `fingerprint`.

    Raises `PeerUnreachable` when it does not accept.
    """
    nonce = await stream.receive(NONCE_BYTES, patience)
    signature = me.sign(_signed(fingerprint, stream.remote, nonce))
    lengths = _LENGTHS.pack(len(me.public_key), len(signature))
    await stream.send(lengths, me.public_key, signature, patience=patience)
    if await stream.receive(len(_ACCEPTED), patience) != _ACCEPTED:
        raise PeerUnreachable(f"Peer {stream.remote} did not accept a direct connection.")


async def identify(stream: Stream, me: Credentials, fingerprint: bytes, patience: float) -> str:
    """As the peer whose certificate has the SHA-256 `fingerprint`: the caller's peer ID.

    Raises `BadRequest` when the caller has not shown it, `PeerUnreachable`.
    """
    nonce = secrets.token_bytes(NONCE_BYTES)
    await stream.send(nonce, patience=patience)
    key_length, signature_length = _LENGTHS.unpack(await stream.receive(_LENGTHS.size, patience))
    if key_length > MAX_PUBLIC_KEY or signature_length > MAX_SIGNATURE:
        raise BadRequest(f"A key of {key_length} bytes and a signature of {signature_length} are no introduction.")
    public_key = bytes(await stream.receive(key_length, patience))
    signature = bytes(await stream.receive(signature_length, patience))
    peer_id = me.signer(public_key, _signed(fingerprint, me.peer_id, nonce), signature)
    if peer_id is None:
        raise BadRequest("The caller of a direct connection did not show that it has the key that it names.")
    await stream.send(_ACCEPTED, patience=patience)
    return peer_id


def _signed(fingerprint: bytes, peer_id: str, nonce: bytes | bytearray) -> bytes:
    return b"".join((_PURPOSE, fingerprint, nonce, peer_id.encode()))
