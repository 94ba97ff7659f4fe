"""samples.md: what the model answers without the adapter and with it."""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from peft import PeftModel
from torch import Tensor
from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True, slots=True)
class Sample:
    """A prompt and its greedy continuations."""

    prompt: str
    before: str
    after: str


@torch.no_grad()
def generate_samples(
    model: PeftModel, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[Tensor], max_new_tokens: int
) -> list[Sample]:
    """Continues each prompt (token ids [length]) with the adapter off (before) and on (after)."""
    model.eval()
    with warnings.catch_warnings():
        # PEFT's prompt methods say so at every token; without padding the positions are what they would be anyway.
        warnings.filterwarnings("ignore", "Position ids are not supported")
        with model.disable_adapter():
            before = [_continue(model, tokenizer, prompt, max_new_tokens) for prompt in prompts]
        after = [_continue(model, tokenizer, prompt, max_new_tokens) for prompt in prompts]
    texts = [str(tokenizer.decode(prompt, skip_special_tokens=True)) for prompt in prompts]
    return [Sample(*three) for three in zip(texts, before, after, strict=True)]


def samples_markdown(model: str, steps: int, samples: Sequence[Sample]) -> str:
    """The samples as a Markdown page."""
    lines = [f"# Samples of {model} before and after {steps} steps", ""]
    for number, sample in enumerate(samples, start=1):
        lines += [f"## {number}", ""]
        for title, text in (("Prompt", sample.prompt), ("Before", sample.before), ("After", sample.after)):
            lines += [f"**{title}**", "", "~~~~text", text.strip(), "~~~~", ""]
    return "\n".join(lines)


def _continue(model: PeftModel, tokenizer: PreTrainedTokenizerBase, prompt: Tensor, max_new_tokens: int) -> str:
    ids = prompt.long()[None].to(model.device)
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    output = model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=max_new_tokens,
        do_sample=False,
        pad_token_id=pad,
    )
    return str(tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True))
