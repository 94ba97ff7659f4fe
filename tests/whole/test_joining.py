"""Joining a private swarm with what people type: tickets, members, who is put out; each machine has its own home."""

import asyncio
import json
import re
import time
from collections.abc import Coroutine, Iterator
from contextlib import AbstractAsyncContextManager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from bootstrap.addresses import split_peer_address
from bootstrap.joining import Redeemed, redeem
from bootstrap.member import Member
from bootstrap.membership import desk, rounds
from bootstrap.membership.folder import SwarmFolder
from bootstrap.membership.gate import Bytes
from bootstrap.membership.own import OwnMembership
from bootstrap.membership.ticket import Ticket
from peer.commands.invite import make_ticket
from protocol.errors import NoSwarm, NotAMember
from protocol.membership import membership_pb2 as pb
from protocol.membership.certificate import LIFETIME, Role
from protocol.membership.refusals import Refusal, Refused
from tests.tools.command import Command
from tests.tools.members import member as any_member
from tests.tools.swarm import ForkServer, Peer, Swarm, new_swarm
from tests.tools.swarms import found, home, let_in

PROMPT = "w5 w6"


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Command:
    return Command(monkeypatch, capsys)


def run(coroutine: Coroutine[Any, Any, Any]) -> Any:
    return asyncio.run(asyncio.wait_for(coroutine, 60))


def member(swarm: SwarmFolder, *initial_peers: str, **options: Any) -> AbstractAsyncContextManager[Member]:
    return any_member(*initial_peers, swarm=swarm, **options)


def invite(
    admin: SwarmFolder, role: Role = Role.USE, uses: int = 1, seconds: int = 600, lifetime: int = LIFETIME
) -> Ticket:
    return Ticket.from_text(make_ticket(OwnMembership(admin, ""), role, uses, seconds, lifetime)[0])


# What people type


@pytest.fixture(scope="module")
def lab(fork_server: ForkServer, llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Swarm]:
    """A swarm on one machine, made with the commands alone."""
    with new_swarm(fork_server) as made:
        made.home = tmp_path_factory.mktemp("machines") / "one"
        said = fork_server.run("swarm", "create", "lab", "--name", "one", cwd=made.home.parent, home=made.home)
        assert said == "created swarm=lab role=admin\n"
        serve(made, llama)
        yield made
        assert all("Traceback" not in peer.stderr.read_text() for peer in made.peers)


def serve(swarm: Swarm, model: Path) -> Peer:
    """`peer serve MODEL`, as far as a test can leave out the rest."""
    peer = swarm.launch("serve", str(model), "--host", "127.0.0.1", "--threads", "1")
    peer.wait_ready()
    return peer


def test_three_commands(lab: Swarm, llama: Path, command: Command, fork_server: ForkServer) -> None:
    """And from then on, after any restart, in any order: nothing to type or paste."""
    root = lab.home.parent
    while not (tickets := re.findall(r"peer join (\S+)\n", lab.peers[0].stderr.read_text())):
        time.sleep(0.05)  # it comes after the line that says that the peer is ready
    [ticket] = tickets
    assert len(ticket) < 300
    for name, role in (("two", "serve"), ("laptop", "serve")):
        with home(root / name):
            outcome = command("join", ticket, "--name", name)
            assert (outcome.code, outcome.stdout) == (0, f"joined swarm=lab role={role}\n"), outcome.stderr
    lab.home = root / "two"
    two = serve(lab, llama)
    tokenizer = AutoTokenizer.from_pretrained(llama)
    local = AutoModelForCausalLM.from_pretrained(llama).generate(
        **tokenizer(PROMPT, return_tensors="pt"), max_new_tokens=5, do_sample=False
    )
    text = tokenizer.decode(local[0][2:]) + "\n"

    def generate() -> None:
        with home(root / "laptop"):
            outcome = command("generate", llama, PROMPT, "--max-new-tokens", 5)
            assert (outcome.code, outcome.stdout) == (0, text), outcome.stderr

    generate()
    with home(root / "laptop"):
        rows = {row["name"]: row for row in json.loads(command("members", "--json").stdout)}
        assert {name: row["role"] for name, row in rows.items()} == {"one": "admin", "two": "serve", "laptop": "serve"}
        assert all(row["state"] == "member" and row["seen"] > time.time() - 30 for row in rows.values())
        assert [row["name"] for row in rows.values() if row["this"]] == ["laptop"]
        assert [row["let_in_by"] for row in rows.values()] == ["root", "one", "one"]
        assert command("status").code == 0
    lab.peers[0].kill()  # the founder is gone for good, as far as the others know
    generate()
    address = two.address
    two.kill()
    with home(root / "laptop"):
        outcome = command("generate", llama, PROMPT)
        assert outcome.code
        assert re.search("None of the initial peers answers|No member of the swarm answers", outcome.stderr)
    two = serve(lab, llama)
    assert two.address == address
    lab.home = root / "one"
    serve(lab, llama)
    new = fork_server.run("generate", str(llama), PROMPT, "--max-new-tokens", "5", cwd=root, home=root / "laptop")
    assert new == text


def test_tickets_end(
    lab: Swarm, command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Used up, expired, cancelled, another clock or version: a sentence each, and the admin's log has it too."""
    admin = SwarmFolder(lab.home / "swarms" / "lab")

    def refusal(ticket: str | Ticket) -> str:
        with home(tmp_path / "new"):
            return command("join", ticket if isinstance(ticket, str) else ticket.to_text()).refusal()

    with home(lab.home):
        outcome = command("invite", "--role", "use")
        used = outcome.stdout.removeprefix("ticket=").strip()
        assert f"peer join {used}" in outcome.stderr
        outcome = command("invite")
        cancelled, name = outcome.stdout.strip(), re.findall(r"--cancel (\w+)", outcome.stderr)[0]
        assert command("invite", "--cancel", name).stdout.startswith(f"cancelled ticket={name} ")
        assert "fits 0 tickets; those that are open: " in command("invite", "--cancel", "xyz").refusal()
        assert "--role boss is none; expected use" in command("invite", "--role", "boss").refusal()
        assert "--expires soon is no time" in command("invite", "--expires", "soon").refusal()
    with home(tmp_path / "first"):
        assert command("join", used).stdout == "joined swarm=lab role=use\n"
        assert command("swarm", "list").stdout == "swarm=lab role=use\n"
        assert command("swarm", "show", "--json").code == 0
    said = [refusal(used), refusal(cancelled)]
    signer, ours = admin.signer(), OwnMembership(admin, "")
    expired = replace(invite(admin), secret=b"e" * 16)
    ours.learn([signer.invite(expired.invitation, Role.USE, 1, int(time.time()) - 1, LIFETIME)])
    time.sleep(1.5)  # the peer looks once a second
    said.append(refusal(expired))
    fresh = invite(admin)
    time.sleep(1.5)
    with monkeypatch.context() as patch:
        patch.setattr("bootstrap.joining.time.time", lambda: time.monotonic())
        said.append(refusal(fresh))
    with monkeypatch.context() as patch:
        patch.setattr("bootstrap.joining.VERSION", 2)
        said.append(refusal(fresh))
    said.append(refusal(replace(fresh, secret=b"?" * 16)))
    for text, expected in zip(
        said,
        ("good for joining once, and has been used up", "has been cancelled", "has expired",
         "clocks of the two machines", "join in other ways (version 2 and 1); update the older", "not known here"),
        strict=True,
    ):  # fmt: skip
        assert expected in text
    log = lab.peers[-1].stderr.read_text()
    for expected in ("has been used up", "has been cancelled", "has expired", "clocks of the two machines"):
        assert re.search(f"A machine that wanted to join lab was refused: .*{expected}", log), expected
    with home(tmp_path / "first"):
        first = SwarmFolder(tmp_path / "first" / "swarms" / "lab").key.public
        with home(lab.home):
            again = command("invite", "--role", "serve").stdout.strip()
        assert command("join", again).stdout == "joined swarm=lab role=serve\n"  # it comes back, in another role
        assert SwarmFolder(tmp_path / "first" / "swarms" / "lab").key.public != first
        assert command("swarm", "forget", "lab").stdout == "forgot swarm=lab\n"
        assert command("swarm", "list").stdout == ""


def test_revoke_is_heard_everywhere(lab: Swarm, llama: Path, command: Command, tmp_path: Path) -> None:
    with home(lab.home):
        ticket = command("invite", "--role", "use").stdout.strip()
    with home(tmp_path):
        assert command("join", ticket, "--name", "mallory").code == 0
        assert command("generate", llama, PROMPT, "--max-new-tokens", 2).code == 0
    with home(lab.home):
        assert "fits 0 members; name one of these" in command("revoke", "nobody").refusal()
        assert "That is this machine" in command("revoke", "one").refusal()
        outcome = command("revoke", "mallory")
        assert re.fullmatch(r"revoked member=[0-9a-f]{16} told=\d+\n", outcome.stdout), outcome
        rows = {row["name"]: row["state"] for row in json.loads(command("members", "--json").stdout)}
        assert rows["mallory"] == "revoked"
    with home(tmp_path):
        for name in (("generate", llama, PROMPT), ("status",), ("members",)):
            outcome = command(*name)
            assert "membership of this machine has been revoked" in outcome.stderr, name


# Between machines


def test_nobody_but_an_admin_of_the_root_is_told_the_secret(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Who answers at the ticket's address may even know the invitation: it gets no secret, and no member."""
    ours, theirs, heard = found(tmp_path / "ours"), found(tmp_path / "theirs"), []
    genuine = desk.Desk._join

    async def listen(self: desk.Desk, data: Any, context: Any) -> Any:
        heard.append(bytes(data))
        return await genuine(self, data, context)

    monkeypatch.setattr(desk.Desk, "_join", listen)

    async def main() -> None:
        async with member(ours) as admin:
            ticket = invite(ours)
            admin.membership.refresh()
            async with member(theirs) as impostor:
                false = replace(ticket, addresses=tuple(impostor.addresses))
                with pytest.raises(NotAMember, match="not known here"):
                    await redeem(false, "new")
                signer = impostor.membership.signer()
                impostor.membership.learn(
                    [signer.invite(ticket.invitation, Role.ADMIN, 9, int(time.time()) + 60, LIFETIME)]
                )
                with pytest.raises(NotAMember, match="is no member of the ticket's swarm; the secret was not told"):
                    await redeem(false, "new")
                assert len(heard) == 2
                assert not any(ticket.secret in data for data in heard)
            with home(tmp_path / "new"):
                folder = (await redeem(ticket, "new")).keep("mine")
            assert (folder.name, folder.root, folder.certificate().name) == ("mine", ours.root, "new")
            [told] = [data for data in heard if ticket.secret in data]
            async with member(theirs) as thief:  # who has recorded it, and says it again
                peer_id, place = split_peer_address(admin.addresses[0])
                await thief._p2p.dial(peer_id, [place])
                said = await thief._p2p.call_protobuf_handler(peer_id, desk.JOIN, Bytes(told), Bytes)
                answer = pb.Joined.FromString(said)
                assert not answer.HasField("grant")
                assert "The ticket's secret is wrong" in answer.refusal
        with pytest.raises(NoSwarm, match=r"No admin of the ticket's swarm answers at /ip4/127\.0\.0\.1/"):
            await redeem(ticket, "new")

    run(main())


def test_a_member_who_may_not_let_in_says_who_may(tmp_path: Path) -> None:
    founder = found(tmp_path / "a")

    async def main() -> None:
        async with (
            member(founder) as admin,
            member(let_in(founder, role=Role.SERVE), *admin.addresses) as server,
        ):
            ticket = replace(invite(founder, Role.SERVE), addresses=tuple(server.addresses))
            for one in (admin, server):
                one.membership.refresh()
            await admin.rounds.tell_all()
            await server.look_around()
            with home(tmp_path / "new"):
                folder = (await redeem(ticket, "new")).keep("mine")
            assert folder.certificate().role is Role.SERVE
        ticket = replace(invite(founder), addresses=ticket.addresses)
        async with member(server.membership.folder) as server:
            server.membership.merge(OwnMembership(founder, "").roster.to_bytes())
            ticket = replace(ticket, addresses=tuple(server.addresses))
            with pytest.raises(NoSwarm):
                await redeem(ticket, "new")

    run(main())


def test_a_ticket_is_used_twice_at_the_same_moment(tmp_path: Path) -> None:
    """At one admin, and at two who do not know of each other's guest yet: one comes in."""
    founder = found(tmp_path / "a")
    second = let_in(founder, tmp_path / "b", Role.ADMIN)

    async def main() -> None:
        async with member(founder) as one, member(second, *one.addresses) as two:
            for addresses in ([one.addresses, one.addresses], [one.addresses, two.addresses]):
                ticket = invite(founder)
                one.membership.refresh()
                await one.rounds.tell_all()
                tickets = [replace(ticket, addresses=tuple(those)) for those in addresses]
                came = await asyncio.gather(*(redeem(each, "guest") for each in tickets), return_exceptions=True)
                assert sorted(type(result).__name__ for result in came) == ["NotAMember", "Redeemed"], came
                [refused] = [str(result) for result in came if isinstance(result, NotAMember)]
                assert "has been used up" in refused
                with home(tmp_path / "guest"):
                    [folder] = [result.keep(None) for result in came if isinstance(result, Redeemed)]
                for admin in (one, two):
                    admin.membership.standing("x", OwnMembership(folder, "x").certificate())

    run(main())


def test_a_certificate_renews_itself_and_streams_go_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rounds, "COMPARE", 0.2)
    monkeypatch.setattr(rounds, "LOOK", 0.1)
    founder = found(tmp_path / "a")
    folder = let_in(founder, lifetime=8, ago=3)

    async def main() -> None:
        async with member(founder) as admin, member(folder, *admin.addresses, client_mode=True) as user:
            shown = user.membership.certificate()
            standing = admin.membership.standing(user.peer_id, shown)
            before = folder.certificate()
            while folder.certificate().expires <= before.expires:
                await asyncio.sleep(0.1)
            after = folder.certificate()
            assert after.expires - after.issued == 8
            assert (after.admitted, after.role, after.name) == (before.admitted, before.role, before.name)
            assert user.membership.certificate() != shown
            standing.check()
            await asyncio.sleep(max(0.0, before.expires - time.time()) + 1)
            standing.check()  # by the old certificate, as the new one is known
            assert await user.directory.members()

    run(main())


def test_news_reach_those_who_are_not_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A revocation that only one member has heard: the others ask each other."""
    monkeypatch.setattr(rounds, "COMPARE", 0.5)
    founder = found(tmp_path / "a")
    folders = [let_in(founder, role=Role.SERVE) for _ in range(3)]
    leaver = let_in(founder)

    async def main() -> None:
        async with (
            member(folders[0]) as first,
            member(folders[1], *first.addresses) as second,
            member(folders[2], *first.addresses, client_mode=True) as third,
        ):
            monkeypatch.setattr(first.rounds, "spread", lambda: asyncio.sleep(0))
            first.membership.learn([founder.signer().revoke(leaver.key.public, int(time.time()))])
            begin = time.monotonic()
            while not all(leaver.key.public in one.membership.roster.revoked for one in (second, third)):
                await asyncio.sleep(0.05)
                assert time.monotonic() - begin < 10

    run(main())


def test_an_admin_is_put_out_and_those_it_let_in_stay(tmp_path: Path, command: Command) -> None:
    founder = found(tmp_path / "a")
    bad = let_in(founder, tmp_path / "b", Role.ADMIN, "bad")
    friend, foe = let_in(bad, tmp_path / "c", name="friend"), let_in(bad, name="foe")
    OwnMembership(bad, "").learn([bad.signer().revoke(foe.key.public, int(time.time()))])
    ours = OwnMembership(founder, "")
    ours.merge(OwnMembership(bad, "").roster.to_bytes())
    with home(tmp_path / "a"):
        outcome = command("revoke", "bad")
    assert outcome.code == 0, outcome.stderr
    assert "It had let in friend, who stay" in outcome.stderr
    ours.refresh()
    for folder, stays in ((bad, False), (friend, True), (foe, False)):
        shown = OwnMembership(folder, "x").certificate()
        if stays:
            assert ours.standing("x", shown).role is Role.USE
        else:
            with pytest.raises(Refused) as caught:
                ours.standing("x", shown)
            assert caught.value.why is Refusal.REVOKED
    # A member that hears of it late has a good certificate from then on.
    late = OwnMembership(friend, "x")
    late.merge(ours.roster.to_bytes())
    assert late.member.issuers == (founder.key.public,)
    assert friend.certificate() == late.member
    fresh = OwnMembership(let_in(founder), "y")
    fresh.merge(ours.roster.to_bytes())
    assert foe.key.public in fresh.roster.revoked
