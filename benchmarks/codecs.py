"""Bytes on the wire with each codec: per token decoded, and per token of a training step.

python -m benchmarks.codecs      SmolLM2-135M-Instruct in float32 over two spans, every codec in both directions

Of a training step only hidden states and their gradients are counted: the client's embeddings are trained, no adapter.
"""

import argparse
from typing import Any

import torch
import transformers

from benchmarks.core import MODELS, fetch_model, running_swarm
from benchmarks.traffic import counting
from client import AutoDistributedModelForCausalLM
from client.certify.measure import PAIRS

_PEERS, _TOKENS = 2, 16
_BATCH = (2, 64)


def decode_bytes(model: Any) -> float:
    """Sent and received per token of a generation."""
    ids = torch.randint(3, model.config.vocab_size, (1, 8), generator=torch.Generator().manual_seed(0))

    def count(tokens: int) -> int:
        with counting() as traffic, torch.no_grad():
            model.generate(
                input_ids=ids, attention_mask=torch.ones_like(ids), do_sample=False, min_new_tokens=tokens,
                max_new_tokens=tokens,
            )  # fmt: skip
        return traffic.sent + traffic.received

    count(1)  # streams are opened
    return (count(_TOKENS + 1) - count(1)) / _TOKENS


def training_bytes(model: Any) -> float:
    """Sent and received per token of a forward and backward."""
    ids = torch.randint(3, model.config.vocab_size, _BATCH, generator=torch.Generator().manual_seed(0))
    model.get_input_embeddings().weight.requires_grad_(True)
    with counting() as traffic:
        model(input_ids=ids, labels=ids).loss.backward()
    return (traffic.sent + traffic.received) / ids.numel()


def main() -> None:
    """Measure and print a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=MODELS, default="smollm2")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="of each process")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    transformers.utils.logging.disable_progress_bar()
    folder = fetch_model(options.model)
    print("| hidden states | gradients | bytes per token decoded | bytes per token trained |\n|---|---|---|---|")
    with running_swarm(folder, _PEERS, options.threads) as peers:
        for codec, gradients in {"none": "none", **PAIRS}.items():
            model = AutoDistributedModelForCausalLM.from_pretrained(
                str(folder), initial_peers=[peers[0].address], codec_out=codec, codec_back=codec,
                codec_gradients=gradients,
            )  # fmt: skip
            figures = f"{decode_bytes(model):,.0f} | {training_bytes(model):,.0f}"
            print(f"| {codec} | {gradients} | {figures} |", flush=True)


if __name__ == "__main__":
    main()
