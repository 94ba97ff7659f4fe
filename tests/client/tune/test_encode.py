"""Records to token ids and labels: what the loss counts, to the character (in these tests a token is a byte)."""

from pathlib import Path
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


# ---- what a chat template shows

FULL = (
    "{% if tools %}<|im_start|>tools\n{{ tools | tojson }}<|im_end|>\n{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
    "{% if m.reasoning_content %}<think>{{ m.reasoning_content }}</think>{% endif %}"
    "{{ m['content'] }}"
    "{% for call in m.tool_calls or [] %}"
    "<call>{{ call.function.name }}{{ call.function.arguments | tojson }}{% endfor %}"
    "<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
PARTS = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
    "{% for part in m['content'] %}{{ part.text }}{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TOOLS = [{"type": "function", "function": {"name": "add", "description": "Adds.", "parameters": {"type": "object"}}}]
WITH_TOOLS = {
    "messages": [
        {"role": "developer", "content": "rule"},
        {"role": "user", "content": "q"},
        {
            "role": "assistant",
            "content": None,
            "reasoning_content": "hm",
            "tool_calls": [{"type": "function", "function": {"name": "add", "arguments": {"a": 2}}}],
        },
        {"role": "tool", "content": "5"},
        {"role": "assistant", "content": "five"},
    ],
    "tools": TOOLS,
}


def encode_noting(values: dict[str, Any], template: str | None, **options: Any) -> tuple[list[Example], dict[str, str]]:
    encoder = Encoder(byte_tokenizer(template), **{"max_length": 900, **options})
    examples = encoder.encode(Converter("auto", {}, encoder.notes)(Row("place", values)), "place")
    return examples, dict(encoder.notes.lines())


def test_the_template_gets_the_whole_message_and_the_tools() -> None:
    """The same ids as Transformers makes of the same record."""
    template = FULL + "{# developer #}"
    (example,), notes = encode_noting(WITH_TOOLS, template)
    theirs = byte_tokenizer(template).apply_chat_template(WITH_TOOLS["messages"], tools=TOOLS, return_dict=True)
    assert example.ids.tolist() == theirs["input_ids"]
    assert show(example)[1] == '|<think>hm</think><call>add{"a": 2}<|im_end|>|five<|im_end|>|'
    assert notes == {}


@pytest.mark.parametrize(
    ("family", "learned"),
    [
        (
            "qwen3",
            [
                '|<think>\nhm\n</think>\n\n<tool_call>\n{"name": "add", "arguments": {"a": 2}}\n</tool_call><|im_end|>|'
                "<think>\n\n</think>\n\nfive<|im_end|>|"
            ],
        ),
        ("llama3_1", ['|{"name": "add", "parameters": {"a": 2}}<|eot_id|>|five<|eot_id|>']),
        (
            "gptoss",  # drops the thinking when the last answer has come
            [
                "|<|channel|>analysis<|message|>hm<|end|><|start|>assistant to=functions.add<|channel|>commentary json"
                '<|message|>{"a": 2}<|call|>',
                "|<|channel|>final<|message|>five<|return|>",
            ],
        ),
    ],
)
def test_tool_calls_in_the_templates_of_models(family: str, learned: list[str]) -> None:
    """As they come with TRL."""
    folder = Path(pytest.importorskip("trl").__file__).parent / "chat_templates"
    tokenizer = byte_tokenizer((folder / f"{family}.jinja").read_text())
    tokenizer.bos_token = "<eos>"
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_end|>", "<|eot_id|>", "<|call|>", "<|return|>"]})
    record = Converter("auto", {})(Row("place", WITH_TOOLS))
    examples = Encoder(tokenizer, max_length=9000).encode(record, "place")
    assert [show(example, tokenizer)[1] for example in examples] == learned


def test_what_the_template_does_not_show_is_noted() -> None:
    values = {**WITH_TOOLS, "messages": [{**message, "mood": "gay"} for message in WITH_TOOLS["messages"]]}
    (example,), notes = encode_noting(values, byte_tokenizer().chat_template)
    assert show(example)[0].startswith("<|im_start|>system\nrule<|im_end|>")
    assert notes.pop("roles") == "'developer' read as system (1)"
    assert notes == {"not shown by the template": "'mood' (1), 'reasoning_content' (1), 'tool_calls' (1), 'tools' (1)"}
    assert sorted(encode_noting(WITH_TOOLS, None)[1]) == ["not shown by the template", "roles"]


@pytest.mark.parametrize("template", [None, byte_tokenizer().chat_template, PARTS])
def test_content_in_parts_is_what_it_is_as_text(template: str | None) -> None:
    """Whichever of the two the template can show."""
    said = [
        {**message, "content": [{"type": "text", "text": letter} for letter in message["content"]]}
        for message in TWO_TURNS["messages"]
    ]
    (parts,), notes = encode_noting({"messages": said}, template)
    (text,), _ = encode_noting(TWO_TURNS, template)
    assert show(parts) == show(text)
    assert show(text) == show(encode(TWO_TURNS, template and byte_tokenizer().chat_template)[0])
    assert notes == {}


def test_a_template_that_understands_both_gets_what_the_record_has() -> None:
    both = PARTS.replace(
        "{% for part", "{% if m['content'] is string %}{{ m['content'] }}{% else %}[{% for part"
    ).replace("{% endfor %}<|im_end|>", "{% endfor %}]{% endif %}<|im_end|>")
    said = [{**message, "content": [{"type": "text", "text": message["content"]}]} for message in TWO_TURNS["messages"]]
    assert show(encode({"messages": said}, both)[0])[1] == "|[a1]<|im_end|>|[a2]<|im_end|>|"
    assert show(encode(TWO_TURNS, both)[0])[1] == "|a1<|im_end|>|a2<|im_end|>|"


@pytest.mark.parametrize("template", [None, byte_tokenizer().chat_template, FULL])
def test_an_assistant_who_begins_is_learned_from_its_first_word(template: str | None) -> None:
    end = "<|im_end|>" if template else "<eos>"
    values = {"messages": [{"role": "assistant", "content": "0 hello"}, *TWO_TURNS["messages"]]}
    (example,) = encode(values, template)
    assert show(example)[1] == f"|0 hello{end}|a1{end}|a2{end}|".removesuffix("" if template else "|")


def test_messages_that_a_record_takes_out_of_the_loss() -> None:
    said = [dict(message) for message in TWO_TURNS["messages"]]
    said[1]["weight"], said[2]["train"] = 0, True
    for template, end in ((byte_tokenizer().chat_template, "<|im_end|>"), (REWRITING, "<|im_end|>")):
        examples = encode({"messages": said}, template)
        assert "".join(show(example)[1] for example in examples).replace("<think></think>", "").replace("||", "|") == (
            f"|q2{end}|a2{end}|"
        )
    with pytest.raises(DataError, match=r"place takes a message out of the loss, and data\.train_on: all counts"):
        encode({"messages": said}, None, train_on="all")


def test_a_template_that_fails_on_a_record() -> None:
    """With whatever error its expressions make."""
    (example,) = encode(TWO_TURNS, "{% for m in messages %}{{ m.content + m.get('name', '') }}<|im_end|>{% endfor %}")
    assert "a1" in show(example)[0]
    for template in ("{% for m in messages %}{{ m.content + 1 }}{% endfor %}", "{{ messages[0].name.strip() }}"):
        with pytest.raises(DataError, match="place: the model's chat template refuses this conversation: "):
            encode(TWO_TURNS, template)


def test_a_tokenizer_with_several_chat_templates() -> None:
    tokenizer = byte_tokenizer()
    plain = tokenizer.chat_template
    tokenizer.chat_template = {"default": plain, "tool_use": FULL}
    record = Converter("auto", {})(Row("place", WITH_TOOLS))
    assert "<call>add" in show(Encoder(tokenizer, max_length=900).encode(record, "place")[0])[1]
    tokenizer.chat_template = {"one": plain, "other": FULL}
    with pytest.raises(ConfigError, match="has several chat templates and no default: one, other"):
        Encoder(tokenizer, max_length=900)


def test_rows_that_learn_next_to_nothing_are_noted() -> None:
    blind = byte_tokenizer().chat_template.replace("m['content']", "m['words']")
    (example,), notes = encode_noting(TWO_TURNS, blind)
    assert show(example)[1] == "|<|im_end|>|<|im_end|>|"
    assert notes == {
        "warning": "records with one token an answer or less in the loss: look whether the chat template shows them (1)"
    }
    assert encode_noting({"prompt": "p", "completion": "c"}, None)[1] == {}


# ---- text and tokens


def begun(add_eos: bool = False) -> PreTrainedTokenizerFast:
    """A tokenizer that puts <eos> before each text, and (`add_eos`) <pad> behind it."""
    fast = byte_tokenizer()
    fast.bos_token, fast.eos_token = "<eos>", "<pad>"
    ends = [("<eos>", fast.bos_token_id), ("<pad>", fast.eos_token_id)]
    template = "<eos> $A <pad>" if add_eos else "<eos> $A"
    fast.backend_tokenizer.post_processor = processors.Sequence(
        [processors.ByteLevel(trim_offsets=False), processors.TemplateProcessing(single=template, special_tokens=ends)]
    )
    return fast


@pytest.mark.parametrize("add_eos", [False, True])
def test_special_tokens_that_a_text_brings_are_not_added_again(add_eos: bool) -> None:
    tokenizer = begun(add_eos)
    for values in (
        {"prompt": "p", "completion": "cd"},
        {"prompt": "<eos>p", "completion": "cd"},
        {"prompt": "<eos>p", "completion": "cd<pad>"},
    ):
        record = Converter("auto", {})(Row("place", values))
        (example,) = Encoder(tokenizer, max_length=50).encode(record, "place")
        assert show(example, tokenizer) == ("<eos>pcd<pad>", "|cd<pad>")
        assert example.prompt == 2
    twice = Converter("auto", {})(Row("place", {"text": "<eos><eos>p"}))
    assert show(Encoder(byte_tokenizer(), max_length=50).encode(twice, "place")[0])[0] == "<eos><eos>p<eos>"


def test_half_a_character() -> None:
    expected = (
        r"place holds half a character \('\\ud83d'\), as text that was cut within an emoji does; mend or remove it"
    )
    for values in (
        {"text": "hi \ud83d"},
        {"messages": [{"role": "user", "content": "\ud83d"}, TWO_TURNS["messages"][1]]},
    ):
        for template in (byte_tokenizer().chat_template, None):
            with pytest.raises(DataError, match=expected):
                encode(values, template)
    with pytest.raises(DataError, match=r"samples\.prompts holds half a character"):
        Encoder(byte_tokenizer(), max_length=9).question("\udc00", as_chat=False)


def test_a_token_that_the_model_has_no_embedding_for() -> None:
    expected = (
        r"holds the token '<\|im_end\|>' with the id 259, and the model has embeddings for ids up to 258; use the"
    )
    assert encode(ALPACA, byte_tokenizer().chat_template, vocabulary=260)
    with pytest.raises(DataError, match=f"place {expected}"):
        encode(ALPACA, byte_tokenizer().chat_template, vocabulary=259)
    with pytest.raises(DataError, match=rf"samples\.prompts {expected}"):
        Encoder(byte_tokenizer(), max_length=9, vocabulary=259).question("<|im_end|>", as_chat=False)


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
