"""Adapters as models."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx2 as httpx
import openai
import peft
import pytest
from transformers import AutoModelForCausalLM

from tests.tools.gateway import Local, RunningGateway

PROMPT, NEW = [5, 6, 7, 8, 9], 12


def local_with(spoken: Path, adapter: Path) -> str:
    model = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(spoken), adapter).eval()
    return Local(spoken, model).text(PROMPT, NEW)


def text(client: openai.OpenAI, model: str) -> str:
    return client.completions.create(model=model, prompt=PROMPT, max_tokens=NEW, temperature=0).choices[0].text


def post(gateway: RunningGateway, path: str, **content: Any) -> httpx.Response:
    return httpx.post(f"{gateway.url}{path}", json=content, timeout=60)


def test_each_model_its_own_text(
    gateway: RunningGateway, client: openai.OpenAI, local: Local, spoken: Path, adapters: Path
) -> None:
    """At once, also beside one that changes the LM head, which is loaded and unloaded meanwhile."""
    base, tuned = local.text(PROMPT, NEW), local_with(spoken, adapters / "blocks")
    head = local_with(spoken, adapters / "head")
    assert len({base, tuned, head}) == 3
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(lambda name: text(client, name), ["llama", "tuned"] * 4)) == [base, tuned] * 4
        assert post(gateway, "/v1/load_lora_adapter", lora_name="late", lora_path="head").is_success
        assert [model.id for model in client.models.list().data] == ["llama", "tuned", "late"]
        names = ["llama", "tuned", "late"] * 3
        assert list(pool.map(lambda name: text(client, name), names)) == [base, tuned, head] * 3
    assert post(gateway, "/v1/unload_lora_adapter", lora_name="late").is_success
    with pytest.raises(openai.NotFoundError):
        text(client, "late")
    assert (text(client, "llama"), text(client, "tuned")) == (base, tuned)


@pytest.mark.parametrize(
    ("name", "path", "problem"),
    [
        ("tuned", "blocks", "The name 'tuned' is taken"),
        ("new", "/etc", "is no folder in the gateway's --adapter-folder"),
        ("new", "..", "is no folder in the gateway's --adapter-folder"),
        ("new", "blocks/../blocks", "is no folder in the gateway's --adapter-folder"),
        ("new", "empty", "cannot be put on the model as an adapter"),
        ("new", "prompts", "which puts tokens before each prompt and is not served"),
    ],
)
def test_what_is_not_loaded(
    gateway: RunningGateway, client: openai.OpenAI, spoken: Path, adapters: Path, name: str, path: str, problem: str
) -> None:
    (adapters / "empty").mkdir(exist_ok=True)
    config = peft.PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM")
    peft.get_peft_model(AutoModelForCausalLM.from_pretrained(spoken), config).save_pretrained(adapters / "prompts")
    before = text(client, "tuned")
    refused = post(gateway, "/v1/load_lora_adapter", lora_name=name, lora_path=path)
    assert not refused.is_success
    assert problem in refused.json()["error"]["message"]
    assert [model.id for model in client.models.list().data] == ["llama", "tuned"]
    assert text(client, "tuned") == before


def test_the_base_model_stays(gateway: RunningGateway) -> None:
    assert post(gateway, "/v1/unload_lora_adapter", lora_name="llama").status_code == 400
