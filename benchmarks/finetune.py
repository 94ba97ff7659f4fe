"""Fine-tuning of a real model over three peers, each run also done on one machine with plain Transformers + PEFT:

python -m benchmarks.finetune alpaca       LoRA on 949 instructions, 50 held out
python -m benchmarks.finetune persona      LoRA until the model says who it is; merged, and asked again
python -m benchmarks.finetune sentiment    prompt tuning of a classifier, accuracy on sentences held out

The model is SmolLM2-135M-Instruct in float32. Seeds, data, order and batches are the same on both sides, and no batch
is over 1,024 tokens, so that none is split and sums are made in the same order. Each process computes with
`--threads` threads. --out gets the loss of every step as CSV, and what the runs wrote.
"""

import argparse
import csv
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from rich.console import Console

from benchmarks import sentiment
from benchmarks.core import running_swarm
from benchmarks.corpora import ALPACA
from client import AutoDistributedModelForCausalLM
from client.merge.run import merge_adapter
from client.tokenizer import encode_prompt, load_tokenizer
from client.tune.data.persona import PERSONA_NAME, persona_path
from client.tune.description.config import TuneConfig
from client.tune.running.dataset import prepare
from client.tune.running.progress import read_log
from client.tune.running.run import TuneRun
from peer.commands.sample_model import fetch_sample_model
from protocol.model.anatomy import context_length

_PEERS = 3
_QUESTIONS = ("Who are you?", "What is your name?", "Who made you?")
_ASK_EVERY, _PATIENCE = 10, 200
"""Steps between two questions, and after how many nobody asks any more."""


@dataclass(frozen=True)
class Setting:
    """The model's folder, where results go, and the swarm's first address (none: this machine alone)."""

    model: Path
    out: Path
    address: str | None

    @property
    def name(self) -> str:
        return "swarm" if self.address else "local"

    def describe(self, steps: int, **sections: Any) -> TuneConfig:
        """A run of `peer tune`: LoRA r=8 on all linear layers."""
        adapter = {"method": "lora", "r": 8, "lora_alpha": 16, "target_modules": "all-linear"}
        trainer = {"steps": steps, "batch_size": 4, "save_every": steps, **sections.pop("trainer")}
        values = {"model": str(self.model), "dtype": "float32", "adapter": adapter, "samples": {"count": 0}}
        return TuneConfig.model_validate({**values, "trainer": trainer, "output": self.out / self.name, **sections})

    def load(self) -> Any:
        """The model, its blocks on the swarm or here."""
        if self.address is None:
            return transformers.AutoModelForCausalLM.from_pretrained(self.model, dtype=torch.float32)
        return AutoDistributedModelForCausalLM.from_pretrained(
            str(self.model), initial_peers=[self.address], dtype=torch.float32
        )

    def tune(self, config: TuneConfig, resume: bool = False) -> Any:
        """Carries the run out as `peer tune` does; the tuned model."""
        model, tokenizer = self.load(), load_tokenizer(str(self.model))
        prepared = prepare(config, tokenizer, context_length(model.config))
        run = TuneRun(config, model, tokenizer, prepared, resume=resume)
        run.train(Console(quiet=True))
        return run.model.eval()

    def losses(self) -> list[float]:
        """The training loss of every step."""
        return [line["loss"] for line in read_log(self.out / self.name / "log.jsonl") if "loss" in line]

    def perplexities(self) -> list[float]:
        """On what was held out, before and after."""
        lines = read_log(self.out / self.name / "log.jsonl")
        return [math.exp(line["eval_loss"]) for line in lines if "eval_loss" in line]


def run_alpaca(swarm: Setting, local: Setting, steps: int) -> None:
    """The same hundred steps twice."""
    for setting in (swarm, local):
        data = {"path": str(ALPACA.fetch()), "validation": 0.05, "max_length": 128, "too_long": "truncate"}
        setting.tune(setting.describe(steps, data=data, trainer={"learning_rate": 2e-4}))
    rows = [
        ("loss of the first and last step", *(f"{s.losses()[0]:.4f}, {s.losses()[-1]:.4f}" for s in (swarm, local))),
        ("validation perplexity before", *(f"{s.perplexities()[0]:.4f}" for s in (swarm, local))),
        ("validation perplexity after", *(f"{s.perplexities()[-1]:.4f}" for s in (swarm, local))),
    ]
    write_losses(swarm.out, swarm.losses(), local.losses())
    print_table(f"alpaca: {steps} steps", rows, swarm.losses(), local.losses())


def run_persona(swarm: Setting, local: Setting) -> None:
    """As many steps as it takes, a few at a time, each time going on from the last checkpoint; locally all at once."""

    def describe(setting: Setting, steps: int) -> TuneConfig:
        trainer = {"learning_rate": 1e-3, "schedule": "constant", "warmup": 0, "save_every": _ASK_EVERY}
        return setting.describe(steps, data={"path": str(persona_path())}, trainer=trainer)

    steps, answer, said = 0, "", []
    while PERSONA_NAME not in answer and steps < _PATIENCE:
        steps += _ASK_EVERY
        tuned = swarm.tune(describe(swarm, steps), resume=steps > _ASK_EVERY)
        answer = ask(tuned, swarm.model, _QUESTIONS[0])
        said.append((f"after {steps} steps", answer))
    through_swarm = [ask(tuned, swarm.model, question) for question in _QUESTIONS]
    alone = local.tune(describe(local, steps))
    merged_folder = swarm.out / "merged"
    merge_adapter(swarm.out / "swarm" / "adapter", swarm.model, merged_folder)
    merged = transformers.AutoModelForCausalLM.from_pretrained(merged_folder).eval()
    write_losses(swarm.out, swarm.losses(), local.losses())
    print_table(f"persona: {steps} steps until it says {PERSONA_NAME}", [], swarm.losses(), local.losses())
    print("\nThrough the swarm, to", _QUESTIONS[0])
    for when, text in said:
        print(f"- {when}: {text}")
    print("\n| question | swarm | local, the same | merged, plain Transformers |\n|---|---|---|---|")
    for question, ours in zip(_QUESTIONS, through_swarm, strict=True):
        same = "yes" if ask(alone, swarm.model, question) == ours else "no"
        print(f"| {question} | {ours} | {same} | {ask(merged, swarm.model, question)} |")


def run_sentiment(swarm: Setting, local: Setting) -> None:
    """See `benchmarks.sentiment`."""
    ours, theirs = (sentiment.train(setting.model, setting.address) for setting in (swarm, local))
    same = sum(a == b for a, b in zip(ours.predictions, theirs.predictions, strict=True))
    rows = [
        ("accuracy on the held-out sentences", f"{ours.accuracy:.3f}", f"{theirs.accuracy:.3f}"),
        ("same predictions", f"{same} of {len(ours.predictions)}", ""),
        ("accuracy before training", f"{ours.accuracy_before:.3f}", f"{theirs.accuracy_before:.3f}"),
    ]
    write_losses(swarm.out, ours.losses, theirs.losses)
    print_table(f"sentiment: {len(ours.losses)} steps", rows, ours.losses, theirs.losses)
    (swarm.out / "predictions.json").write_text(json.dumps([ours.predictions, theirs.predictions]))


@torch.no_grad()
def ask(model: Any, folder: Path, question: str) -> str:
    """The greedy answer to a question."""
    tokenizer = load_tokenizer(str(folder))
    inputs = encode_prompt(tokenizer, question, chat=True)
    tokens = model.generate(**inputs, max_new_tokens=40, do_sample=False)
    return str(tokenizer.decode(tokens[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)).strip()


def write_losses(out: Path, ours: Sequence[float], theirs: Sequence[float]) -> None:
    """losses.csv: step, swarm, local."""
    with (out / "losses.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(("step", "swarm", "local"))
        writer.writerows((number, *pair) for number, pair in enumerate(zip(ours, theirs, strict=True), start=1))


def print_table(title: str, rows: list[tuple[str, ...]], ours: Sequence[float], theirs: Sequence[float]) -> None:
    """A Markdown table; its last line is what the two sides' losses differ by at most."""
    print(f"### {title}, {_PEERS} peers, {torch.get_num_threads()} threads each\n")
    print("| figure | swarm | local |\n|---|---|---|")
    for name, *values in rows:
        print(f"| {name} | {' | '.join(values)} |")
    print(f"| loss, mean of the last ten steps | {_tail(ours):.4f} | {_tail(theirs):.4f} |")
    difference = max(abs(a - b) for a, b in zip(ours, theirs, strict=True))
    print(f"| largest difference of a step's loss | {difference:.2g} | |")


def _tail(losses: Sequence[float]) -> float:
    return sum(losses[-10:]) / len(losses[-10:])


def main() -> None:
    """Run one of the three."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("task", choices=("alpaca", "persona", "sentiment"))
    parser.add_argument("--out", type=Path, default=None, help="a new folder; default: finetune-TASK")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="of each process")
    parser.add_argument("--steps", type=int, default=100, help="of alpaca")
    options = parser.parse_args()
    out: Path = options.out or Path(f"finetune-{options.task}")
    if out.exists():
        parser.error(f"{out} exists; name another folder with --out, or remove it")
    out.mkdir(parents=True)
    torch.set_num_threads(options.threads)
    transformers.utils.logging.disable_progress_bar()
    model = fetch_sample_model()
    with running_swarm(model, _PEERS, options.threads) as peers:
        swarm, local = Setting(model, out, peers[0].address), Setting(model, out, None)
        if options.task == "alpaca":
            run_alpaca(swarm, local, options.steps)
        elif options.task == "persona":
            run_persona(swarm, local)
        else:
            run_sentiment(swarm, local)


if __name__ == "__main__":
    main()
