"""Slow links on one machine: a TCP proxy that holds back what it passes on, in a process of its own.

python -m tests.delay SECONDS LISTEN:TARGET [LISTEN:TARGET ...]     (ports on 127.0.0.1; says "ready" when it listens)
"""

import asyncio
import contextlib
import socket
import subprocess
import sys
from collections.abc import Iterator, Mapping
from functools import partial

_CHUNK = 2**16


@contextlib.contextmanager
def delayed(seconds: float, doors: Mapping[int, int]) -> Iterator[None]:
    """While the block runs, what comes to a port goes to the port it maps to `seconds` later, and back likewise."""
    pairs = [f"{door}:{target}" for door, target in doors.items()]
    command = [sys.executable, "-m", "tests.tools.delay", str(seconds), *pairs]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout
        assert process.stdout.readline().strip() == "ready"
        yield
    finally:
        process.kill()
        process.wait()


def free_ports(count: int) -> list[int]:
    """Ports that nobody listens on now."""
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]


async def _carry(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, seconds: float) -> None:
    """One direction; what follows does not wait for what is on its way."""
    loop, under_way = asyncio.get_running_loop(), asyncio.Queue[tuple[float, bytes]](1024)

    async def deliver() -> None:
        while True:
            due, data = await under_way.get()
            await asyncio.sleep(due - loop.time())
            if not data:
                return
            writer.write(data)
            await writer.drain()

    delivery = asyncio.create_task(deliver())
    try:
        while data := await reader.read(_CHUNK):
            await under_way.put((loop.time() + seconds, data))
        await under_way.put((loop.time() + seconds, b""))
        await delivery
    except OSError:
        return
    finally:
        delivery.cancel()
        writer.close()


async def _link(seconds: float, target: int, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    try:
        far_reader, far_writer = await asyncio.open_connection("127.0.0.1", target)
    except OSError:
        writer.close()
        return
    await asyncio.gather(_carry(reader, far_writer, seconds), _carry(far_reader, writer, seconds))


async def _main(seconds: float, pairs: list[str]) -> None:
    for pair in pairs:
        door, target = map(int, pair.split(":"))
        await asyncio.start_server(partial(_link, seconds, target), "127.0.0.1", door)
    print("ready", flush=True)
    await asyncio.Event().wait()


if __name__ == "__main__":
    asyncio.run(_main(float(sys.argv[1]), sys.argv[2:]))
