"""OpenAI's own package against a gateway: the texts and numbers are those of plain local Transformers."""

import asyncio
from collections import Counter
from collections.abc import Iterator
from typing import Any

import openai
import pytest
import torch

from tests.tools.gateway import Local, RunningGateway

PROMPT = "w5 w6 w7 w8 w5 w6"
NEW = 12


def test_models(client: openai.OpenAI, spoken: Any, adapters: Any) -> None:
    base, tuned = client.models.list().data
    assert (base.id, base.root, base.parent) == ("llama", str(spoken), None)  # type: ignore[attr-defined]
    assert (tuned.id, tuned.root, tuned.parent) == ("tuned", str(adapters / "blocks"), "llama")  # type: ignore[attr-defined]
    assert client.models.retrieve("tuned").id == "tuned"
    with pytest.raises(openai.NotFoundError, match="'other' is not served here"):
        client.models.retrieve("other")


@pytest.mark.parametrize("prompt", [PROMPT, [5, 6, 7, 8], "w9"])
def test_greedy_completion(client: openai.OpenAI, local: Local, prompt: Any) -> None:
    answer = client.completions.create(model="llama", prompt=prompt, max_tokens=NEW, temperature=0)
    expected = local.tokens(prompt, NEW)
    (choice,) = answer.choices
    assert choice.text == local.text(prompt, NEW)
    assert choice.finish_reason == ("length" if len(expected) == NEW and expected[-1] != 2 else "stop")
    assert answer.usage
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (len(local.ids(prompt)), len(expected))


def test_several_prompts_in_order(client: openai.OpenAI, local: Local) -> None:
    prompts = [[5, 6, 7], [8], [9, 10, 11, 12, 13, 14, 15]]
    answer = client.completions.create(model="llama", prompt=prompts, max_tokens=NEW, temperature=0, n=2)
    assert [choice.index for choice in answer.choices] == list(range(6))
    assert [choice.text for choice in answer.choices] == [local.text(p, NEW) for p in prompts for _ in range(2)]
    assert answer.usage
    assert answer.usage.prompt_tokens == 11


def test_streamed_completion(client: openai.OpenAI, local: Local) -> None:
    stream = client.completions.create(
        model="llama", prompt=PROMPT, max_tokens=NEW, temperature=0, stream=True,
        stream_options={"include_usage": True},
    )  # fmt: skip
    *pieces, last = list(stream)
    assert "".join(piece.choices[0].text for piece in pieces) == local.text(PROMPT, NEW)
    assert len(pieces) > 3
    assert pieces[-1].choices[0].finish_reason
    assert last.choices == []
    assert last.usage
    assert last.usage.completion_tokens == len(local.tokens(PROMPT, NEW))


def chat_ids(local: Local, *messages: str) -> list[int]:
    return local.ids(" ".join(f"w9 {message}" for message in messages) + " w10")


def test_chat(client: openai.OpenAI, local: Local) -> None:
    messages: Any = [
        {"role": "system", "content": "w5"},
        {"role": "user", "content": [{"type": "text", "text": "w6 w7"}]},
    ]
    answer = client.chat.completions.create(model="llama", messages=messages, max_tokens=NEW, temperature=0)
    ids = chat_ids(local, "w5", "w6 w7")
    assert answer.choices[0].message.role == "assistant"
    assert answer.choices[0].message.content == local.text(ids, NEW)
    assert answer.usage
    assert answer.usage.prompt_tokens == len(ids)


def test_streamed_chat_with_logprobs(client: openai.OpenAI, local: Local) -> None:
    ids = chat_ids(local, "w6")
    stream = client.chat.completions.create(
        model="llama", messages=[{"role": "user", "content": "w6"}], max_completion_tokens=NEW, temperature=0,
        stream=True, logprobs=True, top_logprobs=3,
    )  # fmt: skip
    pieces = list(stream)
    assert pieces[0].choices[0].delta.role == "assistant"
    assert "".join(piece.choices[0].delta.content or "" for piece in pieces) == local.text(ids, NEW)
    told = [entry for piece in pieces if piece.choices[0].logprobs for entry in piece.choices[0].logprobs.content or ()]
    tokens = local.tokens(ids, NEW)
    reference = local.logprobs([*ids, *tokens])[len(ids) - 1 : -1]
    assert [entry.logprob for entry in told] == pytest.approx([float(row.max()) for row in reference], abs=1e-5)
    assert all(entry.logprob == entry.top_logprobs[0].logprob for entry in told)
    assert all(len(entry.top_logprobs) == 3 for entry in told)


def test_asynchronous_clients_at_once(gateway: RunningGateway, local: Local) -> None:
    async def ask(client: openai.AsyncOpenAI, prompt: list[int], model: str) -> str:
        stream = await client.completions.create(model=model, prompt=prompt, max_tokens=NEW, temperature=0, stream=True)
        return "".join([piece.choices[0].text async for piece in stream])

    async def ask_all() -> list[str]:
        async with openai.AsyncOpenAI(**gateway.options()) as client:
            return await asyncio.gather(*(ask(client, prompt, "llama") for prompt in prompts))

    prompts = [list(range(5, 6 + 3 * count)) for count in range(8)]
    assert asyncio.run(ask_all()) == [local.text(prompt, NEW) for prompt in prompts]


@pytest.mark.parametrize("length", [1, 2, 9, 100])
def test_echoed_logprobs(client: openai.OpenAI, local: Local, length: int) -> None:
    """As evaluation harnesses ask for them."""
    ids = torch.randint(3, 128, (length,), generator=torch.Generator().manual_seed(length)).tolist()
    answer = client.completions.create(
        model="llama", prompt=[ids], echo=True, logprobs=1, max_tokens=1, temperature=0, seed=1
    )
    logprobs: Any = answer.choices[0].logprobs
    reference = local.logprobs(ids)
    new = int(reference[-1].argmax())
    expected = [float(row[token]) for row, token in zip(reference, [*ids[1:], new], strict=True)]
    assert logprobs.token_logprobs[0] is None
    assert logprobs.top_logprobs[0] is None
    assert logprobs.token_logprobs[1:] == pytest.approx(expected, abs=1e-5)
    for row, token, top, own in zip(
        reference, [*ids[1:], new], logprobs.top_logprobs[1:], logprobs.token_logprobs[1:], strict=True
    ):
        assert (max(top.values()) == own) == (int(row.argmax()) == token)
        assert max(top.values()) == pytest.approx(float(row.max()), abs=1e-5)
    assert "".join(logprobs.tokens).strip() == answer.choices[0].text.strip() or new == 2


def test_sampling_as_transformers_does(client: openai.OpenAI, local: Local) -> None:
    """The same seed draws the same tokens, whatever shapes the distribution."""
    cases: Iterator[dict[str, Any]] = iter(
        [{"temperature": 0.7}, {"top_p": 0.8}, {"top_k": 5}, {"min_p": 0.1}, {"repetition_penalty": 1.5, "top_k": 20}]
    )
    for case in cases:
        named = {key: value for key, value in case.items() if key in ("temperature", "top_p")}
        extra = {key: value for key, value in case.items() if key not in named}
        answer = client.completions.create(
            model="llama",
            prompt=PROMPT,
            max_tokens=NEW,
            seed=5,
            extra_body=extra,
            **named,  # type: ignore[call-overload]
        )
        torch.manual_seed(5)
        assert answer.choices[0].text == local.text(PROMPT, NEW, do_sample=True, **{"top_k": 0} | case), case


def test_stop_strings(client: openai.OpenAI, local: Local) -> None:
    words = local.text(PROMPT, NEW).split()
    stop = f"{words[3]} {words[4]}"
    expected = local.text(PROMPT, NEW).partition(stop)[0]
    for stream in (False, True):
        answer: Any = client.completions.create(
            model="llama", prompt=PROMPT, max_tokens=NEW, temperature=0, stop=[stop, "never"], stream=stream
        )
        pieces = list(answer) if stream else [answer]
        assert "".join(piece.choices[0].text for piece in pieces) == expected
        assert pieces[-1].choices[0].finish_reason == "stop"


def test_bias_and_penalties(client: openai.OpenAI) -> None:
    answer = client.completions.create(
        model="llama", prompt=PROMPT, max_tokens=4, temperature=0, logit_bias={"77": 100}
    )
    assert answer.choices[0].text.split() == ["w77"] * 4
    answer = client.completions.create(
        model="llama", prompt=PROMPT, max_tokens=9, temperature=0, logit_bias={"77": 100, "78": 100, "79": 100},
        frequency_penalty=2.0,
    )  # fmt: skip
    assert Counter(answer.choices[0].text.split()) == {"w77": 3, "w78": 3, "w79": 3}


def test_what_is_asked_wrongly(client: openai.OpenAI) -> None:
    def refusal(**options: Any) -> openai.BadRequestError:
        with pytest.raises(openai.BadRequestError) as refused:
            client.completions.create(**{"model": "llama", "prompt": PROMPT, "max_tokens": 3} | options)
        assert str(refused.value.body["message"]).endswith("."), refused.value.body  # type: ignore[index]
        return refused.value

    assert refusal(temperature=-1).param == "temperature"
    assert refusal(prompt=[]).param == "prompt"
    assert refusal(prompt="").param == "prompt"
    assert refusal(prompt=[500]).param == "prompt"
    assert refusal(max_tokens=300).code == "context_length_exceeded"
    assert refusal(stop=[""]).param == "stop"
    with pytest.raises(openai.NotFoundError) as missing:
        client.completions.create(model="gpt-5", prompt="w5")
    assert missing.value.code == "model_not_found"
