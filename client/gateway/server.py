"""The process of `peer gateway`: the model, the engine, and uvicorn in front of them."""

import signal
import socket
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import uvicorn

from client.gateway.app import Gateway, Offer
from client.gateway.doors import Doors, KeyFile, Limits, is_loopback
from client.gateway.engine.engine import Engine
from client.gateway.engine.served import Shelf
from client.tokenizer import load_tokenizer
from protocol.errors import BadUsage, first_line

_LAST_CALL = 300
"""Seconds for what is being answered when the process is told to stop."""


@dataclass(frozen=True)
class Address:
    """Where to listen, and for whom."""

    host: str
    port: int
    api_key: Path | None

    def check(self) -> None:
        """Raises `BadUsage` for an address that others reach and anybody may use."""
        if self.api_key is None and not is_loopback(self.host):
            raise BadUsage(
                f"--host {self.host} is reached by others: give --api-key FILE with one key a line, or listen on "
                "127.0.0.1."
            )


def serve(
    model: Any, name: str, root: str, revision: str | None, address: Address, limits: Limits, *,
    adapters: Mapping[str, Path], adapter_folder: Path | None, prefix_tokens: int, max_running: int, max_tokens: int,
) -> None:  # fmt: skip
    """Answer requests until SIGTERM or Ctrl-C, and then finish those that are being answered.

    `model`: a distributed one, without adapters. Raises `BadUsage`.
    """
    address.check()
    keys = None if address.api_key is None else KeyFile(address.api_key)
    shelf = Shelf(model, name, root, load_tokenizer(root, revision))
    for adapter, folder in adapters.items():
        shelf.load(adapter, folder)
    listening = _listen(address)
    engine = Engine(shelf, prefix_tokens, max_running)
    context = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    gateway = Gateway(engine, Doors(keys, limits), Offer(context, max_tokens, adapter_folder))
    config = uvicorn.Config(
        gateway.app(), lifespan="off", log_config=None, access_log=False, server_header=False, ws="none",
        proxy_headers=False,
        timeout_graceful_shutdown=_LAST_CALL,
    )  # fmt: skip
    host = f"[{address.host}]" if ":" in address.host else address.host
    _Server(config, f"ready url=http://{host}:{listening.getsockname()[1]} model={name}").run([listening])
    engine.stop()


class _Server(uvicorn.Server):
    def __init__(self, config: uvicorn.Config, ready: str):
        super().__init__(config)
        self._ready = ready

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """As uvicorn's, but for the end, where that has the signal end this process after all."""
        numbers = (signal.SIGINT, signal.SIGTERM)
        before = [signal.signal(number, self.handle_exit) for number in numbers]
        try:
            yield
        finally:
            for number, handler in zip(numbers, before, strict=True):
                signal.signal(number, handler)

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Listen, and say so."""
        await super().startup(sockets)
        print(self._ready, flush=True)


def _listen(address: Address) -> socket.socket:
    try:
        family, kind, protocol, _, where = socket.getaddrinfo(address.host, address.port, type=socket.SOCK_STREAM)[0]
        listening = socket.socket(family, kind, protocol)
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind(where)
    except OSError as error:
        raise BadUsage(
            f"--host {address.host} --port {address.port} cannot be listened on ({first_line(error)}); choose others."
        ) from error
    return listening
