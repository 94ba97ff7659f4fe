"""`peer doctor` on machines that are well, and on some that are not. Real members, real peers."""

import asyncio
import json
import os
import socket
import time
from collections.abc import Coroutine
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from pydantic import TypeAdapter
from typing_extensions import TypedDict

from bootstrap.member import MemberOptions
from bootstrap.membership.ticket import Ticket
from peer.doctor import network, peers, standing
from peer.doctor.case import Case
from peer.doctor.check import Check, Findings, ok, warning, wrong
from peer.doctor.examination import CHECKS
from peer.doctor.report import lines
from peer.start.options import ServeOptions
from protocol.membership.certificate import Role
from protocol.records import PeerState
from tests.tools.command import Command, Outcome
from tests.tools.members import SOMEBODY, member, record
from tests.tools.swarm import ForkServer, Swarm, new_swarm
from tests.tools.swarms import found, home, let_in, revoke

LOCAL = ("--host", "127.0.0.1")
DAY = 86_400
"""Seconds."""
HINT = "`peer doctor` looks for the cause."


class Shown(TypedDict):
    check: str
    verdict: str
    sentence: str
    mend: str


def read(outcome: Outcome) -> list[Shown]:
    """What `--json` says, whose form is as docs say."""
    said = json.loads(outcome.stdout)
    assert said.keys() == {"well", "findings"}
    shown = TypeAdapter(list[Shown]).validate_python(said["findings"], strict=True)
    verdicts = [one["verdict"] for one in shown]
    assert set(verdicts) <= {"ok", "warning", "wrong"}
    assert said["well"] == ("wrong" not in verdicts) == (outcome.code == 0)
    names = [check.name for check in CHECKS]
    assert list(dict.fromkeys(one["check"] for one in shown)) == names
    assert all(one["mend"] for one in shown if one["verdict"] == "wrong")
    assert outcome.stderr == ""
    return shown


def about(shown: list[Shown], check: str) -> list[tuple[str, str]]:
    return [(one["verdict"], one["sentence"]) for one in shown if one["check"] == check]


def examined(options: MemberOptions, *checks: Any, model: str | None = None) -> list[Findings]:
    """What some checks find on a machine, listening on loopback."""

    async def main() -> list[Findings]:
        case = Case(replace(options, host="127.0.0.1", direct_port=0), ServeOptions(device="cpu"), model)
        try:
            return [await check(case) for check in checks]
        finally:
            await case.close()

    return asyncio.run(asyncio.wait_for(main(), 60))


# A machine that is well


def test_all_is_well(command: Command, llama_swarm: tuple[Path, Swarm]) -> None:
    model, swarm = llama_swarm
    named = ("--initial-peers", swarm.initial_peers[0], "--model", model, "--blocks", "0:2", "--device", "cpu")
    outcome = command("doctor", *named, *LOCAL, "--json")
    shown = read(outcome)
    assert outcome.code == 0
    bad = [one for one in shown if one["verdict"] != "ok" and one["check"] not in ("disk", "multicast", "memory")]
    assert bad == []
    assert about(shown, "swarm") == [("ok", "3 other member(s) answer.")]
    near = "(a member on this machine has tried, so nothing is known of firewalls)"
    reached = [sentence for _, sentence in about(shown, "dial back")]
    assert ["libp2p's port" in reached[0], "direct connections" in reached[1]] == [True, True]
    assert all(sentence.endswith(f"at 127.0.0.1 {near}.") for sentence in reached)
    assert "0.0 s" in about(shown, "clock")[0][1]
    *each, last = [sentence for _, sentence in about(shown, "peers")]
    assert len(each) == 3
    assert all("ms directly" in one and "ms by libp2p" in one and "tok/s" in one for one in each)
    assert last == "All 5 blocks of llama are served by peers that answer."


def test_what_people_see() -> None:
    async def run(case: Case) -> Findings:
        return []

    check, findings = Check("clock", run), [ok("It is right."), wrong("It is wrong.", "Set it.")]
    plain = [str(line) for line in lines(check, findings, is_terminal=False)]
    assert plain == [
        "ok      clock       It is right.",
        "wrong   clock       It is wrong.",
        "                    → Set it.",
    ]
    screen = [str(line) for line in lines(check, [*findings, warning("It is slow.")], is_terminal=True)]
    assert [line[0] for line in screen] == ["✓", "✗", " ", "!"]


def test_a_machine_that_is_in_no_swarm_is_examined_too(command: Command, tmp_path: Path) -> None:
    with home(tmp_path):
        outcome = command("doctor", *LOCAL)
    assert outcome.code == 0
    assert "warning swarm       No swarm was named, and this machine has joined none.\n" in outcome.stdout
    assert "ok      p2pd        It starts, in " in outcome.stdout
    assert outcome.stdout.splitlines()[-1].startswith("Nothing is wrong; ")


def test_who_fails_is_told_of_the_doctor(command: Command) -> None:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        address = f"/ip4/127.0.0.1/tcp/{closed.getsockname()[1]}/p2p/{SOMEBODY}"
        assert command("status", "--initial-peers", address).refusal().endswith(HINT)
        shown = read(command("doctor", "--initial-peers", address, *LOCAL, "--json"))
        ticket = Ticket(os.urandom(32), os.urandom(16), 60 * (int(time.time()) // 60 + 60), (address,))
        assert read(command("doctor", ticket.to_text(), *LOCAL, "--json"))[-4:] == shown[-4:]
    assert [verdict for verdict, _ in about(shown, "swarm")] == ["wrong", "warning"]
    assert "the machine is there, but nothing listens at that port" in about(shown, "swarm")[1][1]
    assert HINT not in command("status", "--initial-peers", "nonsense").refusal()


# Of this machine


def test_a_port_is_taken(command: Command) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        outcome = command("doctor", *LOCAL, "--direct-port", port, "--json")
    (said,) = about(read(outcome), "ports")
    assert said[0] == "wrong"
    assert f"Port {port} cannot be listened at: " in said[1]
    assert outcome.code == 1


def test_p2pd_does_not_start(command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bootstrap.daemon.files", lambda package: tmp_path)
    (tmp_path / "p2pd").write_text("#!/bin/sh\necho 'no entropy' >&2\nexit 1\n")
    (tmp_path / "p2pd").chmod(0o700)
    shown = read(command("doctor", *LOCAL, "--initial-peers", f"/ip4/127.0.0.1/tcp/1/p2p/{SOMEBODY}", "--json"))
    assert about(shown, "p2pd") == [("wrong", "p2pd did not start: no entropy.")]
    assert command("bootstrap", *LOCAL).stderr == f"error: p2pd did not start: no entropy. {HINT}\n"


def test_blocks_do_not_fit(command: Command, llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("peer.span.loading.block_bytes", lambda *_: 10**15)
    outcome = command("doctor", *LOCAL, "--model", llama, "--device", "cpu", "--json")
    (said,) = about(read(outcome), "memory")
    assert said[0] == "wrong"
    assert f"1 of {llama}'s 5 blocks take 1,000,000.0 GB, " in said[1]
    assert said[1].endswith(": they do not fit.")


def test_a_router_stands_between() -> None:
    async def main() -> list[Findings]:
        found = []
        for hosts in ({"203.0.113.9"}, {"127.0.0.1"}):
            case = Case(MemberOptions(host="127.0.0.1"), ServeOptions(), None)
            case.seen_as = hosts
            found.append(await network.nat(case))
            await case.close()
        return found

    (behind,), (direct,) = run(main())
    assert (behind.verdict, direct.verdict) == ("warning", "ok")
    assert behind.sentence == "Others see this machine as 203.0.113.9, a router's address (NAT)."


# Of the swarm


def together(*checks: Any, **changes: Any) -> list[Findings]:
    """What checks find in a swarm of one other member, who announces a peer's record with `changes`."""

    async def main() -> list[Findings]:
        async with member(direct_port=0) as founder, member(*founder.addresses):
            if changes:
                assert await founder.directory.announce(record(founder, **changes), 60)
            options = MemberOptions(tuple(founder.addresses), "127.0.0.1", direct_port=0)
            case = Case(options, ServeOptions(), None)
            try:
                return [await check(case) for check in checks]
            finally:
                await case.close()

    return run(main())


def run(coroutine: Coroutine[Any, Any, Any]) -> Any:
    return asyncio.run(asyncio.wait_for(coroutine, 60))


def test_the_clock_is_off(monkeypatch: pytest.MonkeyPatch) -> None:
    import hivemind.dht.protocol

    true = hivemind.dht.protocol.get_dht_time
    monkeypatch.setattr(hivemind.dht.protocol, "get_dht_time", lambda: true() + 100)
    ((finding,),) = together(standing.clock)
    assert "100.0 s behind other members'" in finding.sentence
    assert (finding.verdict, "NTP" in finding.mend) == ("wrong", True)


def test_members_refuse_a_machine_for_its_clock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    founder = found(tmp_path / "founder")
    user = let_in(founder, tmp_path / "user")

    async def main() -> list[Findings]:
        async with member(swarm=founder) as other:
            monkeypatch.setattr("bootstrap.membership.seal.WINDOW", -1.0)
            options = MemberOptions(tuple(other.addresses), "127.0.0.1", swarm=user)
            case = Case(options, ServeOptions(), None)
            try:
                return [await standing.clock(case), await standing.swarm(case)]
            finally:
                await case.close()

    (clock,), (swarm,) = run(main())
    assert (clock.verdict, swarm.verdict) == ("wrong", "wrong")
    assert clock.sentence.endswith("that of a member differs by more than 3 s.")


def test_another_version() -> None:
    (finding,), (same,) = together(standing.versions, network.nat, version="9.9", name="old one")
    assert finding.verdict == "warning"
    assert "(old one: 9.9)" in finding.sentence
    assert same.verdict == "ok"


def test_a_peer_that_leaves_and_one_that_does_not_answer() -> None:
    ((*_, last),) = together(peers.peers, state=PeerState.DRAINING)
    assert last.verdict == "wrong"
    assert last.sentence == "Blocks 0:8 of tiny are served by no peer that answers, so it cannot be used."
    assert "`peer serve tiny --blocks 0:8`" in last.mend


def test_a_peer_on_the_route_is_killed(command: Command, fork_server: ForkServer, llama: Path) -> None:
    with new_swarm(fork_server) as swarm:
        _, second = swarm.serve(llama, "0:2", "2:5")
        second.kill()
        outcome = command("doctor", *LOCAL, "--initial-peers", swarm.initial_peers[0], "--json")
    shown = about(read(outcome), "peers")
    assert [verdict for verdict, _ in shown] == ["ok", "warning", "wrong"]
    assert f"{second.peer_id}, blocks 2:5, does not answer: " in shown[1][1]
    assert shown[2][1] == "Blocks 2:5 of llama are served by no peer that answers, so it cannot be used."
    assert outcome.code == 1


# Membership


def test_a_certificate(tmp_path: Path, command: Command) -> None:
    founder = found(tmp_path / "founder")
    good = let_in(founder, tmp_path / "good", Role.SERVE, "good")
    late = let_in(founder, tmp_path / "late", name="late", lifetime=DAY, ago=DAY - 9000)
    gone = let_in(founder, tmp_path / "gone", name="gone", lifetime=60, ago=61)
    out = let_in(founder, tmp_path / "out", name="out")
    revoke(founder, out)
    for folder, verdict, said in (
        (founder, "ok", "founder is a member of lab in the role admin, for 3,65"),
        (good, "ok", "good is a member of lab in the role serve, for 30 days more, and is renewed in time."),
        (
            late,
            "warning",
            "late is a member of lab in the role use, for 0.1 days more: no admin was there to renew",
        ),
        (gone, "wrong", "The membership of this machine has expired, "),
    ):
        ((finding,),) = examined(MemberOptions(swarm=folder), standing.certificate)
        assert (finding.verdict, finding.sentence.startswith(said)) == (verdict, True), finding
    with home(tmp_path / "gone"):
        shown = read(command("doctor", *LOCAL, "--json"))
    assert [about(shown, check)[0][0] for check in ("certificate", "swarm")] == ["wrong", "wrong"]


def test_a_private_swarm(tmp_path: Path) -> None:
    """Whoever only uses it need not be reached by others."""
    founder = found(tmp_path / "founder")
    user, server = (let_in(founder, tmp_path / role.name, role) for role in (Role.USE, Role.SERVE))

    async def main() -> list[Findings]:
        results: list[Findings] = []
        async with member(swarm=founder) as other:
            for folder in (user, server):
                options = MemberOptions(tuple(other.addresses), "127.0.0.1", direct_port=0, swarm=folder)
                case = Case(options, ServeOptions(), None)
                joined = await case.join()
                assert joined
                joined._own_door.listener._accepting.cancel()  # type: ignore[union-attr]
                joined._own_door.listener._listener.close()  # type: ignore[union-attr]
                joined._own_door.listener = _Closed  # type: ignore[union-attr, assignment]
                results.append(await network.dial_back(case))
                await case.close()
        return results

    for_user, for_server = run(main())
    assert [one.verdict for one in for_user] == ["ok", "warning"]
    assert [one.verdict for one in for_server] == ["ok", "wrong"]
    assert "direct connections" in for_server[1].sentence
    assert "to serve: open the port (TCP)" in for_user[1].mend


class _Closed:
    """A door that a firewall has closed."""

    port, fingerprint = 1, "0" * 64

    @staticmethod
    def close() -> None:
        pass


# The network


def test_members_are_found_by_multicast_if_that_is_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def deaf() -> bool:
        return False

    folder = found(tmp_path)
    ((heard,),) = examined(MemberOptions(), network.multicast)
    assert heard.verdict in ("ok", "warning"), "as this machine's networks are"
    monkeypatch.setattr(network, "_is_heard", deaf)
    ((failed,),) = examined(MemberOptions(swarm=folder), network.multicast)
    assert (failed.verdict, failed.sentence) == ("warning", "This machine does not hear its own multicast.")
    folder.discovery = False
    ((off,),) = examined(MemberOptions(swarm=folder), network.multicast)
    assert (off.verdict, "switched off" in off.sentence) == ("ok", True)
