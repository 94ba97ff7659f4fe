"""What a peer's memory is: after its imports, when it is ready, after training, and at rest again.

python -m benchmarks.memory     (SmolLM2-135M in float32, all 30 blocks)

Figures are proportional set sizes, so that what several processes share counts once; nothing else that uses torch
should run meanwhile. The steps are of LoRA (r=8) on 8 x 256 tokens.
"""

import subprocess
import sys
import time
from pathlib import Path

import peft
import psutil
import torch

from benchmarks.core import fetch_model
from benchmarks.start import start_peer
from client import AutoDistributedModelForCausalLM

_BLOCKS = 30
_REST = 14.0
"""Seconds after which a peer is at rest, and has given freed memory back."""
_ROOT = Path(__file__).parents[1]
_IMPORTS = {
    "import torch": "import torch",
    "the same, and Transformers' model classes": "import torch; from transformers import PreTrainedModel",
    "all that a peer imports before it is ready": "import peer.server",
    "all that a peer imports": "import peer.server, peer.adapters.peft_trees",
}


def _mebibytes(process: psutil.Process) -> float:
    return float(process.memory_full_info().pss) / 2**20


def _after(code: str) -> float:
    """MiB of a Python process that has run `code`."""
    wait = f"{code}; print(flush=True); input()"
    process = psutil.Popen(
        [sys.executable, "-c", wait],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        cwd=_ROOT,
    )
    process.stdout.readline()
    try:
        return _mebibytes(process)
    finally:
        process.kill()
        process.wait()


def _of_a_swarm(node: psutil.Process, model: Path) -> float:
    """MiB of a bootstrap node and two peers."""
    peers = [start_peer(model, _BLOCKS // 2, _ROOT)[0] for _ in range(2)]
    time.sleep(_REST)
    try:
        return sum(_mebibytes(one) for process in (node, *peers) for one in (process, *process.children()))
    finally:
        for process in peers:
            process.terminate()
            process.wait()


def _train(model: Path, address: str) -> None:
    client = AutoDistributedModelForCausalLM.from_pretrained(str(model), initial_peers=[address])
    tuned = peft.get_peft_model(client, peft.LoraConfig(task_type="CAUSAL_LM", r=8))
    optimizer = torch.optim.AdamW([parameter for parameter in tuned.parameters() if parameter.requires_grad])
    for _ in range(3):
        ids = torch.randint(3, 40000, (8, 256))
        tuned(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def main() -> None:
    """Measure and print a Markdown table."""
    rows = {name: _after(code) for name, code in _IMPORTS.items()}
    model = fetch_model("smollm2")
    node = psutil.Popen(
        [sys.executable, "-m", "peer", "bootstrap", "--host", "127.0.0.1"], cwd=_ROOT, stdout=subprocess.PIPE, text=True
    )
    node.stdout.readline()
    rows["a bootstrap node"] = _mebibytes(node)
    rows["a bootstrap node and two peers of 15 blocks, with their p2pd"] = _of_a_swarm(node, model)
    process, address, _ = start_peer(model, _BLOCKS, _ROOT)
    try:
        time.sleep(_REST)
        rows["a peer of 30 blocks (405 of it are weights)"] = _mebibytes(process)
        rows["its p2pd"] = _mebibytes(process.children()[0])
        _train(model, address)
        rows["the peer after three LoRA steps"] = _mebibytes(process)
        time.sleep(_REST)
        rows["and at rest"] = _mebibytes(process)
    finally:
        for one in (process, node):
            one.terminate()
            one.wait()
    print("| what | MiB |\n|---|---|")
    for name, value in rows.items():
        print(f"| {name} | {value:,.0f} |")


if __name__ == "__main__":
    main()
