"""A member asks another to dial it back: by real members, and by whoever would misuse that."""

import asyncio
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from ipaddress import ip_address
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from hivemind.p2p import PeerID

from bootstrap.addresses import split_peer_address
from bootstrap.member import Member
from bootstrap.membership.gate import Bytes
from bootstrap.membership.seal import refusal_in
from protocol.membership.refusals import Refusal
from protocol.stream import Stream
from protocol.transport import dial_back
from protocol.transport.dial_back import Answer, DialBack, Outcome, Question
from tests.tools.members import SOMEBODY, member
from tests.tools.swarms import found

HOST = "127.0.0.1"


@asynccontextmanager
async def two(host: str = HOST) -> AsyncIterator[tuple[Member, Member]]:
    with TemporaryDirectory() as folder:
        own = {"host": host, "direct_port": 0, "identity_path": Path(folder, "identity")}
        async with member(host=host) as helper, member(*helper.addresses, **own) as asker:
            await asker.transport.serve(hang_up)
            yield helper, asker


async def hang_up(stream: Stream) -> None:
    pass


async def ask(asker: Member, helper: Member) -> list[tuple[str, str, Outcome]]:
    answer = await asker.ask_to_dial_back(helper.peer_id, [split_peer_address(helper.addresses[0])[1]])
    return [(one.host, one.carrier, one.outcome) for one in answer.attempts]


def test_both_carriers_are_dialled_and_what_comes_of_it_is_told() -> None:
    async def main() -> None:
        async with two() as (helper, asker):
            assert await ask(asker, helper) == [(HOST, c, Outcome.REACHED) for c in ("libp2p", "direct")]
            with socket.socket() as closed:
                closed.bind((HOST, 0))
                asker.ports = {4: closed.getsockname()[1]}
                assert (await ask(asker, helper))[0] == (HOST, "libp2p", Outcome.REFUSED)
            # Not libp2p, but the asker's own door, which waits for TLS.
            monkeypatch = pytest.MonkeyPatch()
            monkeypatch.setattr(dial_back, "TIMEOUT", 0.5)
            assert asker.door
            asker.ports = {4: asker.door.addresses[0][1]}
            assert (await ask(asker, helper))[0] == (HOST, "libp2p", Outcome.SILENT)
            monkeypatch.undo()

    asyncio.run(main())


def test_over_ipv6() -> None:
    async def main() -> None:
        async with two("::1") as (helper, asker):
            assert await ask(asker, helper) == [("::1", c, Outcome.REACHED) for c in ("libp2p", "direct")]

    if not socket.has_dualstack_ipv6():
        pytest.skip("this machine has no IPv6")
    asyncio.run(main())


def test_another_door_is_told_from_ones_own() -> None:
    async def main() -> None:
        async with two() as (helper, asker):
            assert asker._own_door
            question = Question(port=1, door=asker._own_door.listener.port, fingerprint="0" * 64)
            data = Bytes(question.to_bytes())
            target = PeerID.from_base58(helper.peer_id)
            answer = Answer.from_bytes(await asker._p2p.call_protobuf_handler(target, dial_back.METHOD, data, Bytes))
            outcomes = [(one.carrier, one.outcome) for one in answer.attempts]
            assert outcomes == [("libp2p", Outcome.REFUSED), ("direct", Outcome.ANOTHER)]

    asyncio.run(main())


def test_a_stranger_has_nobody_dialled(tmp_path: Path) -> None:
    async def main() -> None:
        async with member(swarm=found(tmp_path)) as helper, member() as stranger:
            target, place = split_peer_address(helper.addresses[0])
            await stranger._p2p.dial(target, [place])
            data = Bytes(Question(port=1).to_bytes())
            answer = await stranger._p2p.call_protobuf_handler(target, dial_back.METHOD, data, Bytes)
            assert refusal_in(answer) is Refusal.STRANGER

    asyncio.run(main())


@pytest.mark.parametrize(
    "data", [b"", b"{}", b"[]", b'{"port": 0}', b'{"port": 70000}', b'{"port": 1, "fingerprint": "x"}', b"9" * 9999]
)
def test_what_is_no_question_is_not_looked_at(data: bytes) -> None:
    async def hosts(peer_id: str) -> set[object]:
        raise AssertionError

    assert asyncio.run(DialBack(hosts, None).answer(SOMEBODY, data)) == b""  # type: ignore[arg-type]


def test_nobody_is_dialled_too_often(monkeypatch: pytest.MonkeyPatch) -> None:
    dialled, now = [], 0.0

    async def greet(host: str, port: int) -> None:
        dialled.append((host, port))

    async def main() -> None:
        async def hosts(peer_id: str) -> list[object]:
            return [ip_address(peer_id)]

        desk = DialBack(hosts, None)  # type: ignore[arg-type]

        async def refuses(host: str) -> bool:
            return Answer.from_bytes(await desk.answer(host, Question(port=7).to_bytes())).too_often

        assert [await refuses("192.0.2.1") for _ in range(14)] == [False] * 12 + [True] * 2
        assert dialled == [("192.0.2.1", 7)] * 12
        assert sum([not await refuses(f"192.0.2.{number}") for number in range(2, 99)]) == 60 - 12
        nonlocal now
        now = 61.0
        assert not await refuses("192.0.2.1")

    monkeypatch.setattr(dial_back, "_greet", greet)
    monkeypatch.setattr("protocol.transport.dial_back.time.monotonic", lambda: now)
    asyncio.run(main())
