"""What must not wait for the GPU, nor run ahead of it: a peer's event loop, and a client on a stream of its own."""

from pathlib import Path
from typing import Any

import torch
import transformers as tf

from benchmarks.core import with_lora
from benchmarks.gpu.gpu import Gpu
from benchmarks.gpu.models import RandomCheckpoint
from benchmarks.gpu.peers import serving, watching_the_loop
from benchmarks.gpu.report import Figures, Report
from client import AutoDistributedModelForCausalLM

_CLIENTS_BAN_AFTER = 10.0
"""Seconds of silence (`SwarmConfig.silence_timeout`)."""
_LONGEST = 0.5
"""Seconds that a loop may pause; its thread shares Python's lock with the one that launches kernels."""


def run(report: Report, gpu: Gpu, root: Path, tiny: bool) -> None:
    """A peer that trains long rows, and a client on another stream than the default one."""
    width, rows, tokens = (64, 2, 32) if tiny else (2048, 16, 1024)
    config = tf.LlamaConfig(
        vocab_size=512, hidden_size=width, intermediate_size=3 * width, num_hidden_layers=4,
        num_attention_heads=width // 64, max_position_embeddings=2048,
    )  # fmt: skip
    path = RandomCheckpoint.of(config, gpu.name).write(root / "waits")
    ids = torch.randint(3, 512, (rows, tokens), generator=torch.Generator().manual_seed(0)).to(gpu.device)
    options = {"device": gpu.name, "dtype": "bfloat16", "cache_tokens": 4096}

    def both() -> Figures:
        with serving(path, ("0:4",), **options) as address:
            model = AutoDistributedModelForCausalLM.from_pretrained(str(path), initial_peers=[address]).to(gpu.device)
            tuned = with_lora(model).to(gpu.device).train()
            report.attempt("waits", "a peer's event loop, in training", lambda: _loop(gpu, tuned, ids), needs=10)
            if gpu.is_real:
                report.attempt("waits", "a client on a side stream", lambda: _side_stream(gpu, tuned, ids[:1]))
        return {}

    report.attempt("waits", f"llama {width}x4", both, needs=15)


def _step(model: Any, ids: torch.Tensor) -> torch.Tensor:
    """The gradients of a step, as one vector."""
    model.zero_grad()
    model(input_ids=ids, labels=ids).loss.backward()
    return torch.cat([value.grad.flatten() for value in model.parameters() if value.grad is not None])


def _loop(gpu: Gpu, model: Any, ids: torch.Tensor) -> Figures:
    _step(model, ids)  # what runs for the first time imports, and compiles kernels
    with watching_the_loop() as pauses:
        seconds = gpu.seconds(lambda: _step(model, ids), rounds=3, warm=0)
    if gpu.is_real and pauses.longest > max(_LONGEST, seconds / 4):
        raise TimeoutError(
            f"the loop waited for {pauses.longest:.1f} s of a step's {seconds:.1f}; after {_CLIENTS_BAN_AFTER:.0f} s "
            "clients take a peer for dead"
        )
    return {"longest pause ms": 1000 * pauses.longest, "a step ms": 1000 * seconds}


def _side_stream(gpu: Gpu, model: Any, ids: torch.Tensor) -> Figures:
    """The stream has much to do before the step: whoever reads its tensors too early, reads something else."""
    expected = _step(model, ids)
    gpu.wait()
    stream, weights = torch.cuda.Stream(gpu.device), torch.randn(8192, 8192, device=gpu.device)
    with torch.cuda.stream(stream):
        for _ in range(20):
            weights = weights @ weights.clamp(-1e-3, 1e-3)
        found = _step(model, ids)
    stream.synchronize()
    error = float((found - expected).norm() / expected.norm())
    if not error < 1e-2:
        raise ArithmeticError(f"gradients differ by {error:.1e} from those on the default stream")
    return {"gradients off by": error}
