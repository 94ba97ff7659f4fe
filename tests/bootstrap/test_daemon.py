"""p2pd that does not start: the sentence says why, in p2pd's own words where it has any."""

import asyncio
from pathlib import Path

import pytest

from bootstrap.daemon import Daemon, DaemonFailed
from protocol.errors import PeerFailed, SwarmError

PANIC = "#!/bin/sh\necho 'panic: no entropy\n\ngoroutine 1 [running]:\nmain.main()\n\t/main.go:12'\nexit 2\n"


@pytest.fixture
def p2pd(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The file that is run as p2pd; none yet."""
    monkeypatch.setattr("bootstrap.daemon.files", lambda package: tmp_path)
    return tmp_path / "p2pd"


def start(timeout: float = 5) -> None:
    async def main() -> None:
        await (await Daemon.start([], timeout)).stop()

    asyncio.run(main())


@pytest.mark.parametrize(
    ("content", "mode", "said"),
    [
        (None, 0, "is missing, which should be .*p2pd; install hivemind again"),
        (b"#!/bin/sh\n", 0o600, "is not executable, .* run `chmod \\+x .*p2pd`"),
        (b"\x7fELF\x00\x00", 0o700, "is damaged, or for another kind of machine; install hivemind again"),
        (b"#!/nowhere/sh\n", 0o700, "cannot be run: No such file or directory"),
    ],
)
def test_it_cannot_be_run(p2pd: Path, content: bytes | None, mode: int, said: str) -> None:
    if content is not None:
        p2pd.write_bytes(content)
        p2pd.chmod(mode)
    with pytest.raises(PeerFailed, match=said):
        start()


@pytest.mark.parametrize(
    ("script", "said"),
    [
        ("#!/bin/sh\necho '2026/11/28 02:17:54 no such curve.' >&2\nexit 1\n", "no such curve"),
        (PANIC, "panic: no entropy"),
        ("#!/bin/sh\nexit 3\n", "it ended with exit code 3 without a word"),
        ("#!/bin/sh\nkill -9 $$\n", "it was killed without a word, as a system does that has run out of memory"),
        ("#!/bin/sh\nkill -15 $$\n", "it was ended by SIGTERM without a word"),
    ],
)
def test_it_ends_at_once(p2pd: Path, script: str, said: str) -> None:
    p2pd.write_text(script)
    p2pd.chmod(0o700)
    with pytest.raises(DaemonFailed) as caught:
        start()
    assert str(caught.value) == said


@pytest.mark.parametrize(("words", "said"), [("", " and said nothing."), ("echo waiting", ", and said: waiting.")])
def test_it_is_not_ready_in_time(p2pd: Path, words: str, said: str) -> None:
    p2pd.write_text(f"#!/bin/sh\n{words}\nexec sleep 60\n")
    p2pd.chmod(0o700)
    with pytest.raises(SwarmError) as caught:
        start(timeout=0.5)
    assert str(caught.value) == f"p2pd did not start within 0.5 s{said}"
