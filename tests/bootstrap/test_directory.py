"""The directory of peers over real members on loopback: announcing, withdrawing, expiry, forgery, restarts."""

import asyncio
import json
import math
import socket
import tempfile
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

import pytest
import uvloop
from hivemind.dht.routing import DHTID
from hivemind.dht.storage import DictionaryDHTValue
from hivemind.p2p import PeerID
from hivemind.utils.timed_storage import ValueWithExpiration

from bootstrap.directory import Announcer
from bootstrap.member import Member, MemberOptions
from bootstrap.validator import MODELS_KEY, model_key
from protocol.errors import BadRequest, PeerUnreachable
from protocol.records import PeerRecord, PeerState, SharedModel, WeightsRecord
from tests.tools.members import HASH, record, send_store, stored_value

OTHER = "f" * 32


# Making an RSA key takes a second here and there.
IDENTITIES = tempfile.TemporaryDirectory(prefix="hivetune-test-")


def identity_path(number: int) -> Path:
    return Path(IDENTITIES.name) / f"{number}.id"


@asynccontextmanager
async def swarm(size: int, client: bool = False, **options: object) -> AsyncIterator[list[Member]]:
    """`size` members, the last one a client if asked for; `options` are the founder's."""
    async with AsyncExitStack() as stack:
        members: list[Member] = []
        for number in range(size):
            extra = options if not members else {"client_mode": client and number == size - 1}
            extra = {"identity_path": identity_path(number)} | extra
            first = tuple(members[0].addresses) if members else ()
            member = await Member.join(MemberOptions(initial_peers=first, host="127.0.0.1", **extra))
            stack.push_async_callback(member.shutdown)
            members.append(member)
        yield members


async def seen(members: list[Member], config_hash: str = HASH) -> list[list[str]]:
    """For every member, the names of the peers that it finds."""
    return [[found.name for found in await member.directory.peers(config_hash)] for member in members]


async def eventually(condition, timeout: float = 5.0) -> None:
    async with asyncio.timeout(timeout):
        while not await condition():
            await asyncio.sleep(0.05)


# Announcing


def test_every_member_sees_every_change_at_once():
    async def main() -> None:
        async with swarm(3, client=True) as members:
            founder, peer, client = members
            assert await seen(members) == [[], [], []]
            assert await peer.directory.announce(record(peer, name="a", start=4, end=8), 60)
            assert await seen(members) == [["a"]] * 3
            assert await founder.directory.announce(record(founder, name="b"), 60)
            assert await seen(members) == [["b", "a"]] * 3
            # A shorter lifetime than the last one's must not keep the old record in place.
            assert await peer.directory.announce(record(peer, name="a2", start=4, end=8), 10)
            assert await seen(members) == [["b", "a2"]] * 3
            assert (await client.directory.peers(HASH))[0] == record(founder, name="b")
            await founder.directory.withdraw(record(founder, name="b"))
            assert await seen(members) == [["a2"]] * 3
            assert await founder.directory.announce(record(founder, name="b3"), 5)
            assert await seen(members) == [["b3", "a2"]] * 3

    uvloop.run(main())


def test_models():
    async def main() -> None:
        async with swarm(3) as members:
            founder, peer, third = members
            assert await third.directory.models() == {}
            await founder.directory.announce(record(founder), 60)
            await peer.directory.announce(record(peer, OTHER), 60)
            await third.directory.announce(record(third, OTHER, name="third"), 60)
            models = await founder.directory.models()
            assert {model.config_hash: {peer.peer_id for peer in peers} for model, peers in models.items()} == {
                HASH: {founder.peer_id},
                OTHER: {peer.peer_id, third.peer_id},
            }
            await founder.directory.withdraw(record(founder))
            assert [model.config_hash for model in await peer.directory.models()] == [OTHER]

    asyncio.run(main())


def test_who_gives_weights():
    """A record for all models that a member gives, beside that of a peer; gone when it is withdrawn."""

    async def main() -> None:
        async with swarm(2) as (founder, peer):
            given = SharedModel(model=record(peer).model, manifest="0" * 64, held=5, wanted=9)
            announced = WeightsRecord(peer_id=peer.peer_id, models=(given,), direct=peer.door)
            assert await founder.directory.weights() == []
            assert await peer.directory.announce(announced, 60)
            assert await founder.directory.weights() == [announced]
            assert await peer.directory.announce(record(peer), 60)
            assert await founder.directory.weights() == [announced]
            await peer.directory.withdraw(announced)
            assert await founder.directory.weights() == []
            assert len(await founder.directory.peers(HASH)) == 1

    asyncio.run(main())


def test_records_expire_and_survive_their_peer_until_then():
    async def main() -> None:
        async with swarm(3) as members:
            founder, peer, reader = members
            assert await peer.directory.announce(record(peer, name="short"), 2)
            await peer.shutdown()
            assert await seen([founder, reader]) == [["short"]] * 2
            await asyncio.sleep(2)
            assert await seen([founder, reader]) == [[]] * 2

    asyncio.run(main())


def test_a_member_that_comes_later_sees_and_keeps_the_records():
    async def main() -> None:
        async with swarm(2) as (founder, peer):
            await founder.directory.announce(record(founder, name="early"), 60)
            late = await Member.join(MemberOptions(tuple(peer.addresses), host="127.0.0.1"))
            assert await seen([late]) == [["early"]]
            await late.shutdown()

    asyncio.run(main())


def test_impossible_announcements():
    async def main() -> None:
        async with swarm(1) as (founder,):
            addresses = ("/ip4/192.0.2.1/" + "x" * 280,) * 20
            large, too_large = record(founder, addresses=addresses), record(founder, addresses=("€" * 299,) * 20)
            for wrong, lifetime in ((record(founder), 1e6), (record(founder), -1.0), (too_large, 60.0)):
                with pytest.raises(BadRequest):
                    await founder.directory.announce(wrong, lifetime)
            assert await founder.directory.announce(large, 60)
            assert await founder.directory.peers(HASH) == [large]

    asyncio.run(main())


def test_announcer():
    async def main() -> None:
        async with swarm(2) as members:
            founder, peer = members
            current = [record(peer, name="first")]
            announcer = Announcer(peer.directory, lambda: current[0], period=0.5, lifetime=2.0)
            announcer.start()

            async def shows(*names: str) -> None:
                async def right() -> bool:
                    return await seen(members) == [list(names)] * 2

                await eventually(right, 2.0)

            await shows("first")
            await asyncio.sleep(2.5)
            await shows("first")
            current[0] = record(peer, name="second", state=PeerState.DRAINING)
            announcer.refresh()
            await shows("second")
            assert (await founder.directory.peers(HASH))[0].state == PeerState.DRAINING
            await announcer.stop()
            assert await seen(members) == [[], []]
            await announcer.stop()

    asyncio.run(main())


def test_announcer_goes_on_after_a_failure(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch):
    async def main() -> None:
        async with swarm(1) as (founder,):
            answers = iter([ValueError("no record yet"), ValueError("no record yet")])

            def current() -> PeerRecord:
                for error in answers:
                    raise error
                return record(founder, name="there")

            announcer = Announcer(founder.directory, current, period=60)
            announcer.start()

            async def there() -> bool:
                return await seen([founder]) == [["there"]]

            await eventually(there)
            await announcer.stop()

    monkeypatch.setattr("bootstrap.directory.RETRY", 0.1)
    asyncio.run(main())
    assert [text for text in caplog.messages if "nnounc" in text] == [
        "Announcing this peer failed and will be tried again: no record yet",
        "This peer is announced again.",
    ]


# Forgery


@asynccontextmanager
async def victim_and_mallory() -> AsyncIterator[tuple[Member, Member, Member]]:
    """A reader, a peer that has announced itself as "genuine", and a member whose own node checks nothing."""
    async with swarm(3) as (reader, victim, mallory):
        mallory._node.protocol.record_validator.validate = lambda record: True
        assert await victim.directory.announce(record(victim, name="genuine"), 60)
        yield reader, victim, mallory


def test_members_refuse_to_store_forgeries():
    async def main() -> None:
        async with victim_and_mallory() as (reader, victim, mallory):
            key, now = model_key(HASH), time.time()
            genuine = stored_value(reader, victim.peer_id)
            await mallory.directory.announce(record(mallory, name="mallory"), 60)
            own = stored_value(mallory, mallory.peer_id)
            forgeries = [
                (genuine.value, now + 90, key, victim.peer_id),
                (own.value, own.expiration_time, key, victim.peer_id),
                (genuine.value, genuine.expiration_time, key, mallory.peer_id),
                (genuine.value, genuine.expiration_time, model_key(OTHER), victim.peer_id),
                (record(victim, name="forged").to_bytes(), now + 90, key, victim.peer_id),
                (b"anything", now + 90, "not.ours", mallory.peer_id),
                (b"anything", now + 90, key, None),
            ]
            for forgery in forgeries:
                for target in (reader, victim):
                    assert await send_store(mallory, target, *forgery) == [False, False], forgery
            assert await seen([reader, victim]) == [sorted_names(victim, mallory)] * 2

    asyncio.run(main())


def sorted_names(victim: Member, mallory: Member) -> list[str]:
    return [name for _, name in sorted([(victim.peer_id, "genuine"), (mallory.peer_id, "mallory")])]


def test_an_old_record_does_not_replace_a_newer_one():
    async def main() -> None:
        async with victim_and_mallory() as (reader, victim, mallory):
            old = stored_value(reader, victim.peer_id)
            await victim.directory.withdraw(record(victim))
            for target in (reader, victim):
                answers = await send_store(mallory, target, *old, model_key(HASH), victim.peer_id)
                assert answers == [False, False]
            assert await seen([reader, victim]) == [[], []]

    asyncio.run(main())


def test_readers_refuse_forgeries_that_mallory_holds():
    async def main() -> None:
        async with victim_and_mallory() as (reader, victim, mallory):
            key_id, later = DHTID.generate(source=model_key(HASH)), time.time() + 90
            genuine = stored_value(reader, victim.peer_id)
            storage = mallory._node.protocol.storage
            assert storage.store_subkey(key_id, victim.peer_id, genuine.value, later)
            assert storage.store_subkey(DHTID.generate(source=MODELS_KEY), victim.peer_id, b"junk", later)
            assert storage.store_subkey(key_id, "nobody", b"junk", later)
            for member in (reader, victim):
                found = await member.directory.peers(HASH)
                assert [peer.name for peer in found] == ["genuine"]
                assert len(await member.directory.models()) == 1

    asyncio.run(main())


def test_mallory_cannot_hide_what_others_hold():
    async def main() -> None:
        async with swarm(4, client=True) as (_, victim, mallory, client):
            await victim.directory.announce(record(victim, name="genuine"), 60)
            find = client._node.protocol.call_find

            async def find_at_mallory_first(peer: PeerID, keys: object) -> object:
                await asyncio.sleep(0.0 if str(peer) == mallory.peer_id else 0.3)
                return await find(peer, keys)

            client._node.protocol.call_find = find_at_mallory_first
            for expiration in (math.inf, math.nan, 1e300):
                nothing = ValueWithExpiration(DictionaryDHTValue(), expiration)
                mallory._node.protocol.storage.get = lambda key, answer=nothing: answer
                assert await seen([victim, client]) == [["genuine"]] * 2

    asyncio.run(main())


def test_signed_junk_is_ignored():
    async def main() -> None:
        async with swarm(2) as (reader, peer):
            content = record(peer).model_dump(mode="json")
            for number, broken in enumerate(({"start": -1}, {"version": "x" * 99}, {"speed": None})):
                junk, expiration = json.dumps(content | broken).encode(), time.time() + 60 + number
                assert await peer._node.store(model_key(HASH), junk, expiration, subkey=peer.peer_id)
                assert await reader.directory.peers(HASH) == []
            assert await peer._node.store(MODELS_KEY, b'{"config_hash": "x"}', expiration, subkey=peer.peer_id)
            assert await reader.directory.models() == {}

    asyncio.run(main())


# Restarts


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


def test_members_find_a_restarted_bootstrap_node_again(tmp_path: Path):
    options = {"port": free_port(), "identity_path": tmp_path / "bootstrap.id"}

    async def main() -> None:
        async with swarm(3, client=True, **options) as (founder, peer, client):
            await peer.directory.announce(record(peer, name="peer"), 60)
            await founder.shutdown()
            again = await Member.join(MemberOptions(host="127.0.0.1", **options))
            assert again.addresses == founder.addresses
            await peer._neighbours.rejoin()
            assert await peer.directory.announce(record(peer, name="peer again"), 60)
            assert await seen([again, peer, client]) == [["peer again"]] * 3
            await again.shutdown()

    asyncio.run(main())


def test_a_member_without_its_swarm_says_so(tmp_path: Path):
    async def main() -> None:
        async with swarm(2, client=True) as (founder, client):
            await founder.shutdown()
            begin = time.monotonic()
            for call in (client.directory.peers(HASH), client.directory.models()):
                with pytest.raises(PeerUnreachable, match=founder.peer_id):
                    await call
            assert time.monotonic() - begin < 10

    asyncio.run(main())
