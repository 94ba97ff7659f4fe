"""What models of BLOOM's scale take, from meta skeletons of their real shapes.

Run as `python -m benchmarks.capacity > docs/capacity.md`. Nothing is measured; the page has each column's formula.
"""

import copy
from bisect import bisect_right
from dataclasses import dataclass
from functools import cache
from itertools import product

import torch
import transformers as tf
from torch._subclasses.fake_tensor import FakeTensorMode

from peer.start.memory import ROW, WEIGHTS_SHARE, Budget
from peer.training.allocated import Allocated
from peer.training.footprint import Growth, lora_bytes
from protocol.model.anatomy import find_blocks, hidden_size

GIB, MIB, KIB = 2**30, 2**20, 2**10
BYTES_PER_WEIGHT = {"bf16": 2.0, "int8": 1.05, "nf4": 0.57}
LORA_RANK = 16
MODELS: dict[str, tf.PretrainedConfig] = {
    "BLOOM-176B": tf.BloomConfig(vocab_size=250880, hidden_size=14336, n_layer=70, n_head=112),
    "Llama-3.1-405B": tf.LlamaConfig(
        vocab_size=128256, hidden_size=16384, intermediate_size=53248, num_hidden_layers=126, num_attention_heads=128,
        num_key_value_heads=8, max_position_embeddings=131072,
    ),
    "Llama-3.3-70B": tf.LlamaConfig(
        vocab_size=128256, hidden_size=8192, intermediate_size=28672, num_hidden_layers=80, num_attention_heads=64,
        num_key_value_heads=8, max_position_embeddings=131072,
    ),
}  # fmt: skip
GPUS = {"A100 80 GB": (80, 2.0e12), "RTX 4090 24 GB": (24, 1.0e12), "T4 16 GB": (16, 0.32e12)}
"""Memory in GiB, and bytes per second that it is read at."""
LINKS = {
    "1 Gbit/s, 5 ms": (125e6, 0.005), "100 Mbit/s, 5 ms": (12.5e6, 0.005), "100 Mbit/s, 100 ms": (12.5e6, 0.1),
}  # fmt: skip
"""Bytes per second, and seconds of a round trip."""
CARDS = (8, 12, 24, 80)
"""GiB of memory."""
_DRIVER = 0.5
"""GiB of a card that a process gets nothing of: CUDA's own."""
_MAX_LENGTH, _STEP = 8192, 512
CONTEXT = 2048
_SHARE = 0.8
"""Of a GPU's memory, for weights and KV cache; the rest is for activations, adapters and the CUDA context."""


@dataclass(frozen=True)
class Sizes:
    """What a model's shapes say."""

    blocks: int
    hidden: int
    block_weights: int
    outside_weights: int
    """Embeddings, LM head and norms: the client's."""
    cache_numbers: int
    """Keys and values of one token in one block."""
    lora_numbers: int
    """LoRA of rank `LORA_RANK` on every linear layer of one block."""
    linear_inputs: int
    """Numbers that go into the linear layers of one block for each token."""
    largest_weight: int
    """Numbers of the largest linear layer's."""


@cache
def measure(name: str) -> Sizes:
    """The sizes of one of `MODELS`, from a skeleton without memory."""
    config = MODELS[name]
    with torch.device("meta"):
        model = tf.AutoModelForCausalLM.from_config(config)
    blocks = find_blocks(model).of(model)
    block = sum(p.numel() for p in blocks[0].parameters())
    linears = [module for module in blocks[0].modules() if isinstance(module, torch.nn.Linear)]
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    return Sizes(
        len(blocks),
        hidden_size(config),
        block,
        sum(p.numel() for p in model.parameters()) - block * len(blocks),
        2 * heads * (hidden_size(config) // config.num_attention_heads),
        sum(LORA_RANK * (linear.in_features + linear.out_features) for linear in linears),
        sum(linear.in_features for linear in linears),
        max(linear.weight.numel() for linear in linears),
    )


@cache
def graph_growth(name: str) -> Growth:
    """What one block of `MODELS` keeps of a row for its backward, in bf16: from runs on tensors without memory."""
    return Growth.through(1, _STEP, [kept for kept, _ in _runs(name)])


@cache
def peak_growth(name: str) -> Growth:
    """What it takes at most, while it is computed without a graph and then again."""
    return Growth.through(1, _STEP, [history for _, history in _runs(name)])


@cache
def _runs(name: str) -> list[tuple[int, list[int]]]:
    with FakeTensorMode():
        one, two = (_trunk(name, blocks) for blocks in (1, 2))
        return [_run(one, two, count * _STEP) for count in (1, 2, 3)]


def _trunk(name: str, blocks: int) -> tf.PreTrainedModel:
    config = copy.deepcopy(MODELS[name])
    config.num_hidden_layers = blocks
    trunk: tf.PreTrainedModel = tf.AutoModel.from_config(config, dtype=torch.bfloat16)
    return trunk.requires_grad_(False)


def _run(one: tf.PreTrainedModel, two: tf.PreTrainedModel, tokens: int) -> tuple[int, list[int]]:
    """Forward without a graph, of two blocks: BLOOM holds on to one's probabilities in the next. Then one, and back."""
    saved = {parameter.untyped_storage()._cdata: 0 for parameter in one.parameters()}

    def save(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        saved.setdefault(storage._cdata, storage.nbytes())
        return tensor.detach()  # or an operation that saves its own result would hold itself

    hidden = torch.empty(1, tokens, one.config.hidden_size, dtype=torch.bfloat16, requires_grad=True)
    with Allocated() as allocated:
        with torch.no_grad():
            two(inputs_embeds=hidden, use_cache=False)
        with torch.autograd.graph.saved_tensors_hooks(save, lambda tensor: tensor):
            result = one(inputs_embeds=hidden, use_cache=False)[0]
        torch.autograd.grad(result, hidden, torch.empty_like(result))
    return sum(saved.values()), allocated.history


def blocks_per_gpu(sizes: Sizes, memory: float, form: str, tokens: int = CONTEXT) -> int:
    """How many blocks fit `memory` GiB with a KV cache of so many tokens in bf16."""
    block = sizes.block_weights * BYTES_PER_WEIGHT[form] + tokens * sizes.cache_numbers * 2
    return int(memory * GIB * _SHARE // block)


def link_seconds(hidden: int, spans: int, bandwidth: float, round_trip: float) -> float:
    """Of one decode step, what goes by between the peers: hidden states in bf16, handed from span to span."""
    return (spans + 1) * (round_trip / 2 + hidden * 2 / bandwidth)


def decode_seconds(sizes: Sizes, spans: int, form: str, read: float, bandwidth: float, round_trip: float) -> float:
    """A lower bound of one decode step: each weight read once, hidden states handed from span to span."""
    reading = sizes.blocks * sizes.block_weights * BYTES_PER_WEIGHT[form] / read
    return reading + link_seconds(sizes.hidden, spans, bandwidth, round_trip)


@dataclass(frozen=True)
class Card:
    """A card of so many GiB that serves `blocks` blocks of a model, their weights in a form, as `peer serve` does."""

    name: str
    form: str
    memory: int
    blocks: int

    @classmethod
    def as_chosen(cls, name: str, form: str, memory: int) -> "Card":
        """With as many blocks as a peer takes that is not told how many."""
        card = cls(name, form, memory, 0)
        most = int(WEIGHTS_SHARE * card.free // card.block)
        return cls(name, form, memory, max(1, min(most, measure(name).blocks)))

    @property
    def block(self) -> float:
        """Bytes of a block's weights."""
        return measure(self.name).block_weights * BYTES_PER_WEIGHT[self.form]

    @property
    def free(self) -> int:
        """Bytes that are free once the blocks are loaded."""
        return int((self.memory - _DRIVER) * GIB - self.blocks * self.block)

    @property
    def budget(self) -> Budget:
        """What that memory is for."""
        token_bytes = measure(self.name).cache_numbers * 2 * self.blocks
        return Budget.of(self.free, token_bytes, None, _MAX_LENGTH, self.row_bytes(ROW))

    def row_bytes(self, tokens: int) -> int:
        """What a row of so many tokens takes in training at least, with LoRA and dropout on all linear layers."""
        sizes, states = measure(self.name), tokens * measure(self.name).hidden * 2 * (self.blocks + 1)
        kept, most = (growth(self.name).at(1, tokens) for growth in (graph_growth, peak_growth))
        return states + max(most, kept + sizes.largest_weight * 2) + lora_bytes(tokens, sizes.linear_inputs)

    @property
    def longest_row(self) -> int:
        """Tokens of the longest row that can be trained."""
        room = self.budget.kept + self.budget.call
        return bisect_right(range(1, _MAX_LENGTH + 1), room, key=self.row_bytes)

    @property
    def in_flight(self) -> int:
        """Tokens of all rows that the hidden states between blocks can be kept of."""
        return self.budget.kept // (measure(self.name).hidden * 2 * (self.blocks + 1))


def training_table() -> str:
    """What cards of several sizes can train."""
    lines = [
        f"| model | weights | card | blocks | free then | KV cache | a row of {ROW:,} takes | longest row "
        f"| in flight | blocks for rows of {ROW:,} |",
        f"|{'---|' * 10}",
    ]
    for name, form, memory in product(("BLOOM-176B", "Llama-3.3-70B"), ("int8", "nf4"), CARDS):
        card = Card.as_chosen(name, form, memory)
        if card.free <= 0:
            lines.append(f"| {name} | {form} | {memory} GB | 0 |{' |' * 6}")
            continue
        counts = range(card.blocks, 0, -1)
        able = next((count for count in counts if Card(name, form, memory, count).longest_row >= ROW), 0)
        lines.append(
            f"| {name} | {form} | {memory} GB | {card.blocks} | {card.free / GIB:.1f} GiB "
            f"| {card.budget.cache_tokens:,} tokens | {card.row_bytes(ROW) / GIB:.1f} GiB | {card.longest_row:,} "
            f"| {card.in_flight:,} | {able} |"
        )
    return "\n".join(lines)


def model_table() -> str:
    """What the ends hold and what crosses the wire, per model."""
    lines = [
        "| model | blocks | block: bf16, int8, nf4 | client holds | KV per token and block "
        f"| per token and span, one way | LoRA r={LORA_RANK}, all linear |",
        "|---|---|---|---|---|---|---|",
    ]
    for name in MODELS:
        sizes = measure(name)
        block = ", ".join(f"{sizes.block_weights * size / GIB:.2f}" for size in BYTES_PER_WEIGHT.values())
        lora = sizes.lora_numbers * sizes.blocks
        lines.append(
            f"| {name} | {sizes.blocks} | {block} GiB | {sizes.outside_weights * 2 / GIB:.1f} GiB | "
            f"{sizes.cache_numbers * 2 / KIB:.0f} KiB | {sizes.hidden * 2 / KIB:.0f} KiB | "
            f"{lora / 1e6:.0f} M numbers: {lora * 4 / MIB:.0f} MiB on the wire, {lora * 16 / GIB:.1f} GiB with AdamW |"
        )
    return "\n".join(lines)


def speed_table() -> str:
    """Spans needed and decode steps per second at best, per model, GPU and link."""
    lines = [
        f"| model | weights | GPUs | blocks each | {' | '.join(LINKS)} |",
        f"|---|---|---|---|{'---|' * len(LINKS)}",
    ]
    for name, form, (gpu, (memory, read)) in product(MODELS, ("int8", "nf4"), GPUS.items()):
        sizes = measure(name)
        each = blocks_per_gpu(sizes, memory, form)
        if not each:
            continue
        spans = -(-sizes.blocks // each)
        rates = (1 / decode_seconds(sizes, spans, form, read, *link) for link in LINKS.values())
        lines.append(f"| {name} | {form} | {spans} x {gpu} | {each} | {' | '.join(f'{rate:.2f}' for rate in rates)} |")
    return "\n".join(lines)


PAGE = """\
# Capacity: what models of BLOOM's scale take

Made by `python -m benchmarks.capacity` from skeletons of the real shapes on torch's meta device; do not edit.
**Nothing on this page is measured**: no machine of ours can hold these models. It is arithmetic, to plan with.

## What the ends hold, and what crosses the wire

{models}

- Block: its weights x 2, 1.05 or 0.57 bytes (quantization's scales included).
- Client: embeddings, LM head and norms in bf16 (tied ones once); adapters and their optimizer come on top.
- KV: 2 x KV heads x head size x 2 bytes. A peer with `n` blocks and `t` tokens of cache holds `n t` times as much.
- Per token and span, one way: hidden size x 2 bytes. Where peers hand their results to each other, a training token
  crosses the client's link 4 x (out and back, forward and backward), whatever the number of spans; a decoded token
  goes out once and comes back once per span, for failover. Through the client (near peers, or `verify`) it is out and
  back for every span. Wire codecs divide all of it.
- LoRA: rank x (inputs + outputs) per linear layer. On the wire x 4 bytes (float32, as PEFT keeps it; half in bf16),
  once per optimizer step to the peers, and as much in gradients back per micro-batch; so on slow links use large
  micro-batches, a low rank, or fewer layers. On the client x 16 bytes with AdamW (weight, gradient, two moments, all
  in float32).

## What a card can train

{training}

Blocks: as many as `peer serve` takes when it is not told how many, {share:.0%} of what is free for weights. Then the
memory is shared out as `peer serve` does it: room for a row of {row:,} tokens and a KV cache of as many come first. A
row that does not fit as a whole is computed again block by block in its backward. That takes its hidden states between
all blocks; the most that one block takes while it is computed and differentiated, or its graph and its largest weight,
dequantized; and what LoRA with dropout on all linear layers adds, in float32. BLOOM's attention keeps its probabilities
(ALiBi: there is no fused kernel), so that one block keeps {bloom} of rows of 1,024 and 2,048 tokens;
Llama-70B's {llama}. In flight: tokens of all rows between forward and backward; of more, inputs are sent
again. Last column: with so many blocks or fewer, rows of {row:,} tokens can be trained; 0: this card cannot.

## Decode steps per second, at best

{speeds}

Blocks each: what fits 80 % of the memory with a KV cache of {context:,} tokens in bf16. Seconds of a step: the bytes
of all weights / the memory's bytes per second + (spans + 1) x (half a round trip + hidden size x 2 bytes / link's bytes
per second), as peers hand hidden states to each other. It leaves out kernels' launch times, which are of the same
order for int8 and nf4 at batch 1. For comparison, the Petals paper (arXiv 2209.01188) measured 1.71, 1.66 and 1.23
steps per second for BLOOM-176B in int8 on three A100 over these three links, each span's result going back to the
client; that is a sixth to a third of what stands here. Batches and forwards read the weights once for many tokens:
their time is the links' and the arithmetic's.
"""


def page() -> str:
    """docs/capacity.md."""
    bloom, llama = (
        ", ".join(f"{graph_growth(name).at(1, tokens) / GIB:.2f}" for tokens in (1024, 2048)) + " GiB"
        for name in ("BLOOM-176B", "Llama-3.3-70B")
    )
    return PAGE.format(
        models=model_table(), training=training_table(), speeds=speed_table(), context=CONTEXT, row=ROW,
        share=WEIGHTS_SHARE, bloom=bloom, llama=llama,
    )  # fmt: skip


if __name__ == "__main__":
    print(page(), end="")
