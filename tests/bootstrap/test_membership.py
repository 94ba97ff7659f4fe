"""Certificates, rosters, folders and tickets of private swarms. No p2pd, no model."""

import os
import stat
import time
from contextlib import suppress
from pathlib import Path

import pytest

from bootstrap.membership.folder import Known, SwarmFolder, choose_swarm, open_swarm, swarm_names
from bootstrap.membership.own import OwnMembership
from bootstrap.membership.packed import fits
from bootstrap.membership.roster import Roster
from bootstrap.membership.ticket import MAX_CHARACTERS, Ticket
from protocol.errors import BadUsage, NotAllowed, NotAMember
from protocol.membership import membership_pb2 as pb
from protocol.membership.certificate import (
    ADMIN_LIFETIME,
    LIFETIME,
    MAX_CERTIFICATE_BYTES,
    MAX_CHAIN,
    BadStatement,
    Certificate,
    Process,
    Role,
    Signer,
    SigningKey,
    read_statement,
)
from protocol.membership.refusals import Refusal, Refused
from tests.tools.swarms import found, home, let_in, revoke

NOW = 1_800_000_000
ROOT = SigningKey(bytes(32))
PEER = "QmZLpNtJqNU3utELa92YAA5urQkAyqcg1GjRDbEqbZWBhP"


def certify(by: Signer, role: Role, seed: int, now: int = NOW, lifetime: int = LIFETIME, **fields: object) -> Signer:
    """A member with the key of `seed`, certified by `by`."""
    key = SigningKey(bytes([seed]) * 32)
    certificate = read_statement(ROOT.public, by.certify(key.public, role, f"m{seed}", now, lifetime, **fields))
    assert isinstance(certificate, Certificate)
    return Signer(key, certificate)


TOP = Signer(ROOT, None)
ADMIN = certify(TOP, Role.ADMIN, 1, lifetime=ADMIN_LIFETIME)


# Certificates


def test_a_chain_leads_from_the_root_to_a_process() -> None:
    user = certify(ADMIN, Role.USE, 2)
    process = read_statement(ROOT.public, user.certify_process(PEER))
    assert isinstance(process, Process)
    assert (process.peer_id, process.member) == (PEER, user.certificate)
    assert (process.member.role, process.member.name, process.member.expires) == (Role.USE, "m2", NOW + LIFETIME)
    assert process.member.issuers == (ADMIN.key.public,)
    assert len(process.signed) < 500


def test_nobody_says_what_he_may_not_say() -> None:
    user, server = certify(ADMIN, Role.USE, 2), certify(ADMIN, Role.SERVE, 3)
    stranger = Signer(SigningKey(bytes([9]) * 32), None)
    impostor = Signer(SigningKey(bytes([9]) * 32), ADMIN.certificate)
    key, late = bytes(32), NOW + ADMIN_LIFETIME + 10
    for signer in (user, server, stranger, impostor):
        for said in (
            signer.certify(key, Role.USE, "x", NOW, LIFETIME),
            signer.revoke(ADMIN.key.public, NOW),
            signer.invite(bytes(16), Role.USE, 1, NOW + 60, LIFETIME),
        ):
            with pytest.raises(BadStatement):
                read_statement(ROOT.public, said)
    process = Signer(user.key, None)
    for said in (
        stranger.certify_process(PEER),
        impostor.certify_process(PEER),
        process.certify_process(PEER),
        TOP.certify_process(PEER),
        ADMIN.certify(key, Role.USE, "x", late, LIFETIME),
        ADMIN.certify(key, Role.USE, "x", NOW - 10 * 86_400, LIFETIME),
        ADMIN.certify(b"short", Role.USE, "x", NOW, LIFETIME),
        ADMIN.certify(key, Role.USE, "x" * 41, NOW, LIFETIME),
        ADMIN.certify(key, Role.USE, "\x1b[2J", NOW, LIFETIME),
        ADMIN.certify(key, Role.USE, "x", NOW, 2 * ADMIN_LIFETIME),
        ADMIN.certify(key, Role.USE, "x", NOW, LIFETIME, admitted=NOW + 1),
        ADMIN.invite(b"short", Role.USE, 1, NOW + 60, LIFETIME),
        ADMIN.invite(bytes(16), Role.USE, 0, NOW + 60, LIFETIME),
    ):
        with pytest.raises(BadStatement):
            read_statement(ROOT.public, said)
    with pytest.raises(BadStatement):
        read_statement(SigningKey(bytes([7]) * 32).public, user.certify_process(PEER))


def test_every_byte_of_a_statement_counts() -> None:
    genuine = certify(ADMIN, Role.USE, 2).certify_process(PEER)
    said = read_statement(ROOT.public, genuine)
    for place in range(len(genuine)):
        changed = genuine[:place] + bytes([genuine[place] ^ 1]) + genuine[place + 1 :]
        with suppress(BadStatement):
            assert read_statement(ROOT.public, changed) == said  # what nobody has signed is left out
        with pytest.raises(BadStatement):
            read_statement(ROOT.public, genuine[:place])
    with pytest.raises(BadStatement):
        read_statement(ROOT.public, genuine + bytes(MAX_CERTIFICATE_BYTES))


def test_a_chain_has_an_end() -> None:
    signer = TOP
    for seed in range(1, MAX_CHAIN + 1):
        signer = certify(signer, Role.ADMIN, seed, lifetime=ADMIN_LIFETIME)
    with pytest.raises(BadStatement):
        certify(signer, Role.ADMIN, 99)


# Rosters


def roster(*statements: bytes) -> Roster:
    made = Roster(ROOT.public)
    made.add(statements)
    return made


def why(known: Roster, shown: Signer, now: float = NOW) -> Refusal | None:
    try:
        known.check(shown.certificate, now)
    except Refused as refused:
        return refused.why
    return None


def test_rosters_that_heard_the_same_are_equal() -> None:
    now = int(time.time())
    admin = certify(TOP, Role.ADMIN, 1, now, ADMIN_LIFETIME)
    user = certify(admin, Role.USE, 2, now)
    renewed = certify(admin, Role.USE, 2, now + 5)
    said = [
        admin.certificate.signed, user.certificate.signed, renewed.certificate.signed,
        admin.invite(bytes(16), Role.USE, 1, now + 60, LIFETIME),
        admin.invite(bytes(16), Role.USE, 1, now + 60, LIFETIME, cancelled=True),
        admin.revoke(certify(admin, Role.USE, 3, now).key.public, now),
    ]  # fmt: skip
    forward, backward = roster(*said), roster(*reversed(said))
    assert forward.to_bytes() == backward.to_bytes()
    assert forward.members[user.key.public] == renewed.certificate
    assert forward.invitations[bytes(16)].cancelled
    assert not forward.merge(backward.to_bytes())
    other = Roster(ROOT.public, forward.to_bytes())
    assert other.digest() == forward.digest()
    junk = pb.Roster.FromString(forward.to_bytes())
    junk.statements.add(statement=b"x", signature=b"y")
    assert not other.merge(junk.SerializeToString() + b"\xff")
    assert not other.merge(b"\xff\xff")


def test_who_is_out_is_out_whatever_he_shows() -> None:
    user, renewed = certify(ADMIN, Role.USE, 2), certify(ADMIN, Role.USE, 2, NOW + 9)
    known = roster()
    assert why(known, user) is None
    assert why(known, user, NOW + LIFETIME) is Refusal.EXPIRED
    known.add([renewed.certificate.signed])
    assert why(known, user, NOW + LIFETIME) is None  # its streams go on when it renews
    known.add([ADMIN.revoke(user.key.public, NOW)])
    assert why(known, user) is why(known, renewed) is Refusal.REVOKED


def test_a_lower_role_counts_as_soon_as_it_is_known() -> None:
    admin, demoted = certify(TOP, Role.ADMIN, 5, lifetime=ADMIN_LIFETIME), certify(TOP, Role.USE, 5, NOW + 1)
    assert roster(demoted.certificate.signed).check(admin.certificate, NOW).role is Role.USE


def test_an_admin_who_is_out_takes_along_whom_nobody_else_vouches_for() -> None:
    bad = certify(TOP, Role.ADMIN, 5, lifetime=ADMIN_LIFETIME)
    friend, victim = certify(bad, Role.USE, 6), certify(ADMIN, Role.USE, 7)
    known = roster(bad.certificate.signed, friend.certificate.signed, ADMIN.revoke(bad.key.public, NOW))
    assert why(known, friend) is Refusal.ISSUER_REVOKED
    assert known.certified_by(bad.key.public) == [friend.certificate]
    # What he says now is not heard; that another vouches for the member is.
    assert not known.add([bad.revoke(victim.key.public, NOW - 99), certify(bad, Role.USE, 8).certificate.signed])
    assert why(known, victim) is None
    known.add([certify(ADMIN, Role.USE, 6, NOW + 1).certificate.signed])
    assert why(known, friend) is None
    # What he said before, and was heard in order, stands.
    assert why(roster(ADMIN.revoke(bad.key.public, NOW), bad.revoke(victim.key.public, NOW - 1)), victim) is not None


def test_of_more_than_an_invitation_is_good_for_the_first_count() -> None:
    invitation = ADMIN.invite(b"i" * 16, Role.USE, 2, NOW + 60, LIFETIME)
    came = [certify(ADMIN, Role.USE, seed, NOW + 10 - seed, invitation=b"i" * 16) for seed in range(2, 6)]
    known = roster(invitation, *(one.certificate.signed for one in came))
    assert [why(known, one, NOW + 20) for one in came] == [Refusal.TOO_LATE, Refusal.TOO_LATE, None, None]


# Folders


def test_a_folder_is_its_owners(tmp_path: Path) -> None:
    folder = found(tmp_path)
    OwnMembership(folder, PEER)
    folder.remember({PEER: Known(member="", seen=1.0, version="1", addresses=("/ip4/192.0.2.1/tcp/1/p2p/" + PEER,))})
    folder.save_port(1234)
    for path in folder.path.rglob("*"):
        assert stat.S_IMODE(path.stat().st_mode) & 0o077 == 0, path
    assert stat.S_IMODE(folder.path.stat().st_mode) == 0o700
    again = SwarmFolder(folder.path)
    assert (again.root, again.key.public, again.port) == (folder.root, folder.key.public, 1234)
    assert again.addresses() == ("/ip4/192.0.2.1/tcp/1/p2p/" + PEER,)
    assert again.addresses(without=[PEER]) == ()
    assert "secret" not in repr(folder)
    (folder.path / "member.key").chmod(0o644)
    with pytest.raises(BadUsage, match="can be read by every user"):
        SwarmFolder(folder.path)


def test_the_swarm_that_is_meant(tmp_path: Path) -> None:
    with home(tmp_path):
        assert choose_swarm(None, has_addresses=False) is None
        with pytest.raises(BadUsage, match=r"knows no swarm called 'lab'.*knows none"):
            open_swarm("lab")
        first = SwarmFolder.create("lab", "me")
        assert choose_swarm(None, has_addresses=False).root == first.root
        assert choose_swarm(None, has_addresses=True) is None
        assert choose_swarm("lab", has_addresses=True).root == first.root
        assert choose_swarm("open", has_addresses=False) is None
        SwarmFolder.create("b-2", "me")
        with pytest.raises(BadUsage, match="knows the swarms b-2, lab; choose one with --swarm"):
            choose_swarm(None, has_addresses=False)
        with pytest.raises(BadUsage, match="knows a swarm called 'lab' already"):
            SwarmFolder.create("lab", "me")
        assert SwarmFolder(first.path).root == first.root
        for name in ("open", "", "../up", "UP", "a" * 41, "a b", ".a"):
            with pytest.raises(BadUsage, match="no name for a swarm"):
                SwarmFolder.create(name, "me")
        open_swarm("b-2").forget()
        assert swarm_names() == ["lab"]
        assert sorted(path.name for path in (tmp_path / "swarms").iterdir()) == ["lab"]
        (first.path / "swarm.json").write_text("{}")
        with pytest.raises(BadUsage, match="is damaged; forget the swarm"):
            open_swarm("lab")


def test_processes_of_a_machine_share_what_they_learn(tmp_path: Path) -> None:
    folder = found(tmp_path / "a")
    one, two, calls = OwnMembership(folder, "one"), OwnMembership(folder, "two"), []
    two.changed.append(lambda: calls.append(1))
    member = let_in(folder, tmp_path / "b")
    assert two.refresh()
    assert not two.refresh()
    assert calls == [1]
    assert member.key.public in two.roster.members
    shown = OwnMembership(member, "theirs").certificate()
    assert one.standing("theirs", shown).role is Role.USE
    revoke(folder, member)
    one.refresh()
    with pytest.raises(Refused) as caught:
        one.standing("theirs", shown)
    assert caught.value.why is Refusal.REVOKED
    assert two.standing("theirs", shown).role is Role.USE  # it has not looked yet


def test_a_member_may_what_its_role_says(tmp_path: Path) -> None:
    folder = found(tmp_path / "a")
    user = OwnMembership(let_in(folder), PEER)
    user.check_own(Role.USE)
    with pytest.raises(NotAllowed, match=r"role in the swarm lab is use, and this takes admin: .*--role admin`\.$"):
        user.signer()
    with pytest.raises(NotAMember, match="has expired"):
        OwnMembership(let_in(folder, lifetime=5, ago=9), PEER).check_own(Role.USE)


def test_the_root_key_makes_an_admin(tmp_path: Path) -> None:
    founder = found(tmp_path / "a")
    member = let_in(founder, tmp_path / "b")
    other = found(tmp_path / "c")
    junk = tmp_path / "junk"
    junk.write_text("junk")
    with home(tmp_path / "b"):
        for file, said in (
            (other.path, "another swarm than lab"),
            (junk, "is no root key"),
            (tmp_path, "cannot be read"),
        ):
            with pytest.raises(BadUsage, match=said):
                member.recover(file / "root.key" if file == other.path else file, "new")
        revoke(founder, member)
        again = member.recover(founder.path / "root.key", "new")
    assert (again.name, again.certificate().role, again.certificate().issuers) == ("lab", Role.ADMIN, ())
    ours = OwnMembership(founder, "x")
    ours.standing("y", OwnMembership(again, "y").certificate())
    new = OwnMembership(again, "y")
    assert new.learn([new.signer().revoke(founder.key.public, int(time.time()))])
    assert ours.merge(new.roster.to_bytes())
    with pytest.raises(NotAMember, match="has been revoked"):
        ours.signer()


def test_nobody_puts_out_who_vouches_for_him(tmp_path: Path) -> None:
    founder = found(tmp_path / "a")
    second = let_in(founder, role=Role.ADMIN)
    ours = OwnMembership(second, "x")
    with pytest.raises(NotAllowed, match=r"founder has let this machine in.*peer swarm recover"):
        ours.put_out(founder.certificate())
    assert not ours.roster.revoked


# Tickets


def ticket(*addresses: str) -> Ticket:
    return Ticket(os.urandom(32), os.urandom(16), NOW, addresses)


@pytest.mark.parametrize(
    "addresses",
    [
        (),
        (f"/ip4/192.0.2.1/tcp/31337/p2p/{PEER}",),
        (f"/ip4/192.0.2.1/tcp/31337/p2p/{PEER}", f"/ip6/2001:db8::1/tcp/1/p2p/{PEER}"),
    ],
)
def test_a_ticket_survives_a_chat_program(addresses: tuple[str, ...]) -> None:
    made = ticket(*addresses)
    text = made.to_text()
    assert len(text) <= MAX_CHARACTERS
    assert all(letter.isalnum() or letter in "-_" for letter in text)
    assert Ticket.from_text(text) == Ticket.from_text(f" {text[:50]}\n{text[50:]} ") == made


def test_a_ticket_with_too_many_addresses_is_short() -> None:
    many = tuple(f"/ip6/2001:db8::{number}/tcp/{number}/p2p/{PEER}" for number in range(1, 30))
    text = ticket(*many).to_text()
    assert len(text) <= MAX_CHARACTERS
    assert Ticket.from_text(text).addresses == many[: len(Ticket.from_text(text).addresses)] != ()
    assert not fits(f"/dns4/a.org/tcp/1/p2p/{PEER}")
    assert not fits(f"/ip4/192.0.2.1/udp/1/quic/p2p/{PEER}")
    assert not fits("nonsense")


def test_what_is_no_ticket() -> None:
    text = ticket(f"/ip4/192.0.2.1/tcp/31337/p2p/{PEER}").to_text()
    for place in range(10, len(text)):
        damaged = text[:place] + ("A" if text[place] != "A" else "B") + text[place + 1 :]
        with pytest.raises(BadUsage, match="ticket is damaged; copy the whole line"):
            Ticket.from_text(damaged)
    with pytest.raises(BadUsage, match="is damaged"):
        Ticket.from_text(text[:-1])
    with pytest.raises(BadUsage, match="another version of hivetune"):
        Ticket.from_text(text.replace("hivetune1-", "hivetune2-"))
    with pytest.raises(BadUsage, match="is no ticket"):
        Ticket.from_text("K10abc::server:1")
