"""The records that a swarm's DHT accepts: only those signed by the member that they are about."""

import json
import struct
from functools import lru_cache

import msgpack  # type: ignore[import-untyped]
from hivemind.dht.routing import DHTID
from hivemind.dht.validation import DHTRecord, RecordValidatorBase

from bootstrap.identity import Identity, verify
from protocol.name import NAME
from protocol.records import MAX_RECORD_BYTES

MODELS_KEY = f"{NAME}.models"
_CONTEXT = f"{NAME} record 1\0".encode()
_MAX_OVERHEAD = 2048


def model_key(config_hash: str) -> str:
    """The DHT key under which the peers of a model announce themselves."""
    return f"{NAME}.model.{config_hash}"


def complaints_key(config_hash: str) -> str:
    """The DHT key under which clients complain of a model's peers."""
    return f"{NAME}.complaints.{config_hash}"


def _key_id(key: str) -> bytes:
    return bytes(DHTID.generate(source=key).to_bytes())


_MODELS_KEY_ID = _key_id(MODELS_KEY)


class SignedRecords(RecordValidatorBase):  # type: ignore[misc]
    """Signs this member's records and checks everyone's.

    A stored value is msgpack `[public key, signature, payload]`; the signature covers key, subkey, payload and
    expiration time. Whether a record is valid depends on nothing but the record and the names in this file, not on the
    time: hivemind drops a whole answer for one record that the reader refuses, so all members must agree.
    """

    def __init__(self, identity: Identity):
        self._identity = identity

    def sign_value(self, record: DHTRecord) -> bytes:
        """The stored form of `record.value`."""
        signature = self._identity.sign(_signed_bytes(record.key, record.subkey, record.value, record.expiration_time))
        packed: bytes = msgpack.packb([self._identity.public_key, signature, record.value])
        return packed

    def validate(self, record: DHTRecord) -> bool:
        """Whether `record` is well formed, belongs under its key, and is signed by the identity in its subkey."""
        if not isinstance(record.expiration_time, float):
            return False
        return _is_valid(record.key, record.subkey, record.value, record.expiration_time)

    def strip_value(self, record: DHTRecord) -> bytes:
        """The payload of a valid record."""
        payload: bytes = _unpack(record.value)[2]
        return payload


@lru_cache(maxsize=2048)
def _is_valid(key: bytes, subkey: bytes, value: bytes, expiration: float) -> bool:
    # Cached, as a look-up meets the same record once for each replica.
    try:
        if len(value) > MAX_RECORD_BYTES + _MAX_OVERHEAD:
            return False
        peer_id = msgpack.unpackb(subkey, raw=False)
        public_key, signature, payload = _unpack(value)
        if not isinstance(peer_id, str) or msgpack.packb(peer_id) != subkey:
            return False
        belongs = _belongs(key, peer_id, json.loads(_data(payload)))
    except (ValueError, TypeError, LookupError, RecursionError, msgpack.UnpackException):
        return False
    return belongs and verify(peer_id, public_key, _signed_bytes(key, subkey, payload, expiration), signature)


def _unpack(value: bytes) -> tuple[bytes, bytes, bytes]:
    public_key, signature, payload = msgpack.unpackb(value, raw=False, use_list=True)
    if not all(isinstance(part, bytes) for part in (public_key, signature, payload)):
        raise ValueError("not a signed record")
    return public_key, signature, payload


def _data(payload: bytes) -> bytes:
    """The bytes in a payload: hivemind packs bytes by msgpack."""
    data = msgpack.unpackb(payload, raw=False)
    if not isinstance(data, bytes) or len(data) > MAX_RECORD_BYTES:
        raise ValueError("not bytes")
    return data


def _belongs(key: bytes, peer_id: str, content: object) -> bool:
    """Whether `content` may stand under `key`: a model in the list of models, a peer's record or complaint for one."""
    if not isinstance(content, dict):
        return False
    if key == _MODELS_KEY_ID:
        return isinstance(content.get("config_hash"), str)
    config_hash = content["model"]["config_hash"]
    if content.get("peer_id") != peer_id or not isinstance(config_hash, str):
        return False
    return key == _key_id(complaints_key(config_hash) if "accused" in content else model_key(config_hash))


def _signed_bytes(key: bytes, subkey: bytes, payload: bytes, expiration: float) -> bytes:
    lengths = struct.pack("<3Id", len(key), len(subkey), len(payload), expiration)
    return b"".join((_CONTEXT, lengths, key, subkey, payload))
