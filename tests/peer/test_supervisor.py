"""Several peers of one command, and peers that are started again: small programs play the peers."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from peer.commands.serve import _Own
from peer.start.options import ServeOptions

ROOT = Path(__file__).parents[2]
SUPERVISE = """
import asyncio, logging, sys
from peer.commands import supervisor
logging.basicConfig(format="%(message)s")
supervisor.FIRST_PAUSE = 0.1
restarts, *programs = sys.argv[1:]
argv = lambda index: [sys.executable, "-c", programs[index], *made.addresses]
async def main():
    global made
    made = supervisor.Supervisor(restarts == "again")
    return await made.run([f"cuda:{i}" for i in range(len(programs))], argv)
sys.exit(asyncio.run(main()))
"""
READY = "import signal, sys, time; print('ready address=' + NAME, *sys.argv[1:], flush=True);"
SERVES = f"{READY} signal.signal(signal.SIGTERM, lambda *_: sys.exit()); [time.sleep(0.01) for _ in range(3000)]"
FAILS = f"{READY} print('gone', file=sys.stderr); sys.exit(1)"
FAILS_ONCE = (
    f"import os; {READY} once = not os.path.exists(FILE); open(FILE, 'w').close(); "
    "time.sleep(0.5 if once else 30); sys.exit(once)"
)
NEVER_READY = "import sys; sys.exit(CODE)"

Start = Callable[..., subprocess.Popen[str]]


def program(code: str, **values: object) -> str:
    return "".join(f"{name} = {value!r}\n" for name, value in values.items()) + code


@pytest.fixture
def start() -> Iterator[Start]:
    started: list[subprocess.Popen[str]] = []

    def start(*arguments: str) -> subprocess.Popen[str]:
        command = [sys.executable, "-c", SUPERVISE, *arguments]
        pipe = subprocess.PIPE
        started.append(subprocess.Popen(command, cwd=ROOT, text=True, stdout=pipe, stderr=pipe))
        return started[-1]

    yield start
    for process in started:
        process.kill()


def lines(process: subprocess.Popen[str], count: int) -> list[str]:
    assert process.stdout
    return [process.stdout.readline().strip() for _ in range(count)]


def test_a_peers_own_options_come_last(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["peer", "serve", "--port", "7", "--restart", "--", "MODEL"])
    options = ServeOptions(device="cuda:0,cuda:1", blocks="0:2,2:4").for_each_device()[1]
    argv = _Own(options, index=1, port=7, direct_port=8, identity=Path("key.1"), swarm="open").argv(["ADDRESS"])
    typed, own = ["serve", "--port", "7", "--restart"], ["--no-restart", "--device", "cuda:1", "--blocks", "2:4"]
    own += [
        "--port",
        "17",
        "--direct-port",
        "18",
        "--identity",
        "key.1",
        "--swarm",
        "open",
        "--initial-peers",
        "ADDRESS",
    ]
    assert argv == [sys.executable, "-m", "peer", *typed, *own, "--", "MODEL"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_next_begins_when_the_one_before_is_ready_and_one_signal_ends_all(start: Start, number: int) -> None:
    process = start("once", program(SERVES, NAME="A"), program(SERVES, NAME="B"))
    assert lines(process, 2) == ["ready address=A", "ready address=B A"], "the second knows the first's address"
    peers = psutil.Process(process.pid).children()
    assert len(peers) == 2
    process.send_signal(number)
    assert process.communicate(timeout=10) == ("", "")
    assert process.returncode == 0
    assert not any(peer.is_running() for peer in peers)


def test_one_that_fails_is_said_and_leaves_the_others(start: Start) -> None:
    process = start("once", program(SERVES, NAME="A"), program(FAILS, NAME="B"))
    lines(process, 2)
    assert process.stderr
    assert process.stderr.readline() == "cuda:1: gone\n"
    assert process.stderr.readline() == "the peer on cuda:1 ended with exit code 1\n"
    time.sleep(0.1)
    assert process.poll() is None
    process.terminate()
    process.communicate(timeout=10)
    assert process.returncode == 1


@pytest.mark.parametrize("restarts", ["once", "again"])
def test_what_was_wrong_from_the_start_ends_them_all(start: Start, restarts: str) -> None:
    process = start(restarts, program(SERVES, NAME="A"), program(NEVER_READY, CODE=2), program(SERVES, NAME="C"))
    output, log = process.communicate(timeout=10)
    assert process.returncode == 2
    assert output == "ready address=A\n"
    assert log == "the peer on cuda:1 ended with exit code 2\n"


def test_one_that_fails_is_started_again_after_a_growing_pause(start: Start) -> None:
    process = start("again", program(FAILS, NAME="A"))
    lines(process, 4)
    process.terminate()
    _, log = process.communicate(timeout=10)
    assert process.returncode == 0, "it was told to stop, be it in a pause"
    pauses = [line for line in log.splitlines() if line != "gone"]
    assert pauses[:3] == [
        f"the peer ended with exit code 1; it is started again in {s} s" for s in ("0.1", "0.2", "0.4")
    ]


def test_a_founder_that_is_started_again_joins_the_others(start: Start, tmp_path: Path) -> None:
    founder = program(FAILS_ONCE, NAME="A", FILE=str(tmp_path / "failed"))
    process = start("again", founder, program(SERVES, NAME="B"))
    assert lines(process, 3) == ["ready address=A", "ready address=B A", "ready address=A B"]


def test_a_killed_peer_is_started_again(start: Start) -> None:
    process = start("again", program(SERVES, NAME="A"))
    lines(process, 1)
    psutil.Process(process.pid).children()[0].kill()
    lines(process, 1)
    process.terminate()
    assert "the peer ended with exit code -9; it is started again in 0.1 s\n" in process.communicate(timeout=10)[1]


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells a child that its parent has gone")
def test_a_supervisor_that_is_killed_leaves_no_peer(start: Start) -> None:
    process = start("again", program(SERVES, NAME="A"))
    lines(process, 1)
    peers = psutil.Process(process.pid).children()
    os.kill(process.pid, signal.SIGKILL)
    assert psutil.wait_procs(peers, 10)[1] == []
