"""Machines on a network of their own: network namespaces whose interfaces hang on one bridge. Needs root, and Linux."""

import itertools
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress

_NUMBERS = itertools.count()


def why_not() -> str:
    """Why there can be no namespaces here; empty: nothing is in the way."""
    if sys.platform != "linux" or shutil.which("ip") is None:
        return "network namespaces need Linux, and the command `ip`"
    if os.geteuid():
        return "only root may make network namespaces"
    name = f"ht{os.getpid()}x"
    try:
        ip("netns", "add", name)
        ip("netns", "del", name)
    except subprocess.CalledProcessError as error:
        return f"network namespaces cannot be made here: {error.stderr.strip()}"
    return ""


def ip(*arguments: str) -> None:
    """The command `ip`."""
    subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True)


class Network:
    """A bridge in a namespace of its own, and machines on it."""

    def __init__(self) -> None:
        self._name = f"ht{os.getpid() % 100000}n{next(_NUMBERS)}"
        self.machines: list[str] = []
        self._add(self._name)
        ip("-n", self._name, "link", "add", "bridge", "type", "bridge")
        ip("-n", self._name, "link", "set", "bridge", "up")

    def machine(self, *addresses: str) -> str:
        """A new machine with these addresses (with prefix length); the name of its namespace."""
        name = f"{self._name}m{len(self.machines)}"
        self._add(name)
        self.machines.append(name)
        ip("-n", name, "link", "set", "lo", "up")
        if addresses:
            self.plug_in(name, *addresses)
        return name

    def plug_in(self, machine: str, *addresses: str, interface: str = "eth0") -> None:
        """Connect a machine to the bridge."""
        port = f"p{next(_NUMBERS)}"
        ip("-n", self._name, "link", "add", port, "type", "veth", "peer", "name", interface, "netns", machine)
        ip("-n", self._name, "link", "set", port, "master", "bridge", "up")
        for address in addresses:
            ip("-n", machine, "addr", "add", address, "dev", interface, *(["nodad"] if ":" in address else []))
        ip("-n", machine, "link", "set", interface, "up")

    def decoy(self, machine: str, address: str) -> None:
        """A bridge that leads nowhere, with an address that others have too: as Docker makes one."""
        ip("-n", machine, "link", "add", "docker0", "type", "bridge")
        ip("-n", machine, "addr", "add", address, "dev", "docker0")
        ip("-n", machine, "link", "set", "docker0", "up")

    def route_to(self, machine: str, gateway: str) -> None:
        """Have a machine send what leaves its networks to the machine at the address `gateway`."""
        ip("-n", machine, "route", "add", "default", "via", gateway)

    def close(self) -> None:
        """Remove all of it."""
        for name in (*self.machines, self._name):
            with suppress(subprocess.CalledProcessError):
                ip("netns", "del", name)

    def _add(self, name: str) -> None:
        ip("netns", "add", name)


@contextmanager
def recorded(machine: str) -> Iterator[list[str]]:
    """The destinations of all IP packets that reach a machine within the block and are for neither it nor a group."""
    heard: list[str] = []
    process = subprocess.Popen(
        ["ip", "netns", "exec", machine, sys.executable, "-u", "-c", _LISTEN], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout
    assert process.stdout.readline() == "ready\n"
    try:
        yield heard
    finally:
        process.terminate()
        heard += process.stdout.read().split()
        process.wait()


_LISTEN = """
import ipaddress, socket, subprocess
own = subprocess.run(["ip", "-o", "addr"], capture_output=True, text=True).stdout
ears = socket.socket(socket.AF_PACKET, socket.SOCK_DGRAM, socket.htons(3))
print("ready")
while True:
    data, (_, kind, packet_type, *_) = ears.recvfrom(65536)
    part = {0x800: data[16:20], 0x86DD: data[24:40]}.get(kind)
    if part and packet_type == 0:
        address = ipaddress.ip_address(part)
        if not address.is_multicast and not address.is_link_local and f" {address}/" not in own:
            print(address)
"""


@contextmanager
def new_network() -> Iterator[Network]:
    """A network without machines yet; gone at the end of the block."""
    network = Network()
    try:
        yield network
    finally:
        network.close()
