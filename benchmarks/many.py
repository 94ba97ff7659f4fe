"""Many clients of one swarm at once, against one local `generate` of as many rows, in the same run:

python -m benchmarks.many --model llama      (random llama, hidden 1024, 16 blocks, float32)
python -m benchmarks.many --model smollm2    (SmolLM2-135M-Instruct, float32)

The clients are threads of one process, and those without an adapter of their own share a model: on a small machine
processes would fight for its cores. So they have one peer ID, and the fair shares are those of its sessions;
`--processes` makes each a process with a peer ID of its own. What a client does itself, the LM head above all, runs on
the same cores as the peers, once per client, where a local batch does it once for all rows. So besides whole
`generate`s steps of hidden states alone are measured: what the peers do, against the local trunk. With `--peers 1` the
peer has what local has; several peers compute for one group of clients each, which on the same cores is reading the
weights once per group.
"""

import argparse
import multiprocessing
import statistics
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import accumulate, product
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
from transformers import DynamicCache

from benchmarks.core import MODELS, fetch_model, running_swarm, wait_for
from client import AutoDistributedModelForCausalLM

_CONTEXTS = (128, 1000)
_CLIENTS, _CROWD = 8, 40
_ROUNDS = 3


@dataclass(frozen=True)
class Run:
    """What one client did: seconds per step, the first of which took the prompt, or the error that ended it."""

    steps: Sequence[float]
    began: float
    error: str = ""


@dataclass(frozen=True)
class Job:
    """What a client is to do, and where."""

    path: Path
    addresses: Sequence[str]
    context: int
    tokens: int
    whole: bool
    """Tokens by the model, or hidden states through its blocks only."""
    adapter: int | None = None
    """The seed of its LoRA."""


def decode(model: Any, rows: int, job: Job, ready: Callable[[], Any]) -> Run:
    """A prompt and `tokens` greedy steps after it, each timed; `ready` is called before."""
    config, times = model.config, list[float]()
    cache, chance = DynamicCache(config=config), torch.Generator().manual_seed(job.context)
    ids = torch.randint(3, config.vocab_size, (rows, job.context), generator=chance)
    ids, embeds = ids.to(model.device), model.get_input_embeddings()
    trunk = model if job.whole else model.get_base_model().model if job.adapter is not None else model.model
    ready()
    began = time.monotonic()
    try:
        with torch.no_grad():
            for _ in range(job.tokens + 1):
                begin = time.monotonic()
                if job.whole:
                    logits = trunk(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1).logits
                    ids = logits[:, -1:].argmax(-1)
                else:
                    trunk(inputs_embeds=embeds(ids), past_key_values=cache, use_cache=True)
                    ids = ids[:, -1:]
                wait_for(model.device)
                times.append(time.monotonic() - begin)
    except Exception as error:  # it is counted
        return Run(times, began, f"{type(error).__name__}: {error}")
    return Run(times, began)


def with_lora(model: Any, seed: int) -> Any:
    """LoRA r=8 on q and v that changes what comes out."""
    torch.manual_seed(seed)
    options: dict[str, Any] = {"r": 8, "target_modules": ["q_proj", "v_proj"], "init_lora_weights": False}
    return peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM", **options)).eval()


def connect(job: Job) -> Any:
    """A client's model."""
    model = AutoDistributedModelForCausalLM.from_pretrained(str(job.path), initial_peers=list(job.addresses))
    return model if job.adapter is None else with_lora(model, job.adapter)


def in_threads(jobs: Sequence[Job]) -> list[Run]:
    """All jobs at once, in this process."""
    barrier, runs = threading.Barrier(len(jobs)), list[Run]()
    models = {job: connect(job) for job in set(jobs)}
    threads = [
        threading.Thread(target=lambda job=job: runs.append(decode(models[job], 1, job, barrier.wait)))  # type: ignore[misc]
        for job in jobs
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return runs


def _in_process(job: Job, barrier: Any, runs: Any) -> None:
    torch.set_num_threads(1)
    runs.put(decode(connect(job), 1, job, barrier.wait))


def in_processes(jobs: Sequence[Job]) -> list[Run]:
    """All jobs at once, each in a process with a peer ID of its own."""
    context = multiprocessing.get_context("spawn")
    barrier, runs = context.Barrier(len(jobs)), context.Queue()
    processes = [context.Process(target=_in_process, args=(job, barrier, runs)) for job in jobs]
    for process in processes:
        process.start()
    done = [runs.get() for _ in jobs]
    for process in processes:
        process.join()
    return done


def done_together(runs: Sequence[Run]) -> tuple[list[int], float]:
    """How many steps each did, in how many seconds: from when all were past their prompts until the first was done; if
    that was never so, from the first prompt's end to the last step's."""
    ends = [list(accumulate(run.steps, initial=run.began))[1:] for run in runs]
    begin, end = max(times[0] for times in ends), min(times[-1] for times in ends)
    if end <= begin:
        begin, end = min(times[0] for times in ends), max(times[-1] for times in ends)
    return [sum(begin < at <= end for at in times) for times in ends], end - begin


def rate(runs: Sequence[Run]) -> float:
    """Tokens per second of all together."""
    done, seconds = done_together(runs)
    return sum(done) / seconds


class Bench:
    """Runs clients on one swarm, and the same locally.

    `local` makes the model that runs locally; `None`: the plain one, on the CPU.
    """

    def __init__(
        self,
        path: Path,
        addresses: Sequence[str],
        tokens: int,
        processes: bool = False,
        local: Callable[[], Any] | None = None,
    ):
        self._make = partial(Job, path, tuple(addresses), tokens=tokens)
        self._run = in_processes if processes else in_threads
        self._local = local or partial(transformers.AutoModelForCausalLM.from_pretrained, path)

    def local_rate(self, rows: int, **job: Any) -> float:
        """Tokens per second of one local batch."""
        return rate([decode(self._local().eval(), rows, self._make(**job), lambda: None)]) * rows

    def swarm(self, clients: int, adapters: Callable[[int], int | None] = lambda _: None, **job: Any) -> list[Run]:
        """What so many clients did."""
        runs = self._run([self._make(**job, adapter=adapters(number)) for number in range(clients)])
        for error in sorted({run.error for run in runs if run.error}):
            print(f"\nERROR: {error}\n")
        return [run for run in runs if not run.error]

    def swarm_rate(self, clients: int, **job: Any) -> float:
        """Tokens per second of so many clients together."""
        return rate(self.swarm(clients, **job))


def in_turn(takes: Mapping[str, Callable[[], float]]) -> dict[str, list[float]]:
    """What each gave in some rounds in which they take turns: machines drift."""
    rounds = [{name: take() for name, take in takes.items()} for _ in range(_ROUNDS)]
    return {name: [taken[name] for taken in rounds] for name in takes}


def compared(rates: Sequence[float], others: Sequence[float]) -> str:
    """The median of the ratios, and all of them."""
    ratios = [rate / other for rate, other in zip(rates, others, strict=True)]
    return f"{statistics.median(ratios):.2f} ({', '.join(f'{ratio:.2f}' for ratio in ratios)})"


def compare_batches(bench: Bench, clients: int, contexts: Sequence[int]) -> None:
    """Clients at once against a local batch."""
    print(f"| {clients} clients | swarm tok/s | local batch tok/s | ratio (rounds) |\n|---|---|---|---|")
    for context, (whole, what) in product(contexts, ((True, "generate"), (False, "blocks only"))):
        job: dict[str, Any] = {"context": context, "whole": whole}
        swarm, local = partial(bench.swarm_rate, clients, **job), partial(bench.local_rate, clients, **job)
        rates = in_turn({"swarm": swarm, "local": local})
        figures = " | ".join(f"{statistics.median(taken):.1f}" for taken in rates.values())
        print(f"| {what}, context {context} | {figures} | {compared(*rates.values())} |", flush=True)


def compare_adapters(bench: Bench, clients: int, context: int) -> None:
    """Different adapters against one for all, and none."""
    print(f"\n| {clients} clients, blocks only, context {context} | tok/s | of one shared (rounds) |\n|---|---|---|")
    kinds: dict[str, Callable[[int], int | None]] = {
        "one shared LoRA": lambda _: 1, "a LoRA each": lambda number: number, "none": lambda _: None,
    }  # fmt: skip
    take = partial(bench.swarm_rate, clients, context=context, whole=False)
    rates = in_turn({name: partial(take, adapters=adapters) for name, adapters in kinds.items()})
    for name, taken in rates.items():
        print(f"| {name} | {statistics.median(taken):.1f} | {compared(taken, rates['one shared LoRA'])} |", flush=True)


def crowd(bench: Bench, clients: int, context: int) -> None:
    """Errors, shares and latency of a crowd."""
    runs = bench.swarm(clients, context=context, whole=False)
    done, seconds = done_together(runs)
    steps = sorted(step for run in runs for step in run.steps[1:])
    print(f"\n{clients} clients, context {context}: {clients - len(runs)} errors; {rate(runs):.1f} tok/s;")
    print(f"in the {seconds:.1f} s of `done_together` each did {min(done)} to {max(done)} steps;")
    print(f"a step took {statistics.median(steps):.3f} s, p95 {steps[int(0.95 * len(steps))]:.3f} s.")


def main() -> None:
    """Measure and print Markdown."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=MODELS, default="llama")
    parser.add_argument("--path", type=Path, help="a model's folder, instead of --model")
    parser.add_argument("--peers", type=int, default=2)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="of each process")
    parser.add_argument("--peer-threads", type=int, help="of each peer, if other than --threads")
    parser.add_argument("--tokens", type=int, default=32, help="that each client decodes")
    parser.add_argument("--clients", type=int, default=_CLIENTS)
    parser.add_argument("--crowd", type=int, default=_CROWD)
    parser.add_argument("--contexts", type=int, nargs="+", default=_CONTEXTS)
    parser.add_argument("--processes", action="store_true", help="one for each client")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    peer_threads = options.peer_threads or options.threads
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    path, name = options.path or fetch_model(options.model), options.path or options.model
    with running_swarm(path, options.peers, peer_threads) as peers:
        bench = Bench(path, [peers[0].address], options.tokens, options.processes)
        print(f"### Many clients: {name}, {options.peers} peers, {peer_threads} of {options.threads} threads each\n")
        compare_batches(bench, options.clients, options.contexts)
        compare_adapters(bench, options.clients, options.contexts[0])
        crowd(bench, options.crowd, options.contexts[0])


if __name__ == "__main__":
    main()
