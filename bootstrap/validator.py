"""The records that a swarm's DHT accepts: signed by the peer that they are about, which must be allowed to say that."""

import json
import struct
from functools import lru_cache

import msgpack  # type: ignore[import-untyped]
from hivemind.dht.routing import DHTID
from hivemind.dht.validation import DHTRecord, RecordValidatorBase

from bootstrap.identity import Identity, verify
from bootstrap.membership.own import OwnMembership
from protocol.membership.certificate import (
    MAX_CERTIFICATE_BYTES,
    BadStatement,
    Certificate,
    Process,
    Role,
    read_statement,
)
from protocol.membership.refusals import Refused
from protocol.name import NAME
from protocol.records import MAX_RECORD_BYTES

MODELS_KEY = f"{NAME}.models"
MEMBERS_KEY = f"{NAME}.members"
"""Where the processes of a private swarm's members announce themselves."""
WEIGHTS_KEY = f"{NAME}.weights"
"""The DHT key under which members announce the models whose files they give."""
_CONTEXT = f"{NAME} record 1\0".encode()
_MAX_OVERHEAD = 2048 + MAX_CERTIFICATE_BYTES
_NOTHING: bytes = msgpack.packb(b"")


def model_key(config_hash: str) -> str:
    """The DHT key under which the peers of a model announce themselves."""
    return f"{NAME}.model.{config_hash}"


def complaints_key(config_hash: str) -> str:
    """The DHT key under which clients complain of a model's peers."""
    return f"{NAME}.complaints.{config_hash}"


def _key_id(key: str) -> bytes:
    return bytes(DHTID.generate(source=key).to_bytes())


_MODELS_KEY_ID, _MEMBERS_KEY_ID, _WEIGHTS_KEY_ID = map(_key_id, (MODELS_KEY, MEMBERS_KEY, WEIGHTS_KEY))


class SignedRecords(RecordValidatorBase):  # type: ignore[misc]
    """Signs this process's records and checks everyone's.

    A stored value is msgpack `[public key, signature, payload]`, in a private swarm with the announcing process's
    certificate behind; the signature covers key, subkey, payload and expiration time. Whether a record is valid depends
    on nothing but the record, the swarm's root and the names in this file, not on the time, nor on who has been
    revoked: hivemind drops a whole answer for one record that the reader refuses, so all members must agree. What those
    say who are out comes to nothing where it is read.
    """

    def __init__(self, identity: Identity, membership: OwnMembership | None = None):
        self._identity, self._membership = identity, membership

    def sign_value(self, record: DHTRecord) -> bytes:
        """The stored form of `record.value`."""
        signature = self._identity.sign(_signed_bytes(record.key, record.subkey, record.value, record.expiration_time))
        parts = [self._identity.public_key, signature, record.value]
        if self._membership is not None:
            parts.append(self._membership.certificate())
        packed: bytes = msgpack.packb(parts)
        return packed

    def validate(self, record: DHTRecord) -> bool:
        """Whether `record` is well formed, belongs under its key, and is signed by the identity in its subkey.

        In a private swarm also whether that is a member's whose role allows it, for as long as the record holds.
        """
        if not isinstance(record.expiration_time, float):
            return False
        root = None if self._membership is None else self._membership.root
        return _is_valid(root, record.key, record.subkey, record.value, record.expiration_time)

    def strip_value(self, record: DHTRecord) -> bytes:
        """The payload of a valid record; no bytes for one whose member is out."""
        _, _, payload, certificate = _unpack(record.value)
        if self._membership is not None:
            try:
                self._membership.standing(msgpack.unpackb(record.subkey, raw=False), certificate)
            except Refused:
                return _NOTHING
        return payload


@lru_cache(maxsize=2048)
def _is_valid(root: bytes | None, key: bytes, subkey: bytes, value: bytes, expiration: float) -> bool:
    # Cached, as a look-up meets the same record once for each replica.
    try:
        if len(value) > MAX_RECORD_BYTES + _MAX_OVERHEAD:
            return False
        peer_id = msgpack.unpackb(subkey, raw=False)
        public_key, signature, payload, certificate = _unpack(value)
        if not isinstance(peer_id, str) or msgpack.packb(peer_id) != subkey:
            return False
        member = None if root is None else _member(root, peer_id, certificate)
        if (member is None) != (not certificate) or (member is not None and expiration > member.expires):
            return False
        may = _may_announce(key, peer_id, json.loads(_data(payload)), member)
    except (ValueError, TypeError, LookupError, RecursionError, msgpack.UnpackException):
        return False
    return may and verify(peer_id, public_key, _signed_bytes(key, subkey, payload, expiration), signature)


def _member(root: bytes, peer_id: str, certificate: bytes) -> Certificate:
    """Whose process `peer_id` is. Raises `BadStatement`, a `ValueError`."""
    process = read_statement(root, certificate)
    if not isinstance(process, Process) or process.peer_id != peer_id:
        raise BadStatement("another process's certificate")
    return process.member


def _unpack(value: bytes) -> tuple[bytes, bytes, bytes, bytes]:
    """Public key, signature, payload, certificate (empty: none)."""
    public_key, signature, payload, *rest = msgpack.unpackb(value, raw=False, use_list=True)
    [certificate] = rest or [b""]
    if not all(isinstance(part, bytes) for part in (public_key, signature, payload, certificate)):
        raise ValueError("not a signed record")
    return public_key, signature, payload, certificate


def _data(payload: bytes) -> bytes:
    """The bytes in a payload: hivemind packs bytes by msgpack."""
    data = msgpack.unpackb(payload, raw=False)
    if not isinstance(data, bytes) or len(data) > MAX_RECORD_BYTES:
        raise ValueError("not bytes")
    return data


def _may_announce(key: bytes, peer_id: str, content: object, member: Certificate | None) -> bool:
    """Whether `content` may stand under `key`: a member itself, a model, the weights that it gives, a peer's record or
    complaint for a model.

    `member`: whose process `peer_id` is; None in an open swarm.
    """
    if not isinstance(content, dict):
        return False
    serves = member is None or member.role >= Role.SERVE
    if key == _MODELS_KEY_ID:
        return serves and isinstance(content.get("config_hash"), str)
    if content.get("peer_id") != peer_id:
        return False
    if key == _MEMBERS_KEY_ID:
        return member is not None and content.get("member") == member.id
    if key == _WEIGHTS_KEY_ID:
        return serves and isinstance(content.get("models"), list)
    config_hash = content["model"]["config_hash"]
    if not isinstance(config_hash, str):
        return False
    if "accused" in content:
        return key == _key_id(complaints_key(config_hash))
    return serves and key == _key_id(model_key(config_hash))


def _signed_bytes(key: bytes, subkey: bytes, payload: bytes, expiration: float) -> bytes:
    lengths = struct.pack("<3Id", len(key), len(subkey), len(payload), expiration)
    return b"".join((_CONTEXT, lengths, key, subkey, payload))
