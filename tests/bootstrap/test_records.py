"""Identities, signed records, their storage, and addresses: everything of a member that needs no network."""

import dataclasses
import json
import os
import stat
import time
from pathlib import Path

import msgpack
import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from hivemind.dht.routing import DHTID
from hivemind.dht.validation import DHTRecord
from hivemind.p2p import P2P, PeerID
from hivemind.proto import crypto_pb2
from hivemind.utils.multiaddr import Multiaddr

from bootstrap.addresses import check_announced, for_others, listening_addresses, split_peer_address
from bootstrap.identity import Identity, peer_id_of, verify
from bootstrap.storage import MAX_KEY_BYTES, MAX_LIFETIME, RecordStorage
from bootstrap.validator import MODELS_KEY, WEIGHTS_KEY, SignedRecords, model_key
from protocol.errors import BadUsage

HASH = "0123456789abcdef" * 2
PEER = "QmZLpNtJqNU3utELa92YAA5urQkAyqcg1GjRDbEqbZWBhP"


@pytest.fixture(scope="module")
def alice():
    identity = Identity.load_or_create(None)
    yield identity
    identity.close()


@pytest.fixture(scope="module")
def mallory():
    identity = Identity.load_or_create(None)
    yield identity
    identity.close()


# Identity


def test_identity_file_is_hivemind_s(tmp_path: Path):
    made = Identity.load_or_create(tmp_path / "made.id")
    assert PeerID.from_identity(made.path.read_bytes()).to_base58() == made.peer_id
    P2P.generate_identity(str(tmp_path / "theirs.id"))
    theirs = Identity.load_or_create(tmp_path / "theirs.id")
    assert PeerID.from_identity(theirs.path.read_bytes()).to_base58() == theirs.peer_id


def test_identity_survives_and_is_private(tmp_path: Path):
    path = tmp_path / "peer.id"
    first = Identity.load_or_create(path)
    first.close()
    second = Identity.load_or_create(path)
    assert first.peer_id == second.peer_id
    assert stat.S_IMODE(path.stat().st_mode) & 0o077 == 0
    assert os.listdir(tmp_path) == ["peer.id"]
    second.close()
    assert path.exists()


def test_temporary_identity_is_deleted():
    identity = Identity.load_or_create(None)
    assert stat.S_IMODE(identity.path.stat().st_mode) == 0o600
    identity.close()
    assert not identity.path.exists()
    assert verify(identity.peer_id, identity.public_key, b"data", identity.sign(b"data"))


def test_identity_in_use_is_refused(tmp_path: Path):
    first = Identity.load_or_create(tmp_path / "peer.id")
    with pytest.raises(BadUsage, match="Another process is using the identity"):
        Identity.load_or_create(tmp_path / "peer.id")
    first.close()
    Identity.load_or_create(tmp_path / "peer.id").close()


def private_key_file(path: Path, key) -> Path:
    der = key.private_bytes(
        serialization.Encoding.DER, serialization.PrivateFormat.TraditionalOpenSSL, serialization.NoEncryption()
    )
    path.write_bytes(crypto_pb2.PrivateKey(key_type=crypto_pb2.RSA, data=der).SerializeToString())
    return path


def test_bad_identity_files(tmp_path: Path):
    (tmp_path / "text").write_text("hello")
    (tmp_path / "empty").write_bytes(b"")
    (tmp_path / "huge").write_bytes(os.urandom(100_000))
    weak = private_key_file(tmp_path / "weak", rsa.generate_private_key(65537, 1024))
    curve = private_key_file(tmp_path / "curve", ec.generate_private_key(ec.SECP256R1()))
    for path in (tmp_path / "text", tmp_path / "empty", tmp_path / "huge", weak, curve):
        with pytest.raises(BadUsage, match="identity"):
            Identity.load_or_create(path)
    for path in (tmp_path, tmp_path / "nowhere" / "peer.id"):
        with pytest.raises(BadUsage, match="cannot be used"):
            Identity.load_or_create(path)


def test_verify(alice: Identity, mallory: Identity):
    signature = alice.sign(b"data")
    assert verify(alice.peer_id, alice.public_key, b"data", signature)
    assert not verify(alice.peer_id, alice.public_key, b"other", signature)
    assert not verify(alice.peer_id, mallory.public_key, b"data", mallory.sign(b"data"))
    assert not verify(mallory.peer_id, mallory.public_key, b"data", signature)
    assert not verify(alice.peer_id, alice.public_key, b"data", b"")
    assert not verify(peer_id_of(b"junk"), b"junk", b"data", signature)


# Validator


def packed(content: object) -> bytes:
    return msgpack.packb(json.dumps(content).encode())


def signed(identity: Identity, key: str, content: object, *, subkey: str | None = None, at: float = 1e10) -> DHTRecord:
    """The record that `identity` would store, its value already signed."""
    record = DHTRecord(
        DHTID.generate(source=key).to_bytes(), msgpack.packb(subkey or identity.peer_id), packed(content), at
    )
    return dataclasses.replace(record, value=SignedRecords(identity).sign_value(record))


def peer_content(identity: Identity, config_hash: str = HASH) -> dict[str, object]:
    return {"peer_id": identity.peer_id, "model": {"config_hash": config_hash}}


def test_own_records_are_valid(alice: Identity, mallory: Identity):
    anyone = SignedRecords(mallory)
    record = signed(alice, model_key(HASH), peer_content(alice))
    assert anyone.validate(record)
    assert json.loads(msgpack.unpackb(anyone.strip_value(record))) == peer_content(alice)
    assert anyone.validate(signed(alice, MODELS_KEY, {"config_hash": HASH}))


def test_weights_are_announced_by_who_gives_them(alice: Identity, mallory: Identity):
    anyone = SignedRecords(mallory)
    content = {"peer_id": alice.peer_id, "models": []}
    assert anyone.validate(signed(alice, WEIGHTS_KEY, content))
    assert not anyone.validate(signed(mallory, WEIGHTS_KEY, content))
    assert not anyone.validate(signed(mallory, WEIGHTS_KEY, content, subkey=alice.peer_id))
    assert not anyone.validate(signed(alice, WEIGHTS_KEY, {"peer_id": alice.peer_id}))
    assert not anyone.validate(signed(alice, WEIGHTS_KEY, [HASH]))
    assert not anyone.validate(signed(alice, MODELS_KEY, content))


def test_forged_records_are_refused(alice: Identity, mallory: Identity):
    anyone = SignedRecords(alice)
    genuine = signed(alice, model_key(HASH), peer_content(alice))
    public_key, signature, payload = msgpack.unpackb(genuine.value)
    other_key = DHTID.generate(source=model_key("f" * 32)).to_bytes()
    forgeries = [
        signed(mallory, model_key(HASH), peer_content(alice), subkey=alice.peer_id),
        signed(mallory, model_key(HASH), peer_content(alice)),
        signed(alice, model_key("f" * 32), peer_content(alice)),
        signed(alice, "hivetune.other", peer_content(alice)),
        signed(alice, MODELS_KEY, peer_content(alice)),
        signed(alice, MODELS_KEY, [HASH]),
        signed(alice, model_key(HASH), {"peer_id": alice.peer_id}),
        dataclasses.replace(genuine, key=other_key),
        dataclasses.replace(genuine, subkey=msgpack.packb(mallory.peer_id)),
        dataclasses.replace(genuine, subkey=msgpack.packb(None)),
        dataclasses.replace(genuine, expiration_time=2e10),
        dataclasses.replace(genuine, expiration_time=10),
        dataclasses.replace(genuine, value=payload),
        dataclasses.replace(genuine, value=genuine.value + b"x"),
        dataclasses.replace(genuine, value=b""),
        dataclasses.replace(
            genuine, value=msgpack.packb([public_key, signature, packed(peer_content(alice) | {"a": 1})])
        ),
        dataclasses.replace(genuine, value=msgpack.packb([mallory.public_key, signature, payload])),
        dataclasses.replace(genuine, value=msgpack.packb([public_key, signature])),
        dataclasses.replace(genuine, value=msgpack.packb([1, 2, 3])),
    ]
    assert anyone.validate(genuine)
    assert [number for number, record in enumerate(forgeries) if anyone.validate(record)] == []


def test_signed_junk_is_refused(alice: Identity):
    anyone = SignedRecords(alice)
    large = peer_content(alice) | {"junk": "x" * 9000}
    assert not anyone.validate(signed(alice, model_key(HASH), large))
    for payload in (msgpack.packb("text"), msgpack.packb(b"{"), msgpack.packb(b"[" * 8000), b"\xc1", b"junk"):
        record = DHTRecord(DHTID.generate(source=MODELS_KEY).to_bytes(), msgpack.packb(alice.peer_id), payload, 1e10)
        record = dataclasses.replace(record, value=anyone.sign_value(record))
        assert not anyone.validate(record), payload[:9]


# Storage


def test_storage_keeps_the_newer_record():
    storage, key, now = RecordStorage(), DHTID.generate(source="key"), time.time()
    assert storage.store_subkey(key, "alice", b"old", now + 1.0)
    assert storage.store_subkey(key, "alice", b"new", now + 50)
    assert storage.store_subkey(key, "alice", b"new", now + 50)
    assert not storage.store_subkey(key, "alice", b"old", now + 1.0)
    assert storage.store(key, b"other", now + 20, subkey="bob")
    time.sleep(1.05)
    # hivemind's own storage has forgotten alice by now, because of the copy of her older record.
    found = storage.get(key)
    assert {name: entry.value for name, entry in found.value.items()} == {"alice": b"new", "bob": b"other"}
    assert found.expiration_time == now + 50


def test_storage_forgets_and_copies():
    storage, key, now = RecordStorage(), DHTID.generate(source="key"), time.time()
    assert storage.store_subkey(key, "alice", b"value", now + 0.2)
    storage.get(key).value.store("mallory", b"value", now + 100)
    assert dict(storage.items())[key].value.get("mallory") is None
    assert key in storage
    time.sleep(0.25)
    assert key not in storage
    assert list(storage.items()) == []
    assert storage.get(key) is None


def test_storage_is_bounded():
    storage, key, now = RecordStorage(), DHTID.generate(source="key"), time.time()
    assert not storage.store_subkey(key, "alice", b"value", now + MAX_LIFETIME + 10)
    assert not storage.store_subkey(key, "alice", b"value", now - 1)
    assert not storage.store_subkey(key, "alice", b"value", float("nan"))
    assert not storage.store(key, b"value without a subkey", now + 10)
    taken = sum(storage.store_subkey(key, str(number), bytes(2**18), now + 10) for number in range(12))
    assert taken == MAX_KEY_BYTES // 2**18
    assert storage.store_subkey(key, "0", bytes(2**18), now + 11)


# Addresses


@pytest.mark.parametrize(
    "address",
    ["", "hello", "/ip4/1.2.3.4/tcp/1", f"/p2p/{PEER}", "/ip4/1.2.3.4/tcp/1/p2p/short", f"/ip4/1.2.3/tcp/1/p2p/{PEER}",
     f"/ip4/1.2.3.4/tcp/99999/p2p/{PEER}", f"1.2.3.4:1/p2p/{PEER}", f"/ip4/1.2.3.4/tcp/1/p2p/{PEER}/p2p/",
     f"/dns4/a..org/tcp/1/p2p/{PEER}", f"/ip4/1.2.3.4/p2p/{PEER}", f"/ip4/1.2.3.4/tcp/0/p2p/{PEER}"],
)  # fmt: skip
def test_malformed_addresses(address: str):
    with pytest.raises(BadUsage, match="is not the address of a peer"):
        split_peer_address(address)


def test_addresses():
    assert str(split_peer_address(f"/dns4/example.org/tcp/1/p2p/{PEER}")[1]) == "/dns4/example.org/tcp/1"
    assert check_announced("/ip4/1.2.3.4/tcp/5", PEER) == "/ip4/1.2.3.4/tcp/5"
    assert check_announced(f"/ip4/1.2.3.4/tcp/5/p2p/{PEER}", PEER) == "/ip4/1.2.3.4/tcp/5"
    assert listening_addresses("::", 0) == ["/ip6/::/tcp/0"]
    assert check_announced("/dns4/example.org/udp/5/quic", PEER) == "/dns4/example.org/udp/5/quic"
    assert check_announced("/dnsaddr/example.org", PEER) == "/dnsaddr/example.org"
    for wrong in ("/ip4/1.2.3.4/tcp/0", "/ip4/1.2.3.4", "/dns4/example.org", "/ip4/0.0.0.0/tcp/5", "1.2.3.4",
                  f"/ip4/1.2.3.4/tcp/5/p2p/{PEER[:-1]}Q"):  # fmt: skip
        with pytest.raises(BadUsage):
            check_announced(wrong, PEER)
    for host, port in (("localhost", 1), ("", 1), ("1.2.3.4", 65536), ("1.2.3.4", -1)):
        with pytest.raises(BadUsage):
            listening_addresses(host, port)


def test_addresses_for_others():
    def chosen(*addresses: str) -> list[str]:
        return [text.removesuffix(f"/p2p/{PEER}") for text in for_others(map(Multiaddr, addresses), PEER)]

    loop, lan, six = "/ip4/127.0.0.1/tcp/1", "/ip4/10.0.0.1/tcp/1", "/ip6/::1/tcp/1"
    assert chosen(loop, lan, "/ip4/0.0.0.0/tcp/1", "/ip6/fe80::1/tcp/1", six) == [lan]
    assert chosen(loop, six) == [loop, six]
    assert chosen("/dns4/example.org/tcp/1", loop) == ["/dns4/example.org/tcp/1"]
