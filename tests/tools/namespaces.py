"""Hosts as network namespaces: each with interfaces of its own, on bridges of its own. Linux only, as root.

Every namespace is held by a process that waits for the end of its input, so that the kernel removes it whatever becomes
of the tests. In one run commands (`Space.run`), our own ones (the fork server's `network`), or a function
(`Space.inside`).
"""

import contextlib
import ctypes
import functools
import ipaddress
import os
import shutil
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

_CLONE_NEWNET = 0x40000000
_ETH_P_ALL = 3
T = TypeVar("T")


@functools.cache
def why_not() -> str:
    """Why there can be no namespaces here; empty where there can be."""
    if sys.platform != "linux":
        return "network namespaces are Linux's"
    if os.geteuid() != 0:
        return "making network namespaces takes root"
    missing = [name for name in ("ip", "unshare", "nsenter") if shutil.which(name) is None]
    if missing:
        return f"network namespaces are made with {', '.join(missing)} of iproute2 and util-linux"
    try:
        with open_networks() as networks:
            networks.host("probe", networks.lan())
    except (AssertionError, OSError) as error:
        return f"network namespaces cannot be made here: {error}"
    return ""


@contextlib.contextmanager
def open_networks() -> "Iterator[Networks]":
    """Hosts and networks, gone with the end of the block."""
    with contextlib.ExitStack() as resources:
        yield Networks(resources)


def enter(network: Path | str) -> None:
    """Have this thread, and what it starts, be in a network namespace, as `Space.path` names it."""
    with open(network) as file:
        result = ctypes.CDLL(None, use_errno=True).setns(file.fileno(), _CLONE_NEWNET)
    assert result == 0, os.strerror(ctypes.get_errno())


class Space:
    """A network namespace."""

    def __init__(self, resources: contextlib.ExitStack):
        holder = subprocess.Popen(["unshare", "--net", "cat"], stdin=subprocess.PIPE)
        assert holder.stdin
        resources.callback(holder.wait)
        resources.callback(holder.stdin.close)
        self.pid = holder.pid
        self.path = Path(f"/proc/{holder.pid}/ns/net")
        """Which `setns` takes."""
        here = os.readlink("/proc/self/ns/net")
        deadline = time.monotonic() + 10
        while os.readlink(self.path) == here:  # until `unshare` has done it
            assert holder.poll() is None, "unshare failed"
            assert time.monotonic() < deadline, "unshare hangs"
            time.sleep(0.002)

    def run(self, *argv: str, check: bool = True) -> str:
        """What a command prints in here. It must succeed."""
        done = subprocess.run(["nsenter", f"--net={self.path}", *argv], capture_output=True, text=True, timeout=60)
        assert done.returncode == 0 or not check, f"{' '.join(argv)}: {done.stderr.strip()}"
        return done.stdout

    def inside(self, work: Callable[[], T]) -> T:
        """What `work` returns, run in a thread in here: its sockets and child processes are in here too."""

        with ThreadPoolExecutor(1, initializer=enter, initargs=(self.path,)) as thread:
            return thread.submit(work).result()


@dataclass
class Host:
    """A machine with interfaces, and commands in it."""

    name: str
    space: Space
    networks: "Networks"
    links: int = 0
    addresses: list[str] = field(default_factory=list)
    """Of all of its interfaces, without loopback."""

    def connect(self, lan: "Lan | None", *addresses: str) -> str:
        """A new interface of the network `lan`, with these addresses (10.0.0.1/24), link-local ones besides.

        Without addresses it has the next ones of the network; None: its cable leads nowhere. Returns its name.
        """
        name, self.links = f"eth{self.links}", self.links + 1
        if lan is None:
            lan = Lan(Space(self.networks.resources), [])
        addresses = addresses or tuple(lan.next_addresses())
        other = f"port{len(lan.ports)}"
        lan.ports.append(other)
        lan.space.run("ip", "link", "add", other, "type", "veth", "peer", "name", name, "netns", str(self.space.pid))
        if lan.is_bridge:
            lan.space.run("ip", "link", "set", other, "master", "lan")
            lan.space.run("ip", "link", "set", other, "up")
        if not any(":" in address for address in addresses):
            self.space.run("sh", "-c", f"echo 1 > /proc/sys/net/ipv6/conf/{name}/disable_ipv6")
        self.space.run("ip", "link", "set", name, "up")
        for address in addresses:
            nodad = ["nodad"] if ":" in address else []
            self.space.run("ip", "address", "add", address, "dev", name, *nodad)
            self.addresses.append(address.partition("/")[0])
        return name

    def add_decoy(self, address: str = "172.17.0.1/16") -> None:
        """A bridge with nobody on it, as Docker makes on every machine, with the same address on each."""
        self.space.run("ip", "link", "add", "docker0", "type", "bridge")
        self.space.run("ip", "address", "add", address, "dev", "docker0")
        self.space.run("ip", "link", "set", "docker0", "up")

    def route(self, to: str, via: str) -> None:
        """Reach the network `to` by way of the host with the address `via`."""
        self.space.run("ip", "route", "add", to, "via", via)

    def limit(self, interface: str, rate: str) -> None:
        """Send at `rate` ("1gbit") at most. The caller skips where the kernel cannot."""
        self.space.run(*f"tc qdisc add dev {interface} root tbf rate {rate} burst 256kb latency 50ms".split())

    def forward(self) -> None:
        """Be a router between the networks that this host is in. It passes on no multicast."""
        self.space.run("sh", "-c", "echo 1 > /proc/sys/net/ipv4/ip_forward")


class Lan:
    """A network that hosts are on: a bridge, or for a cable that leads nowhere only its end."""

    def __init__(self, space: Space, prefixes: list[str]):
        self.space = space
        self.prefixes = [ipaddress.ip_network(prefix) for prefix in prefixes]
        self.is_bridge = bool(prefixes)
        self.ports: list[str] = []
        if self.is_bridge:
            space.run("ip", "link", "add", "lan", "type", "bridge", "mcast_snooping", "0")
            space.run("ip", "link", "set", "lan", "up")

    def next_addresses(self) -> Iterator[str]:
        """One of each prefix, for the next host."""
        number = len(self.ports) + 1
        return (f"{prefix[number]}/{prefix.prefixlen}" for prefix in self.prefixes)


class Networks:
    """Makes hosts and networks; see `networks`."""

    def __init__(self, resources: contextlib.ExitStack):
        self.resources = resources

    def lan(self, *prefixes: str) -> Lan:
        """A network of hosts, whose addresses are in `prefixes`."""
        return Lan(Space(self.resources), list(prefixes) or ["10.77.0.0/24", "fd77::/64"])

    def host(self, name: str, *lans: Lan) -> Host:
        """A machine with an interface on each of `lans`."""
        space = Space(self.resources)
        space.run("ip", "link", "set", "lo", "up")
        made = Host(name, space, self)
        for lan in lans:
            made.connect(lan)
        return made


class Recorder:
    """Records where every packet goes that a host sends; loopback is left out."""

    def __init__(self, host: Host):
        self.destinations: set[tuple[str, str, int]] = set()
        """(address, udp or tcp or the protocol's number, port)."""
        self._socket = host.space.inside(
            lambda: socket.socket(socket.AF_PACKET, socket.SOCK_DGRAM, socket.htons(_ETH_P_ALL))
        )
        self._socket.settimeout(0.1)
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._read)

    def __enter__(self) -> "Recorder":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stopping.set()
        self._thread.join()
        self._socket.close()

    def outside(self, lan: Lan) -> set[str]:
        """The addresses that are neither in `lan` nor for whoever listens on it."""
        everywhere = {address: ipaddress.ip_address(address) for address, _, _ in list(self.destinations)}
        return {
            address
            for address, ip in everywhere.items()
            if not (ip.is_multicast or ip.is_link_local or any(ip in prefix for prefix in lan.prefixes))
        }

    def _read(self) -> None:
        while not self._stopping.is_set():
            try:
                packet, (interface, _, kind, *_) = self._socket.recvfrom(2048)
            except TimeoutError:
                continue
            if kind == socket.PACKET_OUTGOING and interface != "lo":
                with contextlib.suppress(ValueError, struct.error, IndexError):
                    self.destinations.add(_destination(packet))


def _destination(packet: bytes) -> tuple[str, str, int]:
    version = packet[0] >> 4
    if version == 4:
        protocol, address, rest = packet[9], ipaddress.IPv4Address(packet[16:20]), packet[(packet[0] & 15) * 4 :]
    elif version == 6:
        protocol, address, rest = packet[6], ipaddress.IPv6Address(packet[24:40]), packet[40:]
    else:
        raise ValueError("not IP")
    name = {6: "tcp", 17: "udp"}.get(protocol, str(protocol))
    return str(address), name, struct.unpack_from("!2xH", rest)[0] if protocol in (6, 17) else 0
