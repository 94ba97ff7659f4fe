"""Text to tokens."""

from typing import Any

from transformers import AutoTokenizer

from protocol.errors import BadUsage, first_line


def load_tokenizer(model: str, revision: str | None = None) -> Any:
    """The model's tokenizer, with a padding token. Raises `BadUsage` when it has none that can be loaded."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(model, revision=revision)
    except (ValueError, OSError, KeyError, TypeError) as error:
        raise BadUsage(f"{model} has no tokenizer that can be loaded ({first_line(error)}).") from error
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def encode_prompt(tokenizer: Any, prompt: str, chat: bool) -> dict[str, Any]:
    """`input_ids` and `attention_mask`, (1, tokens), of a prompt, or of it as a user's message in a chat."""
    if not chat:
        encoded = tokenizer(prompt, return_tensors="pt")
    elif tokenizer.chat_template is None:
        raise BadUsage("This model has no chat template; leave out --chat.")
    else:
        messages = [{"role": "user", "content": prompt}]
        encoded = tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
    if not encoded["input_ids"].shape[1]:
        raise BadUsage("The prompt is empty; give at least one token to go on from.")
    return {"input_ids": encoded["input_ids"], "attention_mask": encoded["attention_mask"]}
