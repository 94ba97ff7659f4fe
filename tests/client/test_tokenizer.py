"""Prompts to token ids, and what is said of those that cannot be."""

import pytest
import torch
from tokenizers import processors
from transformers import PreTrainedTokenizerFast

from client.tokenizer import encode_prompt
from protocol.errors import BadUsage
from tests.tools.tune import byte_tokenizer


def beginning() -> PreTrainedTokenizerFast:
    """A tokenizer that puts <eos> before each text."""
    fast = byte_tokenizer()
    fast.bos_token = "<eos>"
    template = processors.TemplateProcessing(single="<eos> $A", special_tokens=[("<eos>", fast.bos_token_id)])
    fast.backend_tokenizer.post_processor = template
    return fast


@pytest.mark.parametrize("chat", [False, True])
def test_a_prompt_is_what_transformers_makes_of_it(chat: bool) -> None:
    tokenizer = beginning()
    theirs = tokenizer("hi", return_tensors="pt")
    if chat:
        messages = [{"role": "user", "content": "hi"}]
        theirs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt")
    ours = encode_prompt(tokenizer, "hi", chat)
    assert torch.equal(ours["input_ids"], theirs["input_ids"])
    assert torch.equal(ours["attention_mask"], theirs["attention_mask"])


def test_a_prompt_that_brings_the_first_token_gets_no_second() -> None:
    whole = encode_prompt(beginning(), "hi", chat=False)
    for tokenizer in (beginning(), byte_tokenizer()):
        own = encode_prompt(tokenizer, "<eos>hi", chat=False)
        assert torch.equal(own["input_ids"], whole["input_ids"])
        assert own["attention_mask"].shape == own["input_ids"].shape


def test_a_prompt_that_no_model_can_read() -> None:
    with pytest.raises(
        BadUsage, match=r"^The prompt holds half a character \('\\ud83d'\), as text .* mend or remove it\.$"
    ):
        encode_prompt(byte_tokenizer(), "hi \ud83d", chat=False)
    with pytest.raises(
        BadUsage, match=r"^The prompt holds the token '<\|im_end\|>' with the id 259, .* up to 258; use the"
    ):
        encode_prompt(byte_tokenizer(), "hi<|im_end|>", chat=False, vocabulary=259)
    with pytest.raises(BadUsage, match="The prompt holds the token"):
        encode_prompt(byte_tokenizer(), "hi", chat=True, vocabulary=259)
    assert encode_prompt(byte_tokenizer(), "hi<|im_end|>", chat=False, vocabulary=260)["input_ids"].shape == (1, 3)
