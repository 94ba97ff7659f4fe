"""A member's own port for direct connections (its door): opened, and described for its record."""

import ipaddress
from collections.abc import Iterable

import psutil
from hivemind.utils.multiaddr import Multiaddr

from bootstrap.addresses import ip_of, parts_of
from bootstrap.ports import ANY, bind
from protocol.errors import BadUsage
from protocol.records import MAX_DOOR_ADDRESSES, Door
from protocol.transport.direct import DirectListener
from protocol.transport.introduction import Credentials


class OwnDoor:
    """Where this member answers direct connections."""

    def __init__(self, me: Credentials, host: str, port: int, announced: Iterable[str]):
        """Bind a TCP port (0: any free one) of the IP address `host`, or of `ANY`.

        `announced`: what `parse_announced` takes. Raises `BadUsage` when the port cannot be had or an address makes no
        sense.
        """
        self._host = host
        self._announced = [parse_announced(address) for address in announced]
        if len(self._announced) > MAX_DOOR_ADDRESSES:
            raise BadUsage(
                f"{len(self._announced)} addresses for direct connections are too many; announce {MAX_DOOR_ADDRESSES}"
                " at most."
            )
        self.listener = DirectListener(me, bind(host, port, ", for direct connections"))

    def describe(self, addresses: Iterable[str]) -> Door | None:
        """The door for this member's record; None when nobody could reach it. `addresses`: its libp2p addresses."""
        found = self._announced or [(host, self.listener.port) for host in self._own_hosts(addresses)]
        if not found:
            return None
        return Door(fingerprint=self.listener.fingerprint, addresses=tuple(found[:MAX_DOOR_ADDRESSES]))

    def _own_hosts(self, addresses: Iterable[str]) -> list[str]:
        """The hosts in `addresses` that are this machine's own. A router's address leads to the libp2p port only."""
        own = {interface.address for interfaces in psutil.net_if_addrs().values() for interface in interfaces}
        hosts = dict.fromkeys(str(ip) for address in addresses if (ip := ip_of(Multiaddr(address))) is not None)
        listens_everywhere = self._host == ANY or ipaddress.ip_address(self._host).is_unspecified
        return [host for host in hosts if host in own and (listens_everywhere or host == self._host)]


def parse_announced(address: str) -> tuple[str, int]:
    """The host and the TCP port in an address like /ip4/192.0.2.1/tcp/31338. Raises `BadUsage`."""
    try:
        (kind, host), (tcp, port) = parts_of(Multiaddr(address)).items()
        if kind not in ("ip4", "ip6", "dns", "dns4", "dns6") or tcp != "tcp":
            raise ValueError
        Door(fingerprint="0" * 64, addresses=((host, int(port)),))
    except Exception as error:  # hivemind's Multiaddr raises errors of many kinds
        raise BadUsage(
            f"{address!r} is no address for direct connections; expected one like /ip4/192.0.2.1/tcp/31338."
        ) from error
    return host, int(port)
