"""What an adapter says of its training is heeded: its base, the revision of that, its tokenizer and chat template."""

import json
import shutil
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers

from client.merge.origin import choose_revision
from client.merge.run import merge_adapter
from client.tokenizer import load_adapted_tokenizer
from tests.tools.command import Command
from tests.tools.hub import keep_revisions

TRAINED: dict[str, Any] = {"base_model_name_or_path": "acme/tiny", "revision": "dev"}
ANOTHER = "Note that the adapter names another base: acme/tiny."


def plain(folder: Path) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(folder)


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    result: torch.Tensor = model.eval()(torch.arange(3, 35).view(2, 16)).logits
    return result


def edit(file: Path, **changes: Any) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


@pytest.fixture
def adapter(llama: Path, tmp_path: Path) -> Path:
    torch.manual_seed(1)
    config = peft.LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
    peft.get_peft_model(plain(llama), config).save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


@pytest.mark.parametrize(
    ("asked", "merged_into", "said"),
    [
        ([], "dev", None),
        (["--base", "acme/tiny"], "dev", None),
        (
            ["--base", "acme/tiny", "--revision", "main"],
            "main",
            "Note that the adapter was trained on revision dev of acme/tiny, not on main.",
        ),
        (["--base", "{main}"], "main", ANOTHER),
    ],
)
def test_the_base_is_the_one_of_the_training(
    llama: Path,
    adapter: Path,
    tmp_path: Path,
    command: Command,
    monkeypatch: pytest.MonkeyPatch,
    asked: list[str],
    merged_into: str,
    said: str | None,
) -> None:
    """Of two revisions on the hub, the adapter was trained on the second, dev."""
    folders = {"main": llama, "dev": tmp_path / "dev"}
    other = plain(llama)
    other.get_output_embeddings().weight.data.neg_()
    other.save_pretrained(folders["dev"])
    keep_revisions(tmp_path / "hub", "acme/tiny", folders, monkeypatch)
    edit(adapter / "adapter_config.json", **TRAINED)
    outcome = command("merge", adapter, *(word.format(**folders) for word in asked), "--out", tmp_path / "out")
    assert outcome.code == 0, outcome
    reference = peft.PeftModel.from_pretrained(plain(folders[merged_into]), adapter).merge_and_unload()
    assert torch.equal(logits(plain(tmp_path / "out")), logits(reference))
    assert [line for line in outcome.stdout.splitlines() if line.startswith("Note")] == ([said] if said else [])


def test_an_adapter_that_names_no_base(adapter: Path, tmp_path: Path, command: Command) -> None:
    edit(adapter / "adapter_config.json", base_model_name_or_path=None)
    refusal = command("merge", adapter, "--out", tmp_path / "out").refusal()
    assert "adapter_config.json names no base model; name the one it was trained on (--base)." in refusal


def test_the_output_of_a_run_is_no_adapter(adapter: Path, llama: Path, tmp_path: Path, command: Command) -> None:
    refusal = command("merge", adapter.parent, "--base", llama, "--out", tmp_path / "out").refusal()
    assert refusal.endswith(f"it has no adapter_config.json; did you mean {adapter}?")


def test_tokens_that_the_base_lacks(adapter: Path, llama: Path, tmp_path: Path, command: Command) -> None:
    edit(adapter / "adapter_config.json", trainable_token_indices=[128])
    refusal = command("merge", adapter, "--base", llama, "--out", tmp_path / "out").refusal()
    assert "trains tokens that this base has no embeddings for (index 128 is out of bounds" in refusal
    assert refusal.endswith("if only the vocabulary was resized, save the resized base and merge into that.")


def test_what_is_said_of_other_bases(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "copies" / "tiny").mkdir(parents=True)
    copied = "Note that the adapter was trained on revision dev of acme/tiny; expected that in copies/tiny."
    assert choose_revision(TRAINED, "ACME/tiny", None) == ("dev", [])
    assert choose_revision(TRAINED, "acme/tiny", "dev") == ("dev", [])
    assert choose_revision(TRAINED, "other/tiny", None) == (None, [ANOTHER])
    assert choose_revision(TRAINED, "copies/tiny", None) == (None, [copied])
    for vague in ({"base_model_name_or_path": "acme/tiny"}, {}, {"base_model_name_or_path": 5, "revision": 7}):
        assert choose_revision(vague, "acme/tiny", "v2") == ("v2", [])
    assert choose_revision({"base_model_name_or_path": "acme/tiny"}, "copies/tiny", None) == (None, [])
    assert choose_revision({"base_model_name_or_path": "/moved/tiny"}, "acme/tiny", None) == (None, [])


@pytest.mark.parametrize("own", ["a whole tokenizer", "a template in its tokenizer", "a template alone", "none"])
def test_the_chat_template_is_the_adapters(llama: Path, adapter: Path, tmp_path: Path, own: str) -> None:
    """In what `peer merge` writes, and in what `peer generate --adapter` takes."""
    base = shutil.copytree(llama, tmp_path / "base")
    (base / "chat_template.jinja").write_text("base")
    tokenizer = transformers.AutoTokenizer.from_pretrained(llama)
    if own == "a whole tokenizer":
        tokenizer.chat_template = "adapter"
        tokenizer.save_pretrained(adapter)
    elif own == "a template in its tokenizer":  # as it was saved some years ago
        tokenizer.save_pretrained(adapter)
        edit(adapter / "tokenizer_config.json", chat_template="adapter")
    elif own == "a template alone":
        (adapter / "chat_template.jinja").write_text("adapter")
    merge_adapter(adapter, base, tmp_path / "out")
    merged = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    used = load_adapted_tokenizer(str(adapter), str(base))
    assert merged.chat_template == used.chat_template == ("base" if own == "none" else "adapter")
