"""Golden numbers: tokens, losses and gradients that real peers gave, kept as a file so that they stay what they are.

`python -m tests.tools.golden` writes them anew, which only a change that is meant to change numbers may do.
"""

import hashlib
import json
import re
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from tests.tools.families import build_family
from tests.tools.methods import METHODS, adapted, batch_for, load, trainable
from tests.tools.swarm import ForkServer, Swarm, new_swarm

FILE = Path(__file__).with_name("golden.json")
_SPANS = ("0:2", "2:5")


@dataclass(frozen=True)
class Case:
    """A model on two peers, and the adapter that is trained through them."""

    family: str
    method: str
    options: tuple[str, ...] = ()
    """Of `peer serve`."""

    @property
    def name(self) -> str:
        return " ".join((self.family, self.method, *self.options))


_NF4, _INT8 = ("--quantize", "nf4"), ("--quantize", "int8")
CASES = (
    Case("bloom", "LoRA"),
    Case("bloom", "prefix tuning"),
    Case("gpt2", "IA3"),
    Case("llama", "DoRA"),
    Case("llama", "LoRA all-linear"),
    Case("llama", "AdaLoRA"),
    Case("llama", "LoRA", _NF4),
    Case("bloom", "LoRA", _INT8),
    Case("mixtral", "LoRA", ("--dtype", "bfloat16")),
    Case("gemma2", "PiSSA"),
)


def machine() -> dict[str, str]:
    """What the last bits of a product depend on."""
    model = re.search(r"^model name\s*: (.*)$", Path("/proc/cpuinfo").read_text(), re.M)
    return {
        "cpu": model[1] if model else "",
        "capability": torch.backends.cpu.get_cpu_capability(),
        "torch": torch.__version__,
    }


def measure(case: Case, path: Path, swarm: Swarm) -> dict[str, Any]:
    """The numbers of one case, on peers that serve it: tokens, losses, and the norm of each gradient, by name."""
    model = load(path, "CAUSAL_LM", swarm.initial_peers)
    batch = batch_for("CAUSAL_LM")
    ids, mask = batch["input_ids"], batch["attention_mask"]
    greedy = model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=8, do_sample=False)
    beams = model.generate(input_ids=ids[1:2], max_new_tokens=6, num_beams=3, do_sample=False)
    tuned = adapted(model, METHODS[case.method](case.family, "CAUSAL_LM"))
    optimizer = torch.optim.AdamW([parameter for _, parameter in trainable(tuned)], lr=1e-2)
    tuned.train()
    losses, seen = list[float](), list[torch.Tensor]()
    gradients = dict[str, float]()
    for _ in range(2):
        torch.manual_seed(11)
        output = tuned(**batch)
        output.loss.backward()
        losses.append(output.loss.item())
        found = {name: parameter.grad for name, parameter in trainable(tuned) if parameter.grad is not None}
        gradients = {name: grad.double().norm().item() for name, grad in found.items()}
        seen += [output.logits.detach(), *(grad.clone() for grad in found.values())]
        optimizer.step()
        optimizer.zero_grad()
    digest = hashlib.sha256(b"".join(tensor.float().contiguous().numpy().tobytes() for tensor in seen))
    return {
        "greedy": greedy.tolist(),
        "beams": beams.tolist(),
        "losses": losses,
        "gradients": gradients,
        "sha256 of all logits and gradients": digest.hexdigest(),
    }


def measure_all(server: ForkServer, models: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Every case by its name, on peers of its own; the model's folders are made under `models`."""
    for case in CASES:
        with new_swarm(server) as swarm:
            path = build_family(case.family, models)
            swarm.serve(path, *_SPANS, options=case.options)
            yield case.name, measure(case, path, swarm)


def main() -> None:
    """Write the file."""
    torch.set_num_threads(1)
    server = ForkServer()
    try:
        with tempfile.TemporaryDirectory() as models:
            cases = dict(measure_all(server, Path(models)))
    finally:
        server.close()
    FILE.write_text(json.dumps({"machine": machine(), "cases": cases}, indent=1) + "\n")


if __name__ == "__main__":
    main()
