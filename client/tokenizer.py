"""Text to tokens."""

from collections.abc import Sequence
from typing import Any

from transformers import AutoTokenizer, PreTrainedConfig

from protocol.errors import BadUsage, first_line
from protocol.model.checkpoint import find_file


def load_tokenizer(model: str, revision: str | None = None) -> Any:
    """The model's tokenizer, with a padding token. Raises `BadUsage` when it has none that can be loaded."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(model, revision=revision)
    except (ValueError, OSError, KeyError, TypeError) as error:
        raise BadUsage(f"{model} has no tokenizer that can be loaded ({first_line(error)}).") from error
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_adapted_tokenizer(adapter: str, model: str, revision: str | None = None) -> Any:
    """The tokenizer that the PEFT adapter `adapter` (a folder or hub name) brings, else the model's, with the adapter's
    chat template where it brings that alone: what `peer merge` puts into a merged model. Raises as `load_tokenizer`.
    """
    if find_file(adapter, "tokenizer_config.json") is not None:
        return load_tokenizer(adapter)
    tokenizer = load_tokenizer(model, revision)
    if (template := find_file(adapter, "chat_template.jinja")) is not None:
        tokenizer.chat_template = template.read_text(encoding="utf-8")
    return tokenizer


def vocabulary_size(config: PreTrainedConfig) -> int:
    """Rows of the model's table of embeddings: a token has an id below it."""
    return int(config.get_text_config().vocab_size)


def fault_of_text(text: str) -> str | None:
    """What makes a text none that can be tokenized, to stand after the name of its place; None: nothing."""
    broken = next((letter for letter in text if "\ud800" <= letter <= "\udfff"), None) if not text.isascii() else None
    if broken is None:
        return None
    return f"holds half a character ({broken!r}), as text that was cut within an emoji does; mend or remove it"


def fault_of_tokens(tokenizer: Any, ids: Sequence[int], vocabulary: int | None) -> str | None:
    """What keeps a model of `vocabulary` embeddings (None: of any number) from reading `ids`, to stand after the name
    of their place; None: nothing.
    """
    largest = max(ids, default=0)
    if vocabulary is None or largest < vocabulary:
        return None
    return (
        f"holds the token {tokenizer.convert_ids_to_tokens(largest)!r} with the id {largest}, and the model has"
        f" embeddings for ids up to {vocabulary - 1}; use the model's own tokenizer, or a model resized for this one"
    )


def encode_prompt(tokenizer: Any, prompt: str, chat: bool, vocabulary: int | None = None) -> dict[str, Any]:
    """`input_ids` and `attention_mask`, (1, tokens), of a prompt, or of it as a user's message in a chat.

    Raises `BadUsage` for a prompt that is empty or no text, or has tokens that a model of `vocabulary` embeddings
    (None: of any number) lacks.
    """
    if fault := fault_of_text(prompt):
        raise BadUsage(f"The prompt {fault}.")
    if not chat:
        encoded = tokenizer(prompt, return_tensors="pt")
    elif tokenizer.chat_template is None:
        raise BadUsage("This model has no chat template; leave out --chat.")
    else:
        messages = [{"role": "user", "content": prompt}]
        encoded = tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
    ids, mask = encoded["input_ids"], encoded["attention_mask"]
    if not chat and tokenizer.bos_token and prompt.startswith(tokenizer.bos_token):
        doubled = ids[0, :2].tolist() == [tokenizer.bos_token_id] * 2  # the prompt's own, and the tokenizer's
        ids, mask = ids[:, int(doubled) :], mask[:, int(doubled) :]
    if not ids.shape[1]:
        raise BadUsage("The prompt is empty; give at least one token to go on from.")
    if fault := fault_of_tokens(tokenizer, ids[0].tolist(), vocabulary):
        raise BadUsage(f"The prompt {fault}.")
    return {"input_ids": ids, "attention_mask": mask}
