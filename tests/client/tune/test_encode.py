"""Records to token ids and labels: what the loss counts, to the character (in these tests a token is a byte)."""

from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from client.tune.data.encode import IGNORED, Encoder, Example
from client.tune.data.files import Row
from client.tune.data.formats import Converter
from client.tune.errors import ConfigError, DataError
from tests.tools.tune import byte_tokenizer

PLAIN = "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
TWO_TURNS = {
    "messages": [
        {"role": "user", "content": "q1"},
        {"role": "assistant", "content": "a1"},
        {"role": "user", "content": "q2"},
        {"role": "assistant", "content": "a2"},
    ]
}
ALPACA = {"instruction": "q", "input": "i", "output": "a"}
# As Qwen3 does: thinking stays only in the last answer.
REWRITING = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
    "{% if m['role'] == 'assistant' and loop.last %}<think></think>{% endif %}"
    "{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
OPEN_ENDED = "{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }}\n{% endfor %}"
THINKING = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n{% endif %}"
)
REFUSING = "{{ raise_exception('only users may speak') }}"


def encode(values: dict[str, Any], template: str | None, whole_file: bool = False, **options: Any) -> list[Example]:
    record = Converter("auto", {})(Row("place", values, whole_file))
    return Encoder(byte_tokenizer(template), **{"max_length": 500, **options}).encode(record, "place")


def show(example: Example, tokenizer: PreTrainedTokenizerFast | None = None) -> tuple[str, str]:
    """The whole text, and the text of what the loss counts, gaps shown as '|'."""
    tokenizer = tokenizer or byte_tokenizer()
    counted = "".join(
        "|" if label == IGNORED else tokenizer.decode([token])
        for token, label in zip(example.ids.tolist(), example.labels.tolist(), strict=True)
    )
    assert all(label in (IGNORED, token) for token, label in zip(example.ids, example.labels, strict=True))
    while "||" in counted:
        counted = counted.replace("||", "|")
    return tokenizer.decode(example.ids), counted


def test_alpaca_through_the_chat_template() -> None:
    (example,) = encode(ALPACA, byte_tokenizer().chat_template)
    text, counted = show(example)
    assert text == "<|im_start|>user\nq\ni<|im_end|>\n<|im_start|>assistant\na<|im_end|>\n"
    assert counted == "|a<|im_end|>|"
    assert byte_tokenizer().decode(example.ids[: example.prompt]).endswith("<|im_start|>assistant\n")


def test_every_answer_of_a_conversation_counts() -> None:
    (example,) = encode(TWO_TURNS, byte_tokenizer().chat_template)
    assert show(example)[1] == "|a1<|im_end|>|a2<|im_end|>|"
    assert byte_tokenizer().decode(example.ids[: example.prompt]).endswith("q2<|im_end|>\n<|im_start|>assistant\n")


def test_without_a_chat_template_the_plain_one() -> None:
    (example,) = encode(ALPACA, None)
    assert show(example) == (f"{PLAIN}### Instruction:\nq\ni\n\n### Response:\na<eos>", "|a<eos>")
    (example,) = encode(TWO_TURNS, None)
    text, counted = show(example)
    assert text.count("<eos>") == 2
    assert text.endswith("### Response:\na2<eos>")
    assert counted == "|a1<eos>|a2<eos>"


def test_prompt_completion_and_text_have_no_markup() -> None:
    (example,) = encode({"prompt": "p ", "completion": "c"}, byte_tokenizer().chat_template)
    assert show(example) == ("p c<eos>", "|c<eos>")
    (example,) = encode({"text": "abc"}, byte_tokenizer().chat_template)
    assert show(example) == ("abc<eos>", "|bc<eos>")  # nothing predicts the first token
    (example,) = encode({"text": "abc<eos>"}, None)
    assert show(example)[0] == "abc<eos>"


@pytest.mark.parametrize("values", [ALPACA, TWO_TURNS, {"prompt": "p", "completion": "c"}])
def test_the_loss_on_all(values: dict[str, Any]) -> None:
    (example,) = encode(values, byte_tokenizer().chat_template, train_on="all")
    assert example.learned == len(example) - 1
    assert example.labels[0] == IGNORED


def test_a_template_that_rewrites_earlier_turns_gives_one_example_an_answer() -> None:
    first, second = (show(example) for example in encode(TWO_TURNS, REWRITING))
    assert first == (
        "<|im_start|>user\nq1<|im_end|>\n<|im_start|>assistant\n<think></think>a1<|im_end|>\n",
        "|<think></think>a1<|im_end|>|",
    )
    assert second[0].startswith("<|im_start|>user\nq1<|im_end|>\n<|im_start|>assistant\na1<|im_end|>\n")
    assert second[1] == "|<think></think>a2<|im_end|>|"


def test_a_template_without_an_end_mark_gets_the_end_of_sequence_token() -> None:
    (example,) = encode(ALPACA, OPEN_ENDED)
    assert show(example) == ("[user] q\ni\n[assistant] a\n<eos>", "|[assistant] a\n<eos>")


def test_a_header_that_asks_for_thinking_is_no_part_of_the_answer() -> None:
    (example,) = encode(ALPACA, THINKING)
    assert show(example)[1] == "|a<|im_end|>"


def test_the_system_message() -> None:
    given = {"messages": [{"role": "system", "content": "own"}, *TWO_TURNS["messages"]]}
    for template in (byte_tokenizer().chat_template, None):
        (example,) = encode(ALPACA, template, system="rule")
        assert show(example)[0].count("rule") == 1
        (example,) = encode(given, template, system="rule")
        assert "rule" not in show(example)[0]
        assert "own" in show(example)[0]
    assert "Below is" not in show(encode(ALPACA, None, system="rule")[0])[0]


def test_a_user_who_has_the_last_word_is_not_learned() -> None:
    values = {"messages": [*TWO_TURNS["messages"], {"role": "user", "content": "bye"}]}
    for template, end in ((byte_tokenizer().chat_template, "<|im_end|>"), (None, "<eos>")):
        (example,) = encode(values, template)
        assert show(example)[1] == f"|a1{end}|a2{end}|"


def test_a_token_that_reaches_into_the_answer_counts_and_added_ones_do_not() -> None:
    words = {"<s>": 0, "</s>": 1, "<unk>": 2, "▁Q:": 3, "▁A:": 4, "▁yes": 5, "▁why": 6}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    record = Converter("auto", {})(Row("place", {"prompt": "Q: why A: ", "completion": "yes"}))
    (example,) = Encoder(fast, max_length=50).encode(record, "place")
    assert example.ids.tolist() == [0, 3, 6, 4, 5, 1]
    assert example.labels.tolist() == [IGNORED] * 4 + [5, 1]
    assert example.prompt == 4


def test_a_record_that_is_too_long() -> None:
    values = {"prompt": "p" * 10, "completion": "c" * 10}
    with pytest.raises(DataError) as caught:
        encode(values, None, max_length=12)
    assert str(caught.value) == (
        "place is 21 tokens long, over data.max_length (12); shorten it, raise data.max_length, or set data.too_long to"
        " truncate or drop"
    )
    assert encode(values, None, max_length=12, too_long="drop") == []
    (example,) = encode(values, None, max_length=12, too_long="truncate")
    assert show(example) == ("p" * 10 + "cc", "|cc")
    assert encode(values, None, max_length=10, too_long="truncate") == []  # nothing of the answer is left


def test_what_gives_nothing_is_counted() -> None:
    encoder = Encoder(byte_tokenizer(None), max_length=12, too_long="drop")
    for answer in ("short", "far too long"):
        encoder.encode(Converter("auto", {})(Row("place", {"prompt": "p", "completion": answer})), "place")
    assert encoder.dropped == 1


def test_a_text_file_is_cut_in_windows() -> None:
    examples = encode({"text": "abcdefghij"}, None, whole_file=True, max_length=4)
    assert [show(example) for example in examples] == [("abcd", "|bcd"), ("efgh", "|fgh"), ("ij<eos>", "|j<eos>")]


def test_a_conversation_that_the_template_refuses() -> None:
    with pytest.raises(DataError, match="place: the model's chat template refuses this conversation: only users may"):
        encode(ALPACA, REFUSING)


def test_a_slow_tokenizer_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(PreTrainedTokenizerFast, "is_fast", False)
    with pytest.raises(ConfigError, match="has no fast version"):
        Encoder(byte_tokenizer(), max_length=8)


def test_a_question_is_asked_as_the_model_was_taught() -> None:
    for template, expected in (
        (byte_tokenizer().chat_template, "<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\n"),
        (None, f"{PLAIN}### Instruction:\nq\n\n### Response:\n"),
    ):
        encoder = Encoder(byte_tokenizer(template), max_length=99)
        assert byte_tokenizer().decode(encoder.question("q", as_chat=True)) == expected
        assert byte_tokenizer().decode(encoder.question("q", as_chat=False)) == "q"


def test_the_tokens_are_those_of_the_template_itself() -> None:
    """The same ids as Transformers' own rendering, and labels as its own generation marks give them."""
    marked = byte_tokenizer().chat_template.replace(
        "{{ m['content'] }}<|im_end|>\n",
        "{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] }}<|im_end|>{% endgeneration %}"
        "{% else %}{{ m['content'] }}<|im_end|>{% endif %}{{ '\n' }}",
    )
    theirs = byte_tokenizer(marked).apply_chat_template(
        TWO_TURNS["messages"], return_dict=True, return_assistant_tokens_mask=True
    )
    (example,) = encode(TWO_TURNS, byte_tokenizer().chat_template)
    assert example.ids.tolist() == theirs["input_ids"]
    assert (example.labels != IGNORED).int().tolist() == theirs["assistant_masks"]
    assert example.ids.dtype == example.labels.dtype == torch.int32
