"""Where a peer announces that it can be reached directly, and what a record may say of it."""

import json
import socket
from collections.abc import Iterator

import pytest

from bootstrap.door import OwnDoor
from bootstrap.identity import Identity, signer_of
from protocol.errors import BadRequest, BadUsage
from protocol.records import Door, ModelId, PeerRecord, Speed
from protocol.transport.introduction import Credentials


@pytest.fixture(scope="module")
def me() -> Iterator[Credentials]:
    identity = Identity.load_or_create(None)
    yield Credentials(identity.peer_id, identity.public_key, identity.sign, signer_of)
    identity.close()


@pytest.mark.parametrize(
    ("host", "listening", "announced", "expected"),
    [
        ("127.0.0.1", "127.0.0.1", (), "127.0.0.1"),
        ("127.0.0.1", "0.0.0.0", (), "127.0.0.1"),
        ("192.0.2.77", "0.0.0.0", (), None),  # not this machine's own: a router's, or announced by the user
        ("127.0.0.1", "127.0.0.2", (), None),
        ("192.0.2.77", "127.0.0.1", ("/dns4/gpu.example.org/tcp/5", "/ip4/192.0.2.1/tcp/6"), "gpu.example.org"),
    ],
)
def test_a_door_is_announced_where_it_leads_to(
    host: str, listening: str, announced: tuple[str, ...], expected: str | None, me: Credentials
) -> None:
    own = OwnDoor(me, listening, 0, announced)
    try:
        door = own.describe([f"/ip4/{host}/tcp/31337/p2p/{me.peer_id}"])
        assert (door and door.addresses[0][0]) == expected
        if door is not None:
            assert door.fingerprint == own.listener.fingerprint
            assert door.addresses[0][1] == (5 if announced else own.listener.port)
            assert len(door.addresses) == max(1, len(announced))
    finally:
        own.listener.close()


@pytest.mark.parametrize(
    "address",
    ["", "here", "/ip4/192.0.2.1", "/ip4/192.0.2.1/tcp/0", "/ip4/192.0.2.1/udp/5", "/ip4/0.0.0.0/tcp/5", "/tcp/5"],
)
def test_an_address_for_direct_connections_that_is_none(address: str, me: Credentials) -> None:
    with pytest.raises(BadUsage, match=r"like /ip4/192.0.2.1/tcp/31338"):
        OwnDoor(me, "127.0.0.1", 0, (address,))


def test_no_announced_address_is_dropped(me: Credentials) -> None:
    with pytest.raises(BadUsage, match="9 addresses for direct connections are too many; announce 8 at most"):
        OwnDoor(me, "127.0.0.1", 0, [f"/ip4/192.0.2.1/tcp/{port}" for port in range(1, 10)])


def test_a_port_that_is_taken(me: Credentials) -> None:
    with (
        socket.create_server(("127.0.0.1", 0)) as taken,
        pytest.raises(BadUsage, match=r"Cannot listen on 127.0.0.1, port \d+, for direct connections: Address"),
    ):
        OwnDoor(me, "127.0.0.1", taken.getsockname()[1], ())


def described(**changes: object) -> bytes:
    record = PeerRecord(
        peer_id="Qm" + "a" * 44,
        model=ModelId(name="tiny", config_hash="0" * 32, num_blocks=8),
        start=0,
        end=4,
        dtype="float32",
        quantization="none",
        speed=Speed(decode=10, forward=1000),
        free_cache_tokens=100,
        max_length=64,
        version="0.1.0",
    )
    door = {"fingerprint": "0" * 64, "addresses": (("192.0.2.1", 5),)} | changes
    return json.dumps(record.model_dump(mode="json") | {"direct": door}).encode()


def test_a_record_names_a_door() -> None:
    addresses = (("192.0.2.1", 5), ("2001:db8::1", 65535), ("gpu-1.example.org", 1))
    assert PeerRecord.from_bytes(described(addresses=addresses)).direct == Door(
        fingerprint="0" * 64, addresses=addresses
    )


@pytest.mark.parametrize(
    "changes",
    [
        {"fingerprint": "0" * 63},
        {"fingerprint": "0" * 63 + "G"},
        {"addresses": ()},
        {"addresses": (("192.0.2.1", 5),) * 9},
        {"addresses": (("192.0.2.1", 0),)},
        {"addresses": (("192.0.2.1", 2**16),)},
        {"addresses": (("192.0.2.1",),)},
        {"addresses": (("0.0.0.0", 5),)},
        {"addresses": (("224.0.0.1", 5),)},
        {"addresses": (("fe80::1%eth0", 5),)},
        {"addresses": (("a b", 5),)},
        {"addresses": (("a\n", 5),)},
        {"addresses": (("-a", 5),)},
        {"addresses": (("a..b", 5),)},
        {"addresses": (("", 5),)},
        {"addresses": (("a." * 127, 5),)},
        {"addresses": (("é.org", 5),)},
    ],
)
def test_a_door_that_is_none_is_refused(changes: dict[str, object]) -> None:
    with pytest.raises(BadRequest, match="Not a PeerRecord"):
        PeerRecord.from_bytes(described(**changes))
