"""samples.md: what the model answers without the adapter and with it."""

import logging
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor
from transformers import PreTrainedTokenizerBase

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Sample:
    """A prompt and its continuations, drawn without chance."""

    prompt: str
    before: str
    after: str


@torch.no_grad()
def generate_samples(
    model: PeftModel, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[Tensor], max_new_tokens: int
) -> list[Sample]:
    """Continues each prompt (token ids [length]) with the adapter off (before) and on (after).

    Raises:
        ValueError: the model's generation configuration asks for what Transformers cannot do here.
    """
    model.eval()
    options = one_text(model, tokenizer) | {"max_new_tokens": max_new_tokens, "do_sample": False}
    with warnings.catch_warnings():
        # PEFT's prompt methods say so at every token; without padding the positions are what they would be anyway.
        warnings.filterwarnings("ignore", "Position ids are not supported")
        with model.disable_adapter():
            before = [_continue(model, tokenizer, prompt, options) for prompt in prompts]
        after = [_continue(model, tokenizer, prompt, options) for prompt in prompts]
    texts = [str(tokenizer.decode(prompt, skip_special_tokens=True)) for prompt in prompts]
    return [Sample(*three) for three in zip(texts, before, after, strict=True)]


def one_text(model: Any, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """Options of `model.generate` with which it returns tokens (1, all tokens) for a prompt, whatever its generation
    configuration asks for beside that. What is left out is logged.
    """
    count = model.generation_config.num_return_sequences or 1
    if count > 1:
        _log.warning("generation_config.json asks for num_return_sequences=%d; one text is written.", count)
    plain = dict.fromkeys(("return_dict_in_generate", "output_attentions", "output_hidden_states"), False)
    return {"tokenizer": tokenizer, "num_return_sequences": 1, **plain}  # stop strings need the tokenizer


def samples_markdown(model: str, steps: int, samples: Sequence[Sample]) -> str:
    """The samples as a Markdown page."""
    lines = [f"# Samples of {model} before and after {steps} steps", ""]
    for number, sample in enumerate(samples, start=1):
        lines += [f"## {number}", ""]
        for title, text in (("Prompt", sample.prompt), ("Before", sample.before), ("After", sample.after)):
            lines += [f"**{title}**", "", "~~~~text", text.strip(), "~~~~", ""]
    return "\n".join(lines)


def _continue(model: PeftModel, tokenizer: PreTrainedTokenizerBase, prompt: Tensor, options: dict[str, Any]) -> str:
    ids = prompt.long()[None].to(model.device)
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    output = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), pad_token_id=pad, **options)
    return str(tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True))
