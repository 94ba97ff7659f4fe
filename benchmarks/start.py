"""How long peers and clients take to start, in CPU seconds and seconds, against what they cannot do without.

python -m benchmarks.start --rounds 5 [--tree OTHER_CHECKOUT]     (SmolLM2-135M, 15 of its 30 blocks)

Every row is a process of its own, the rows in turn, medians. A peer's row ends with its line "ready"; p2pd's CPU time
counts. With --tree, the same of another checkout of this project, to compare.
"""

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil

from benchmarks.core import fetch_model

_BLOCKS = 15
_END = "; import os; os._exit(0)"  # the interpreter's own end takes a second, and is not a start
_Figure = tuple[float, float]
"""CPU seconds, seconds."""


def run_code(code: str, tree: Path) -> _Figure:
    """What a Python process takes for `code`."""
    begin = time.perf_counter()
    process = subprocess.Popen([sys.executable, "-c", code + _END], **_surroundings(tree))  # type: ignore[call-overload]
    _, status, used = os.wait4(process.pid, 0)
    assert status == 0, code
    return used.ru_utime + used.ru_stime, time.perf_counter() - begin


def start_peer(model: Path, blocks: int, tree: Path) -> tuple[psutil.Popen, str, _Figure]:
    """A peer, its address, and what it took until it was ready."""
    argv = ["serve", str(model), "--blocks", f"0:{blocks}", "--host", "127.0.0.1", "--threads", "1"]
    begin = time.perf_counter()
    process = psutil.Popen(
        [sys.executable, "-m", "peer", *argv], stdout=subprocess.PIPE, text=True, **_surroundings(tree)
    )
    address = process.stdout.readline().split("address=")[1].split()[0]
    wall = time.perf_counter() - begin
    cpu = sum(sum(part.cpu_times()[:2]) for part in (process, *process.children()))
    return process, address, (cpu, wall)


def _surroundings(tree: Path) -> dict[str, object]:
    return {"cwd": tree, "env": os.environ | {"PYTHONPATH": str(tree)}, "stderr": subprocess.DEVNULL}


def read_blocks(model: Path) -> _Figure:
    """What reading the bytes of the peer's blocks takes, as often as not from the page cache."""
    file = (model / "model.safetensors").open("rb")
    cpu, begin = time.process_time(), time.perf_counter()
    size = int.from_bytes(file.read(8), "little")
    for name, entry in json.loads(file.read(size)).items():
        number = re.search(r"\.layers\.(\d+)\.", name)
        if number and int(number[1]) < _BLOCKS:
            start, end = entry["data_offsets"]
            file.seek(8 + size + start)
            file.read(end - start)
    return time.process_time() - cpu, time.perf_counter() - begin


def _one_peer(model: Path, tree: Path) -> _Figure:
    process, _, figure = start_peer(model, _BLOCKS, tree)
    process.kill()
    process.wait()
    return figure


def _rows(model: Path, whole: str, trees: list[Path]) -> dict[str, Callable[[], _Figure]]:
    here = trees[0]
    imports = "import torch, transformers; from transformers import AutoModelForCausalLM, PreTrainedModel"
    rows: dict[str, Callable[[], _Figure]] = {
        "import torch": lambda: run_code("import torch", here),
        "import torch, transformers": lambda: run_code("import torch, transformers", here),
        "the same; from transformers import PreTrainedModel": lambda: run_code(imports, here),
        "local: import and load the whole model": lambda: run_code(
            f"{imports}; AutoModelForCausalLM.from_pretrained({str(model)!r})", here
        ),
        f"read the bytes of {_BLOCKS} blocks": lambda: read_blocks(model),
    }
    name = "AutoDistributedModelForCausalLM"
    client = f"from client import {name} as M; M.from_pretrained({str(model)!r}, initial_peers=[{whole!r}])"
    first = f"{client}.generate(max_new_tokens=1)"
    for tree in trees:
        suffix = f" ({tree.name})" if len(trees) > 1 else ""
        rows |= {
            f"from client import {name}{suffix}": lambda tree=tree: run_code(f"from client import {name}", tree),  # type: ignore[misc]
            f"client: import, join and load{suffix}": lambda tree=tree: run_code(client, tree),  # type: ignore[misc]
            f"client: the same, and the first token{suffix}": lambda tree=tree: run_code(first, tree),  # type: ignore[misc]
            f"peer serve, {_BLOCKS} blocks, until ready{suffix}": lambda tree=tree: _one_peer(model, tree),  # type: ignore[misc]
        }
    return rows


def main() -> None:
    """Measure and print a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tree", type=Path, action="append", default=[], help="another checkout of this project")
    options = parser.parse_args()
    trees = [Path(__file__).parents[1], *(tree.resolve() for tree in options.tree)]
    model = fetch_model("smollm2")
    serving, whole, _ = start_peer(model, 30, trees[0])
    try:
        rows = _rows(model, whole, trees)
        rounds = []
        for number in range(options.rounds):
            rounds.append({name: take() for name, take in rows.items()})
            print(number + 1, rounds[-1], file=sys.stderr, flush=True)
    finally:
        serving.terminate()
        serving.wait()
    print("| what | CPU s | s | least CPU s |\n|---|---|---|---|")
    for name in rows:
        figures = [measured[name] for measured in rounds]
        cpu, wall = (statistics.median(column) for column in zip(*figures, strict=True))
        print(f"| {name} | {cpu:.2f} | {wall:.2f} | {min(figures)[0]:.2f} |")


if __name__ == "__main__":
    main()
