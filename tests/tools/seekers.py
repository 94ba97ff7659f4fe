"""Members that do nothing but look for each other, on hosts that are network namespaces, in threads of this process."""

import asyncio
import contextlib
import threading
import time
from collections.abc import Callable, Iterator

import base58

from bootstrap.discovery.discovery import Discovery
from bootstrap.discovery.networks import Interface
from protocol.machine.event_loop import new_event_loop
from protocol.membership.secret import SECRET_BYTES, SwarmSecret
from tests.tools.namespaces import Host

LAB, OTHER = SwarmSecret(b"l" * SECRET_BYTES), SwarmSecret(b"o" * SECRET_BYTES)
"""Two swarms."""


def peer_id(name: str) -> str:
    return base58.b58encode(b"\x12\x20" + name.encode().ljust(32, b"-")).decode()


def address_on(interface: Interface, name: str) -> str:
    return f"/ip{interface.version}/{interface.ip}/tcp/31337/p2p/{peer_id(name)}"


class Seeker:
    """A `Discovery` on a host; `found` is what it found: name of another -> addresses."""

    def __init__(self, host: Host, swarm: SwarmSecret, announces: bool):
        self.name = host.name
        self.found: dict[str, set[str]] = {}
        self._announces = announces
        self._loop = new_event_loop()
        discovery = Discovery(swarm, self._own, self._hear)
        self._task = self._loop.create_task(discovery.run())
        self._thread = threading.Thread(target=lambda: host.space.inside(self._run))
        self._thread.start()

    def wait_for(self, *names: str, until: Callable[[], bool] = lambda: True, timeout: float = 10) -> None:
        """Until these, and no others, have been found."""
        deadline = time.monotonic() + timeout
        while set(self.found) != set(names) or not until():
            assert time.monotonic() < deadline, f"{self.name} found {self.found}"
            time.sleep(0.01)

    def is_running(self) -> bool:
        return not self._task.done()

    def close(self) -> None:
        self._loop.call_soon_threadsafe(self._task.cancel)
        self._thread.join()
        self._loop.close()

    def _run(self) -> None:
        with contextlib.suppress(asyncio.CancelledError):
            self._loop.run_until_complete(self._task)

    def _own(self, interfaces: frozenset[Interface]) -> list[str]:
        return sorted(address_on(interface, self.name) for interface in interfaces) if self._announces else []

    def _hear(self, addresses: list[str]) -> None:
        [who] = {base58.b58decode(address.rpartition("/")[2])[2:].decode().rstrip("-") for address in addresses}
        self.found[who] = {address.partition("/tcp/")[0].rpartition("/")[2] for address in addresses}


@contextlib.contextmanager
def seekers(*hosts: Host, swarm: SwarmSecret = LAB, announce: bool = True) -> Iterator[list[Seeker]]:
    """One on each of `hosts`."""
    made = [Seeker(host, swarm, announce) for host in hosts]
    try:
        yield made
    finally:
        for seeker in made:
            seeker.close()
