"""A tokenizer for small random models: token 7 is the word `w7`."""

from pathlib import Path

from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import PreTrainedTokenizerFast


def save_tokenizer(folder: Path, vocabulary: int) -> PreTrainedTokenizerFast:
    """Put a tokenizer of `vocabulary` words into a model's folder."""
    tokenizer = Tokenizer(WordLevel({f"w{i}": i for i in range(vocabulary)}, unk_token="w3"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="w0", bos_token="w1", eos_token="w2")
    fast.save_pretrained(folder)
    return fast
