"""What a client and a peer hold in memory, on a model large enough to tell.

Weights that are used as they lie on disk are memory-mapped, so memory has two parts: pages of the model's files, and
anonymous memory. What is neither mapped nor anonymous is not held.
"""

import re
import shutil
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests.tools.families import build_llama
from tests.tools.swarm import Peer, Swarm
from tests.tools.words import save_tokenizer

HIDDEN, INTERMEDIATE, LAYERS, VOCABULARY = 1024, 2816, 10, 8000
BLOCK = 4 * HIDDEN**2 + 3 * HIDDEN * INTERMEDIATE
"""Elements of one block's matrices: 26 MB in bfloat16."""
OUTSIDE = 2 * VOCABULARY * HIDDEN * 2
"""Bytes of embeddings and head."""
NOISE = 24 * 2**20
"""Between two processes that do the same."""
KEPT = 64 * 2**20
"""What glibc may keep at the top of a thread's arena, trimmed or not, of the copies made while blocks are converted."""


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = build_llama(
        tmp_path_factory.getbasetemp() / "models", name="large", hidden=HIDDEN, layers=LAYERS, heads=16,
        intermediate=INTERMEDIATE, vocab=VOCABULARY, dtype=torch.bfloat16, max_shard_size="50MB",
    )  # fmt: skip
    assert len(list(folder.glob("*.safetensors"))) > 3
    save_tokenizer(folder, VOCABULARY)
    yield folder
    shutil.rmtree(folder)


def mapped(pid: int, folder: Path) -> int:
    """Bytes of the files in `folder` that a process has in memory."""
    parts = re.split(r"^(?=[0-9a-f]+-[0-9a-f]+ )", Path(f"/proc/{pid}/smaps").read_text(), flags=re.M)
    own = "".join(part for part in parts if f"{folder}/" in part.partition("\n")[0])
    return sum(int(kilobytes) * 1024 for kilobytes in re.findall(r"^Rss:\s+(\d+) kB", own, re.M))


def serve(swarm: Swarm, path: Path, span: str, *options: str) -> Peer:
    return swarm.serve(path, span, options=["--max-length", "256", "--cache-tokens", "256", *options])[0]


def test_a_peer_holds_its_own_blocks(path: Path, swarm: Swarm) -> None:
    one = serve(swarm, path, "0:1")
    four = serve(swarm, path, "4:8")
    assert mapped(one.pid, path) == pytest.approx(2 * BLOCK, rel=0.05)
    assert mapped(four.pid, path) == pytest.approx(4 * 2 * BLOCK, rel=0.05)
    assert abs(four.rss() - one.rss()) < NOISE


@pytest.mark.parametrize(
    ("options", "block"),
    [
        (["--dtype", "float32"], 4.0 * BLOCK),
        (["--quantize", "int8"], 1.01 * BLOCK),
        (["--quantize", "nf4"], 0.57 * BLOCK),
    ],
    ids=lambda value: value[1] if isinstance(value, list) else "",
)
def test_a_peer_that_converts_its_blocks_holds_them_once(
    path: Path, swarm: Swarm, options: list[str], block: float
) -> None:
    one = serve(swarm, path, "0:1", *options)
    all_blocks = serve(swarm, path, f"0:{LAYERS}", *options)
    assert abs(all_blocks.rss() - one.rss() - (LAYERS - 1) * block) < KEPT
    assert mapped(all_blocks.pid, path) < 1.05 * LAYERS * 2 * BLOCK


def test_a_client_holds_no_block(path: Path, swarm: Swarm) -> None:
    peer = serve(swarm, path, f"0:{LAYERS}")
    prompt = " ".join(f"w{i}" for i in range(3, 35))
    client = swarm.launch("generate", str(path), prompt, "--initial-peers", peer.address, "--max-new-tokens", "500")
    deadline = time.monotonic() + 60
    while not client.stdout.exists() or len(client.stdout.read_text().split()) < 4:
        assert client.is_alive(), client.stderr.read_text()
        assert time.monotonic() < deadline
        time.sleep(0.005)
    client.send(signal.SIGSTOP)
    assert mapped(client.pid, path) < 1.05 * OUTSIDE
    assert client.rss() - peer.rss() < NOISE


def test_a_peer_that_is_loading_leaves_at_once(path: Path, swarm: Swarm) -> None:
    peer = swarm.launch("serve", str(path), "--host", "127.0.0.1", "--quantize", "nf4", "--threads", "1")
    while mapped(peer.pid, path) < 2 * BLOCK:
        time.sleep(0.01)
    assert peer.stop() < 3
    assert "ready" not in peer.stdout.read_text()
    assert "Traceback" not in peer.stderr.read_text()
