"""Machines on a LAN find each other with nothing typed; each is a network namespace in which real commands run."""

import json
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import pytest

from protocol.membership.certificate import Role
from tests.tools.machines import Machine, machines
from tests.tools.namespaces import Host, Networks, Recorder
from tests.tools.swarm import ForkServer
from tests.tools.swarms import found, let_in

PEER = "QmZLpNtJqNU3utELa92YAA5urQkAyqcg1GjRDbEqbZWBhP"
Lab = Callable[..., AbstractContextManager[list[Machine]]]


@pytest.fixture
def lab(fork_server: ForkServer, tmp_path: Path) -> Lab:
    """Hosts -> machines of one swarm, of which the first has founded it; none knows an address of another."""

    @contextmanager
    def make(*hosts: Host, server: ForkServer = fork_server) -> Iterator[list[Machine]]:
        with machines(server, tmp_path, *hosts) as made:
            founder, *others = made
            admin = found(founder.home)
            for machine in others:
                let_in(admin, machine.home, Role.SERVE, machine.host.name)
            yield made

    return make


def start_node(*where: Machine, options: tuple[str, ...] = ()) -> None:
    """`peer bootstrap`, which is a member without a model, ready when this returns."""
    for node in [machine.start("bootstrap", *options) for machine in where]:
        node.wait_ready()


def who_is_up(machine: Machine) -> set[str]:
    """The members that `machine` sees now."""
    begin = time.time()
    rows = json.loads(machine.run("members", "--json"))
    return {row["name"] for row in rows if row["seen"] is not None and row["seen"] >= begin and not row["this"]}


def forget_addresses(*where: Machine) -> None:
    for machine in where:
        (machine.home / "swarms/lab/known.json").unlink(missing_ok=True)


@pytest.mark.parametrize("prefixes", [("fd77::/64",), ("10.77.0.0/24", "fd77::/64")], ids=["IPv6", "both"])
def test_after_a_reboot_in_any_order_and_without_the_founder(networks: Networks, lab: Lab, prefixes: tuple[str, ...]):
    lan = networks.lan(*prefixes)
    with lab(*(networks.host(name, lan) for name in ("founder", "two", "three", "laptop"))) as every:
        one, two, three, laptop = every
        start_node(three, one)
        assert who_is_up(laptop) == {"founder", "three"}
        for machine in every:
            machine.turn_off()
        forget_addresses(*every)
        start_node(two)
        assert who_is_up(laptop) == {"two"}
        start_node(three)
        assert who_is_up(laptop) == {"two", "three"}  # the founder is gone for good: any member is enough


def test_two_swarms_on_one_lan_do_not_see_each_other(networks: Networks, lab: Lab, fork_server: ForkServer):
    lan = networks.lan()
    with lab(networks.host("one", lan), networks.host("two", lan)) as (one, two):
        hosts = networks.host("stranger", lan), networks.host("guest", lan)
        with machines(fork_server, one.folder, *hosts) as (stranger, guest):
            let_in(found(stranger.home, "attic"), guest.home, name="guest")
            start_node(one, stranger)
            assert who_is_up(two) == who_is_up(guest) == {"founder"}
            stranger.turn_off()
            (guest.home / "swarms/attic/known.json").unlink()
            ended = guest.try_run("status")
            assert ended.code == 2
            assert ended.stderr.startswith("error: No other member of the swarm was found on this machine's networks")
            assert ended.stderr.count("\n") == 1


def test_a_dead_interface_and_a_decoy_cost_no_time(networks: Networks, lab: Lab):
    lan = networks.lan("10.77.0.0/24")
    one, two = networks.host("one"), networks.host("two")
    for number, host in enumerate((one, two)):
        host.connect(None, f"10.{number + 1}.0.1/24")
        host.add_decoy()
        host.connect(lan)
    with lab(one, two) as (founder, other):
        start_node(founder)
        begin = time.monotonic()
        assert who_is_up(other) == {"founder"}
        assert time.monotonic() - begin < 5


def test_a_cable_that_is_put_in_later(networks: Networks, lab: Lab):
    lan = networks.lan()
    with lab(networks.host("one"), networks.host("two", lan)) as (one, two):
        start_node(one, two)
        one.host.connect(lan)
        deadline = time.monotonic() + 20
        while who_is_up(two) != {"founder"}:
            assert time.monotonic() < deadline


def test_across_a_router_an_address_is_needed_once(networks: Networks, lab: Lab):
    near, far = networks.lan("10.77.0.0/24"), networks.lan("10.88.0.0/24")
    router = networks.host("router", near, far)
    router.forward()
    one, two = networks.host("one", near), networks.host("two", far)
    one.route("10.88.0.0/24", router.addresses[0])
    two.route("10.77.0.0/24", router.addresses[1])
    with lab(one, two) as (founder, other):
        node = founder.start("bootstrap")
        node.wait_ready()
        ended = other.try_run("status")
        assert ended.code == 2
        assert "where multicast does not reach, as behind a router, name the address" in ended.stderr
        other.run("status", "--swarm", "lab", "--initial-peers", node.address)
        assert who_is_up(other) == {"founder"}


def test_discovery_can_be_switched_off(networks: Networks, lab: Lab):
    lan = networks.lan()
    with lab(networks.host("one", lan), networks.host("two", lan)) as (one, two):
        with Recorder(one.host) as sent:
            start_node(one, options=("--no-discovery",))
            described = two.home / "swarms/lab/swarm.json"
            described.write_text(described.read_text().replace('"discovery": true', '"discovery": false'))
            ended = two.try_run("status")
        assert not [port for _, _, port in sent.destinations if port == 5353]
        assert ended.code == 2
        assert "has been seen yet; start one (`peer serve` or `peer bootstrap`), or give the address" in ended.stderr


@pytest.fixture(scope="module")
def online_server() -> Iterator[ForkServer]:
    """Whose processes may ask the hub, as those of users do."""
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("HF_HUB_OFFLINE")
        server = ForkServer()
    yield server
    server.close()


def test_nobody_outside_of_the_lan_is_contacted(networks: Networks, lab: Lab, llama: Path, online_server: ForkServer):
    """Every packet is recorded of a machine that could reach the Internet; name servers are outside of the LAN, too."""
    lan = networks.lan()
    router, *hosts = (networks.host(name, lan) for name in ("router", "one", "two"))
    for host in hosts:
        host.route("0.0.0.0/0", router.addresses[0])
        host.space.run("ip", "route", "add", "::/0", "via", router.addresses[1])
    with lab(*hosts, server=online_server) as (one, two), Recorder(hosts[0]) as first, Recorder(hosts[1]) as second:
        one.start("serve", str(llama), "--threads", "1").wait_ready()
        assert two.run("generate", str(llama), "w1 w2", "--max-new-tokens", "4")
        two.start("serve", "--threads", "1", str(llama), "--num-blocks", "2").wait_ready()
        for sent in (first, second):
            assert any(name == "tcp" for _, name, _ in sent.destinations)
            assert sent.outside(lan) == set()
        named = f"/ip4/203.0.113.9/tcp/1/p2p/{PEER}"
        two.start("bootstrap", "--swarm", "lab", "--initial-peers", named).wait_ready()
        assert second.outside(lan) == {"203.0.113.9"}
