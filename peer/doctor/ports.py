"""Checks of what a member listens with: p2pd, and the ports."""

import time

import psutil

from bootstrap.identity import Identity
from bootstrap.member import MemberOptions, start_daemon
from bootstrap.ports import bind
from peer.doctor.case import Case
from peer.doctor.check import Finding, Findings, ok, wrong
from protocol.errors import BadUsage, SwarmError

_P2PD = "p2pd"


async def p2pd(case: Case) -> Findings:
    """Whether it starts."""
    identity, begin = Identity.load_or_create(None), time.monotonic()
    try:
        daemon = await start_daemon(MemberOptions(client_mode=True), identity)
    except SwarmError as error:
        mend = "Do what the sentence says; if it says nothing, install hivemind again, and look into the system's log."
        return [wrong(str(error), mend)]
    finally:
        identity.close()
    took = time.monotonic() - begin
    await daemon.stop()
    return [ok(f"It starts, in {took:.1f} s.")]


async def listening(case: Case) -> Findings:
    """Whether the ports can be had."""
    options = case.membership
    wanted = {"--port": options.port, "--direct-port": options.direct_port or 0}
    found = [_port(option, options.host, port) for option, port in wanted.items() if port]
    kept = options.swarm.port if options.swarm is not None and not options.port else 0
    if kept and (holder := _holder(options.host, kept)):
        found.append(_kept(kept, holder))
    free = "Any free ports are listened at; for a firewall fix them by --port and --direct-port."
    return found or [ok(f"Port {kept} is free, where this machine listened last." if kept else free)]


def _port(option: str, host: str, port: int) -> Finding:
    holder = _holder(host, port)
    if not holder:
        return ok(f"Port {port} is free.")
    return wrong(f"Port {port} cannot be listened at: {holder}.", f"End that, or choose another port ({option}).")


def _kept(port: int, holder: str) -> Finding:
    if _P2PD in holder:
        return ok(f"At port {port} a member of this machine listens already: {holder}.")
    return wrong(
        f"At port {port} this machine was known to others, and now it cannot listen there: {holder}.",
        "End that, or choose another port (--port) and give others a new ticket, or the new address.",
    )


def _holder(host: str, port: int) -> str:
    """What keeps a port from being had; empty: nothing."""
    try:
        bind(host, port, v6_only=True).close()
    except BadUsage as error:
        return _listener(port) or str(error).rpartition(": ")[2].rstrip(".")
    except ValueError:
        return f"{host!r} is no IP address"
    return ""


def _listener(port: int) -> str:
    """The process that listens at a port, as far as this user may know."""
    try:
        connections = psutil.net_connections("tcp")
    except psutil.Error:
        return ""
    for one in connections:
        if one.status == psutil.CONN_LISTEN and one.pid and one.laddr and one.laddr.port == port:
            try:
                return f"{psutil.Process(one.pid).name()} (process {one.pid}) listens there"
            except psutil.Error:
                continue
    return ""
