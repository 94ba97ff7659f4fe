"""What must not wait for the GPU, nor run ahead of it: a peer's event loop, and a client on a stream of its own."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
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

_BUSY = 0.5
"""Seconds of work that others have queued: whoever waits for the GPU waits about so long."""
_LONGEST = _BUSY / 2
"""Seconds that a loop may pause; its thread shares Python's lock with those that launch kernels."""


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
            model: Any = AutoDistributedModelForCausalLM.from_pretrained(str(path), initial_peers=[address])
            tuned = with_lora(model.to(gpu.device)).to(gpu.device).train()
            report.attempt("waits", "a peer's event loop, beside training", lambda: _loop(gpu, tuned, ids), needs=10)
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
    with _busy(gpu), watching_the_loop() as pauses:
        seconds = gpu.seconds(lambda: _step(model, ids), rounds=1, warm=0)
    if gpu.is_real and pauses.longest > _LONGEST:
        raise TimeoutError(f"the loop waited for {pauses.longest:.2f} s: a peer gives no sign of life meanwhile")
    return {"longest pause ms": 1000 * pauses.longest, "a step ms": 1000 * seconds}


@contextmanager
def _busy(gpu: Gpu) -> Iterator[None]:
    """While the block runs, a GPU has `_BUSY` seconds of other work to do first, time and again."""
    if not gpu.is_real:
        yield
        return
    matrix, ended = torch.randn(4096, 4096, device=gpu.device), threading.Event()
    products = max(1, int(_BUSY / gpu.seconds(lambda: matrix @ matrix)))

    def work() -> None:
        while not ended.is_set():
            for _ in range(products):
                matrix @ matrix
            gpu.wait()

    thread = threading.Thread(target=work)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


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
