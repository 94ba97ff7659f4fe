"""A 7B llama: local, and through peers on the same card, each a process of its own; alone and in a crowd."""

from pathlib import Path
from typing import Any

import torch

from benchmarks.core import measure, running_swarm, with_lora
from benchmarks.gpu.gpu import Gpu
from benchmarks.gpu.models import RandomCheckpoint, load_local, shaped
from benchmarks.gpu.report import Figures, Report
from benchmarks.many import Bench, rate
from benchmarks.training import measure_steps
from client import AutoDistributedModelForCausalLM

_WAYS = (("nf4", 1), ("none", 1), ("nf4", 2), ("none", 2))
"""Quantization, and how many peers."""


class _Speed:
    """Every way, beside local figures that are taken once for each quantization."""

    def __init__(self, report: Report, gpu: Gpu, path: Path, tiny: bool):
        self._report, self._gpu, self._path = report, gpu, path
        self._prompt, self._batch, self._rounds = (32, (2, 16), 1) if tiny else (1024, (4, 512), 3)
        self._context, self._tokens = (8, 4) if tiny else (128, 48)
        self._crowds: tuple[int, ...] = (2,) if tiny else (8, 32)
        self._peer = ("--device", gpu.name, "--dtype", "bfloat16", "--cache-tokens", "1024" if tiny else "8192")
        self._local: dict[str, dict[str, float]] = {}
        self._batches: dict[tuple[str, int], float] = {}
        """Of a quantization and so many rows: tokens per second, of hidden states alone."""

    def local(self, quantize: str) -> Figures:
        """Plain Transformers and PEFT, and batches of as many rows as there will be clients."""
        with self._gpu.peak_here() as peak:
            model = load_local(self._path, self._gpu.name, torch.bfloat16, quantize)
            bench = Bench(self._path, (), self._tokens, local=lambda: model)
            for rows in self._crowds:
                self._batches[quantize, rows] = bench.local_rate(rows, context=self._context, whole=False)
            batches = {f"a batch of {rows}, tokens/s": self._batches[quantize, rows] for rows in self._crowds}
            self._local[quantize] = found = self._figures(model)
        return _in_ms(found) | batches | {"peak GB": peak.size / 1e9}

    def swarm(self, quantize: str, count: int, title: str) -> Figures:
        """The same through peers."""
        local, options = self._local.get(quantize, {}), (*self._peer, "--quantize", quantize)
        with (
            self._gpu.peak_of_all() as peak,
            running_swarm(self._path, count, torch.get_num_threads(), *options) as peers,
        ):
            address = peers[0].address
            model: Any = AutoDistributedModelForCausalLM.from_pretrained(str(self._path), initial_peers=[address])
            found = self._figures(model.to(self._gpu.device))
            ratios = {f"local / swarm, {name}": seconds / found[name] for name, seconds in local.items()}
            starts = {"s until a peer was ready": max(peer.seconds for peer in peers)}
            self._report.put("speed", title, _in_ms(found) | ratios | starts)
            if count == 1:
                for clients in self._crowds:
                    crowd = f"{title}, {clients} clients"
                    self._report.attempt("speed", crowd, lambda n=clients: self._crowd(address, n, quantize))  # type: ignore[misc]
        return {"peak GB of all": peak.size / 1e9}

    def _crowd(self, address: str, clients: int, quantize: str) -> Figures:
        """Threads of this process, on the CPU: what is theirs beside the blocks, the LM head above all, is left out."""
        bench = Bench(self._path, (address,), self._tokens)
        runs = bench.swarm(clients, context=self._context, whole=False)
        if len(runs) < clients:
            raise RuntimeError(f"{clients - len(runs)} of {clients} clients failed")
        batch = self._batches.get((quantize, clients))
        return {"tokens/s": rate(runs)} | ({"of a local batch's": rate(runs) / batch} if batch else {})

    def _figures(self, model: Any) -> dict[str, float]:
        """Of one client, milliseconds."""
        rows, tokens = self._batch
        taken = measure([model], model.config.vocab_size, (self._prompt,), self._rounds)
        found = {name: 1000 * seconds for name, (seconds,) in taken.items()}
        tuned = with_lora(model).to(self._gpu.device)
        speed = measure_steps(tuned, 1, rows, tokens, self._rounds).tokens_per_second
        return found | {f"LoRA step {rows}x{tokens}": 1000 * rows * tokens / speed}


def _in_ms(figures: dict[str, float]) -> dict[str, float]:
    return {f"{name}, ms": value for name, value in figures.items()}


def run(report: Report, gpu: Gpu, root: Path, tiny: bool) -> None:
    """The most telling first, as time may run out."""
    path = root / "llama-7b"

    def write() -> Figures:
        RandomCheckpoint.of(shaped("Llama-2-7B", tiny), gpu.name).write(path)
        return {"GB": sum(file.stat().st_size for file in path.iterdir()) / 1e9}

    report.attempt("speed", "random weights of a 7B llama", write, needs=60)
    speed = _Speed(report, gpu, path, tiny)
    measured = set[str]()
    for quantize, count in (("none", 1),) if tiny else _WAYS:
        if quantize not in measured:
            report.attempt("speed", f"7B {quantize}, local", lambda q=quantize: speed.local(q), needs=45)  # type: ignore[misc]
            measured.add(quantize)
        name = f"7B {quantize}, {count} peer{'s' * (count > 1)}"
        report.attempt("speed", name, lambda q=quantize, c=count, n=name: speed.swarm(q, c, n), needs=60)  # type: ignore[misc]
