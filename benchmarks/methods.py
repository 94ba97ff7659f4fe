"""What each fine-tuning method costs: parameters, memory on the client, bytes on the wire.

python -m benchmarks.methods     SmolLM2-135M-Instruct in float32 over three spans, steps of 2 x 64 tokens

Bytes are those of one step after the first, everything included. Hidden states and their gradients alone are the same
for all methods but those that put virtual tokens before the text.
"""

import argparse
import gc
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import peft
import torch
import transformers
from torch import nn

from benchmarks.core import running_swarm
from benchmarks.traffic import counting
from client import AutoDistributedModelForCausalLM
from client.ghosts.tensor import GhostTensor
from peer.commands.sample_model import fetch_sample_model

_PEERS, _ROWS, _TOKENS = 3, 2, 64
_QV = {"target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM"}
_VIRTUAL = {"num_virtual_tokens": 20, "task_type": "CAUSAL_LM"}

METHODS: dict[str, Callable[[], peft.PeftConfig]] = {
    "LoRA r=8, all linear layers": lambda: peft.LoraConfig(r=8, target_modules="all-linear", task_type="CAUSAL_LM"),
    "LoRA r=8, q and v": lambda: peft.LoraConfig(r=8, **_QV),
    "rsLoRA r=8, q and v": lambda: peft.LoraConfig(r=8, use_rslora=True, **_QV),
    "DoRA r=8, q and v": lambda: peft.LoraConfig(r=8, use_dora=True, **_QV),
    "AdaLoRA r=12 to 8, q and v": lambda: peft.AdaLoraConfig(init_r=12, target_r=8, total_step=100, **_QV),
    "IA3, k, v and down": lambda: peft.IA3Config(
        target_modules=["k_proj", "v_proj", "down_proj"], feedforward_modules=["down_proj"], task_type="CAUSAL_LM"
    ),
    "VeRA r=256, q and v": lambda: peft.VeraConfig(r=256, **_QV),
    "LoHa r=8, q and v": lambda: peft.LoHaConfig(r=8, **_QV),
    "LoKr r=8, q and v": lambda: peft.LoKrConfig(r=8, **_QV),
    "OFT, blocks of 32, q and v": lambda: peft.OFTConfig(r=0, oft_block_size=32, **_QV),
    "prompt tuning, 20 tokens": lambda: peft.PromptTuningConfig(**_VIRTUAL),
    "P-tuning, 20 tokens": lambda: peft.PromptEncoderConfig(encoder_hidden_size=576, **_VIRTUAL),
    "prefix tuning, 20 tokens": lambda: peft.PrefixTuningConfig(**_VIRTUAL),
}


@dataclass(frozen=True)
class Cost:
    """Parameters trained; bytes of adapter and AdamW's state held by the client; bytes of one step."""

    trainable: int
    held: int
    sent: int
    received: int


def measure(model: Any, config: peft.PeftConfig) -> Cost:
    """Two steps of a method on a fresh model; the second is counted."""
    before = {tensor.data_ptr() for tensor in _held(model)}
    torch.manual_seed(0)
    tuned = peft.get_peft_model(model, config).train()
    trained = [parameter for parameter in tuned.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-3)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, model.config.vocab_size, (_ROWS, _TOKENS), generator=generator)
    for _ in range(2):
        with counting() as traffic:
            tuned(input_ids=ids, attention_mask=torch.ones_like(ids), labels=ids).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    adapter = {tensor.data_ptr(): tensor.nbytes for tensor in _held(tuned) if tensor.data_ptr() not in before}
    state = sum(value.nbytes for slots in optimizer.state.values() for value in slots.values())
    return Cost(sum(p.numel() for p in trained), sum(adapter.values()) + state, traffic.sent, traffic.received)


def _held(model: nn.Module) -> Iterator[torch.Tensor]:
    """The tensors whose values are on this machine."""
    for tensor in (*model.parameters(), *model.buffers()):
        if not isinstance(tensor, GhostTensor) and not isinstance(tensor.data, GhostTensor):
            yield tensor


def main() -> None:
    """Measure and print a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="of each process")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    transformers.utils.logging.disable_progress_bar()
    folder = fetch_sample_model()
    print("| method | trained parameters | adapter and AdamW | sent | received |\n|---|---|---|---|---|")
    with running_swarm(folder, _PEERS, options.threads) as peers:
        for name, make in METHODS.items():
            model = AutoDistributedModelForCausalLM.from_pretrained(str(folder), initial_peers=[peers[0].address])
            cost = measure(model, make())
            sizes = " | ".join(f"{size / 2**20:.2f} MiB" for size in (cost.held, cost.sent, cost.received))
            print(f"| {name} | {cost.trainable:,} | {sizes} |", flush=True)
            del model
            gc.collect()


if __name__ == "__main__":
    main()
