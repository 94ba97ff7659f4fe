"""Members of one swarm find each other on the networks that they share; hosts are network namespaces."""

import contextlib
import socket
import time
from collections.abc import Iterator

import pytest
from zeroconf import DNSOutgoing, DNSPointer, DNSService, DNSText, ServiceBrowser, Zeroconf
from zeroconf.const import _CLASS_IN, _FLAGS_AA, _FLAGS_QR_RESPONSE, _TYPE_PTR, _TYPE_SRV, _TYPE_TXT

from bootstrap.discovery import discovery
from bootstrap.discovery.discovery import SERVICE
from tests.tools.namespaces import Host, Networks
from tests.tools.seekers import LAB, OTHER, Seeker, peer_id, seekers


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(discovery, "LOOK", 0.2)


@pytest.mark.parametrize(
    "prefixes", [("10.77.0.0/24",), ("fd77::/64",), ("10.77.0.0/24", "fd77::/64")], ids=["IPv4", "IPv6", "both"]
)
def test_members_find_each_other_and_nobody_else(networks: Networks, prefixes: tuple[str, ...]):
    lan = networks.lan(*prefixes)
    one, two, client, stranger = (networks.host(name, lan) for name in ("one", "two", "client", "stranger"))
    with (
        seekers(stranger, swarm=OTHER) as [other],
        seekers(one, two) as [first, second],
        seekers(client, announce=False) as [user],
    ):
        first.wait_for("two")
        second.wait_for("one")
        user.wait_for("one", "two")
        assert first.found == {"two": set(two.addresses)}
        assert user.found == {"one": set(one.addresses), "two": set(two.addresses)}
        assert other.found == {}


def test_a_dead_interface_and_a_decoy_do_no_harm(networks: Networks):
    lan, elsewhere = networks.lan("10.77.0.0/24"), networks.lan("10.88.0.0/24")
    one, two = networks.host("one"), networks.host("two")
    one.connect(None, "10.5.0.1/24")
    two.connect(None, "10.6.0.1/24")
    for host in (one, two):
        host.add_decoy()
        host.connect(lan)
    one.connect(elsewhere)
    with seekers(one, two) as [first, second]:
        first.wait_for("two")
        second.wait_for("one")
        # What another has in networks that this machine is not in is not believed to be of use.
        assert second.found == {"one": {"10.77.0.1", "172.17.0.1"}}


def test_an_interface_may_come_later_and_go_again(networks: Networks):
    lan = networks.lan("10.77.0.0/24")
    one, two, client = (networks.host(name) for name in ("one", "two", "client"))
    one.connect(lan)
    with seekers(one, two) as [first, second], seekers(client, announce=False) as [user]:
        time.sleep(0.5)
        cable = two.connect(lan)
        client.connect(lan)
        first.wait_for("two")
        second.wait_for("one")
        user.wait_for("one", "two")
        two.space.run("ip", "address", "flush", "dev", cable)
        time.sleep(0.5)
        two.space.run("ip", "address", "add", "10.77.0.99/24", "dev", cable)
        for seeker in (first, user):
            seeker.wait_for(*seeker.found, until=lambda seeker=seeker: seeker.found["two"] == {"10.77.0.99"})


def test_a_restarted_member_is_found_where_it_is_now(networks: Networks):
    lan = networks.lan("10.77.0.0/24")
    one, two = networks.host("one", lan), networks.host("two", lan)
    with seekers(one) as [first]:
        with seekers(two):
            first.wait_for("two")
        first.found.clear()
        with seekers(two) as [second]:
            first.wait_for("two")
            second.wait_for("one")


def test_where_multicast_does_not_reach_nobody_is_found(networks: Networks):
    near, far = networks.lan("10.77.0.0/24"), networks.lan("10.88.0.0/24")
    router = networks.host("router", near, far)
    router.forward()
    one, two = networks.host("one", near), networks.host("two", far)
    one.route("10.88.0.0/24", router.addresses[0])
    two.route("10.77.0.0/24", router.addresses[1])
    with seekers(one, two) as [first, second]:
        time.sleep(1.5)
        assert first.found == second.found == {}


def test_a_new_day_brings_a_new_name(networks: Networks, monkeypatch: pytest.MonkeyPatch):
    lan = networks.lan("10.77.0.0/24")
    one, two, observer = (networks.host(name, lan) for name in ("one", "two", "observer"))
    days = [20_000]
    monkeypatch.setattr(discovery, "day_of", lambda now: days[0])
    with overheard(observer) as names, seekers(one, two) as [first, second]:
        first.wait_for("two")
        second.wait_for("one")
        before = set(names)
        assert len(before) == 2
        first.found.clear()
        days[0] += 1
        first.wait_for("two")
        deadline = time.monotonic() + 5
        while len(names) < 4:
            assert time.monotonic() < deadline, names
            time.sleep(0.05)
        assert len({name[at : at + 16] for name in names for at in (0, 16)}) == 8


def test_what_an_outsider_hears(networks: Networks):
    lan = networks.lan("10.77.0.0/24")
    one, two, observer = (networks.host(name, lan) for name in ("one", "two", "observer"))
    with packets(observer) as heard, seekers(one, two) as [first, _]:
        first.wait_for("two")
        time.sleep(0.5)
    everything = b"".join(heard)
    assert b"_hivetune" in everything
    for told in (b"one----", b"two----", b"31337", peer_id("one").encode(), bytes([10, 77, 0, 1])):
        assert told not in everything


def test_without_any_network_nothing_fails(networks: Networks):
    host = networks.host("alone")
    host.space.run("ip", "link", "set", "lo", "down")
    seeker = Seeker(host, LAB, announces=True)
    time.sleep(0.5)
    assert seeker.is_running()
    seeker.close()


# Hostile answers


def test_forged_answers_lead_nowhere(networks: Networks):
    """Malformed ones, a flood of them, and a member's own name with other words."""
    lan = networks.lan("10.77.0.0/24")
    one, two, mallory = (networks.host(name, lan) for name in ("one", "two", "mallory"))
    with seekers(one) as [first], overheard(mallory) as names:
        deadline = time.monotonic() + 5
        while not names:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        [true_name] = names
        with mallory.space.inside(lambda: socket.socket(socket.AF_INET, socket.SOCK_DGRAM)) as sender:
            sender.setsockopt(socket.IPPROTO_IP, socket.IP_MULTICAST_IF, socket.inet_aton(mallory.addresses[0]))
            for packet in forgeries(true_name):
                with contextlib.suppress(BlockingIOError):
                    sender.sendto(packet, ("224.0.0.251", 5353))
        with seekers(two) as [second]:
            first.wait_for("two")
            second.wait_for("one")
            assert second.found == {"one": set(one.addresses)}


def forgeries(true_name: str) -> Iterator[bytes]:
    yield b""
    yield b"\xff" * 600
    texts = [b"", b"\x00", b"\xff" * 300, b"\x05" + b"0=abc", b"\x030=\xff" * 50, b"\xc90=" + bytes(199)]
    for text in texts:
        packet = answer(true_name, text)
        yield packet
        yield packet[: len(packet) // 2]
        yield packet[:12] + b"\xc0\x0c" + packet[14:]  # a name that leads to itself
    for number in range(2000):
        yield answer(f"{number:032x}", b"\xc90=" + bytes(199))
    yield answer("x" * 60, b"")
    yield answer("\N{SNOWMAN}", b"")


def answer(name: str, text: bytes) -> bytes:
    """An mDNS packet that announces `name` with this TXT record."""
    out, full = DNSOutgoing(_FLAGS_QR_RESPONSE | _FLAGS_AA), f"{name}.{SERVICE}"
    out.add_answer_at_time(DNSPointer(SERVICE, _TYPE_PTR, _CLASS_IN, 4500, full), 0)
    out.add_answer_at_time(DNSService(full, _TYPE_SRV, _CLASS_IN, 120, 0, 0, 0, full), 0)
    out.add_answer_at_time(DNSText(full, _TYPE_TXT, _CLASS_IN, 4500, text), 0)
    [packet] = out.packets()
    return bytes(packet)


@contextlib.contextmanager
def overheard(host: Host) -> Iterator[set[str]]:
    """The names that a plain DNS-SD browser on a host hears."""
    names: set[str] = set()

    def hear(name: str, **_: object) -> None:
        names.add(name.removesuffix(f".{SERVICE}"))

    zeroconf = host.space.inside(lambda: Zeroconf(use_asyncio=False))
    ServiceBrowser(zeroconf, SERVICE, [hear])
    try:
        yield names
    finally:
        zeroconf.close()


@contextlib.contextmanager
def packets(host: Host) -> Iterator[list[bytes]]:
    """What follows the UDP header of every multicast DNS packet that reaches a host."""

    def listen() -> socket.socket:
        sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        sock.bind(("", 5353))
        group = socket.inet_aton("224.0.0.251") + socket.inet_aton(host.addresses[0])
        sock.setsockopt(socket.IPPROTO_IP, socket.IP_ADD_MEMBERSHIP, group)
        sock.setblocking(False)
        return sock

    found: list[bytes] = []
    with host.space.inside(listen) as sock:
        yield found
        with contextlib.suppress(BlockingIOError):
            while True:
                found.append(sock.recv(9000))
