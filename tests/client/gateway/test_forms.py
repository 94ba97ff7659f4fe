"""Answers of a prescribed form, tools, and what reads as several letters or none, with a model of bytes."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2 as httpx
import openai
import pytest
import torch
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from client.gateway.chat import ToolCalls
from client.gateway.engine.text import Stops, TextStream
from tests.tools.gateway import Local, RunningGateway, new_gateway
from tests.tools.swarm import ForkServer, new_swarm

SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 5}, "kind": {"enum": ["cat", "dog"]}, "tame": {"type": "boolean"},
    },
    "required": ["name", "kind", "tame"],
    "additionalProperties": False,
}  # fmt: skip
_TEMPLATE = (
    "{% for message in messages %}{{ message.content }}{% endfor %}{% if tools %}{{ tools | tojson }}{% endif %}"
)


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small llama whose tokens are bytes, and the special one that ends a text."""
    folder = tmp_path_factory.mktemp("bytes") / "bytes"
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(BPE({letter: number for number, letter in enumerate(letters)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>", chat_template=_TEMPLATE)
    fast.save_pretrained(folder)
    torch.manual_seed(3)
    config = LlamaConfig(
        vocab_size=264, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        eos_token_id=fast.eos_token_id, bos_token_id=None, pad_token_id=None, initializer_range=0.5,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def bytewise(fork_server: ForkServer, path: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningGateway]:
    with new_swarm(fork_server) as swarm:
        swarm.serve(path, "0:2")
        with new_gateway(fork_server, swarm, path, tmp_path_factory.mktemp("bytewise")) as running:
            yield running


def ask(gateway: RunningGateway, **options: Any) -> Any:
    given: dict[str, Any] = {"model": "bytes", "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 300}
    with gateway.client() as client:
        return client.chat.completions.create(**given | options).choices[0]


@pytest.mark.parametrize("seed", range(3))
def test_json_of_a_schema(bytewise: RunningGateway, seed: int) -> None:
    form = {"type": "json_schema", "json_schema": {"name": "pet", "schema": SCHEMA}}
    choice = ask(bytewise, response_format=form, seed=seed, max_tokens=1000)
    pet = json.loads(choice.message.content)
    assert choice.finish_reason == "stop"
    assert pet.keys() == {"name", "kind", "tame"}
    assert pet["kind"] in ("cat", "dog")
    assert isinstance(pet["tame"], bool)
    assert len(pet["name"]) <= 5


def test_a_regular_expression(bytewise: RunningGateway) -> None:
    for seed in range(3):
        choice = ask(bytewise, response_format={"type": "regex", "regex": "(ab|c){2,4}-[0-9]{3}"}, seed=seed)
        assert re.fullmatch("(ab|c){2,4}-[0-9]{3}", choice.message.content)
    endless = {"ignore_eos": True, "response_format": {"type": "regex", "regex": "abc"}}
    assert ask(bytewise, max_tokens=9, extra_body=endless).message.content == "abc"


@pytest.mark.parametrize(
    ("form", "problem"),
    [
        ({"type": "regex", "regex": "("}, "The regular expression cannot be kept to"),
        ({"type": "regex"}, "the type regex needs the field regex"),
        ({"type": "json_schema", "json_schema": {"schema": {"type": "nothing"}}}, "The JSON schema cannot be kept to"),
        ({"type": "xml"}, "response_format"),
    ],
)
def test_forms_that_are_none(bytewise: RunningGateway, form: Any, problem: str) -> None:
    with pytest.raises(openai.BadRequestError, match=re.escape(problem)):
        ask(bytewise, response_format=form)


def test_characters_of_several_bytes(bytewise: RunningGateway) -> None:
    """A stream never has half of one: pieces together are the whole text."""
    form = {"type": "regex", "regex": "(é|😀|語){4,9}"}
    with bytewise.client() as client:
        options: dict[str, Any] = {"model": "bytes", "prompt": "x", "max_tokens": 60, "seed": 1}
        options["extra_body"] = {"response_format": form}
        whole = client.completions.create(**options).choices[0].text
        pieces = [piece.choices[0].text for piece in client.completions.create(stream=True, **options)]
    assert re.fullmatch("(é|😀|語){4,9}", whole)
    assert "".join(pieces) == whole
    assert not any("\ufffd" in piece for piece in pieces)


def test_stops_within_and_across_pieces() -> None:
    stops = Stops(["END", "NO"])
    assert [stops.add(piece) for piece in ("aE", "b", "cEN", "Nx", "EN", "Dy")] == ["a", "Eb", "c", "ENNx", "", ""]
    assert stops.found
    stops = Stops(["END"])
    assert stops.add("xEN") + stops.end() == "xEN"


def test_text_that_depends_on_what_was_before(path: Path) -> None:
    tokenizer = Local(path).tokenizer
    ids = tokenizer("naïve 😀 café 語")["input_ids"]
    text = TextStream(tokenizer, ids[:2])
    grown = "".join(text.add(token) for token in ids[2:]) + text.end()
    assert tokenizer.decode(ids[:2]) + grown == tokenizer.decode(ids)
    cut = TextStream(tokenizer, ids[:1])
    assert "".join(cut.add(token) for token in ids[1:9]) == "aïve "  # of the next character three bytes have come
    assert cut.end() == "\ufffd"


TOOLS = [{"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}]


def test_tools_are_called(bytewise: RunningGateway) -> None:
    called = '<tool_call>\n{"name": "weather", "arguments": {"city": "Oslo"}}\n</tool_call>'
    options: dict[str, Any] = {
        "tools": TOOLS,
        "response_format": {"type": "regex", "regex": f"Well[.] {re.escape(called)}"},
    }
    choice = ask(bytewise, **options)
    assert choice.finish_reason == "tool_calls"
    assert choice.message.content == "Well. "
    assert choice.message.tool_calls[0].function.name == "weather"
    assert json.loads(choice.message.tool_calls[0].function.arguments) == {"city": "Oslo"}
    messages: list[Any] = [{"role": "user", "content": "Hi"}]
    with bytewise.client() as client:
        stream = client.chat.completions.create(
            model="bytes", messages=messages, max_tokens=300, stream=True, **options
        )
        pieces = [piece.choices[0] for piece in stream]
    assert "".join(piece.delta.content or "" for piece in pieces) == "Well. "
    assert pieces[-1].finish_reason == "tool_calls"
    assert pieces[-1].delta.tool_calls[0].function.name == "weather"
    without = ask(bytewise, **options | {"tool_choice": "none"})
    assert without.message.content == f"Well. {called}"
    told = [*messages, choice.message.model_dump(exclude_none=True), {"role": "tool", "content": "Rain"}]
    assert ask(bytewise, messages=told, tools=TOOLS).message.role == "assistant"


def test_what_is_no_call_stays_text() -> None:
    calls = ToolCalls()
    text = calls.add("a <tool_") + calls.add("call>{") + calls.add("}")
    assert text + calls.end()[0] == "a <tool_call>{}"


def test_tokenize(bytewise: RunningGateway, path: Path) -> None:
    def post(name: str, **content: Any) -> Any:
        answer = httpx.post(f"{bytewise.url}/{name}", json=content)
        return answer.json()

    ids = Local(path).ids("Hi é")
    assert post("tokenize", prompt="Hi é")["tokens"] == ids
    assert post("tokenize", model="bytes", messages=[{"role": "user", "content": "Hi"}])["tokens"] == ids[:2]
    assert post("detokenize", tokens=ids) == {"prompt": "Hi é"}
    assert post("detokenize", tokens=[9999])["error"]["type"] == "invalid_request_error"
    assert post("tokenize")["error"]["message"] == "Give a prompt or messages to tokenize."
    assert httpx.get(f"{bytewise.url}/tokenizer_info").json()["eos_token"] == "<end>"


def test_templates_get_what_is_for_them_only(bytewise: RunningGateway) -> None:
    with pytest.raises(openai.BadRequestError, match="'chat_template' is not for the template"):
        ask(bytewise, extra_body={"chat_template_kwargs": {"chat_template": "{{ 1 }}"}})
    parts = [{"type": "image_url", "image_url": {"url": "data:"}}]
    with pytest.raises(openai.BadRequestError, match="only text can be sent through a swarm"):
        ask(bytewise, messages=[{"role": "user", "content": parts}])
