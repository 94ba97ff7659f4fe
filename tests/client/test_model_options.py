"""Options of `from_pretrained`: what concerns this machine is done, what peers would not know of is refused."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import client
from client import AutoDistributedModelForCausalLM
from client.model import options
from protocol.errors import BadUsage
from protocol.machine.devices import choose_device
from protocol.model import checkpoint
from protocol.model.checkpoint import Hub
from tests.tools.damage import CONFIG, edit
from tests.tools.members import SOMEBODY
from tests.tools.swarm import Swarm

IDS = torch.arange(3, 11)[None]


@pytest.fixture(scope="module")
def served(llama_swarm: tuple[Path, Swarm]) -> Swarm:
    return llama_swarm[1]


def test_a_wrong_option_of_a_client(served: Swarm, llama: Path) -> None:
    with pytest.raises(BadUsage, match="'hiden_size' is neither an option of the swarm nor of LlamaConfig"):
        served.connect(llama, hiden_size=3)
    with pytest.raises(BadUsage, match="'max_retries' is neither an option of the swarm nor of"):  # one of Petals'
        served.connect(llama, max_retries=3)
    with pytest.raises(BadUsage, match="silence_timeout"):
        served.connect(llama, silence_timeout=-1)
    with pytest.raises(BadUsage, match="expected one of float32, bfloat16, float16"):
        served.connect(llama, dtype="float9")
    with pytest.raises(BadUsage, match="from_pretrained"):
        AutoDistributedModelForCausalLM()


@pytest.mark.parametrize(
    ("option", "said"),
    [
        ({"blocked_peers": [SOMEBODY, "ada"]}, "Option blocked_peers of the swarm: 'ada' is not a peer's ID"),
        ({"allowed_peers": ["ada"]}, "Option allowed_peers of the swarm: 'ada' is not a peer's ID"),
        ({"pins": {"0:1": [SOMEBODY + "x"]}}, f"'{SOMEBODY}x' is not a peer's ID, .*; `peer status --json` shows"),
        ({"pins": {"0:1": [SOMEBODY], "3:6": [SOMEBODY]}}, "'3:6' is out of range; the model has blocks 0:5."),
    ],
)
def test_peers_and_blocks_to_keep_to_that_are_none(llama: Path, option: dict[str, Any], said: str) -> None:
    with pytest.raises(BadUsage, match=said):
        AutoDistributedModelForCausalLM.from_pretrained(str(llama), initial_peers=["x"], **option)


def test_a_class_of_another_family(served: Swarm, llama: Path) -> None:
    with pytest.raises(BadUsage, match=r"is a llama model, and BloomForCausalLM runs bloom models; use the class of"):
        client.DistributedBloomForCausalLM.from_pretrained(str(llama), initial_peers=served.initial_peers)


CHANGES: dict[str, Any] = {
    "rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 10000.0},
    "rms_norm_eps": 0.1,
    "hidden_act": "gelu",
    "attention_dropout": 0.5,
    "num_attention_heads": 2,
    "num_hidden_layers": 6,
}


@pytest.mark.parametrize("name", CHANGES)
def test_an_option_that_peers_would_not_know_of(name: str, served: Swarm, llama: Path) -> None:
    with pytest.raises(BadUsage, match=f"'{name}' changes the blocks, which the peers run as .* says; serve a"):
        served.connect(llama, **{name: CHANGES[name]})


def test_an_option_that_says_what_the_checkpoint_says(served: Swarm, llama: Path) -> None:
    said = transformers.AutoConfig.from_pretrained(llama)
    served.connect(llama, **{name: getattr(said, name) for name in CHANGES})


def test_the_first_blocks_of_a_model(served: Swarm, llama: Path, models: Callable[[str], Path]) -> None:
    """Peers need not know that there is no more to come, nor what concerns this machine only."""
    fewer = {"num_hidden_layers": 3, "pad_token_id": 5, "use_cache": False}
    local = transformers.AutoModelForCausalLM.from_pretrained(llama, **fewer)
    with torch.no_grad():
        ours = served.connect(llama, **fewer)(input_ids=IDS)
        assert torch.equal(ours.logits, local(input_ids=IDS).logits)
    assert ours.past_key_values is None
    assert served.connect(models("bloom"), n_layer=3).config.num_hidden_layers == 3


@pytest.mark.parametrize(
    ("family", "option"),
    [("llama", "output_hidden_states"), ("bloom", "output_hidden_states"), ("mixtral", "output_router_logits")],
)
def test_outputs_that_a_configuration_asks_for(
    family: str, option: str, served: Swarm, models: Callable[[str], Path], tmp_path: Path
) -> None:
    """When the model is made, from a folder and by an option, and when it is called."""
    said = f"^{option} does not work through a swarm: .*; pass {option}=False, or set it so in model.config\\.$"
    folder = shutil.copytree(models(family), tmp_path / family)
    with pytest.raises(BadUsage, match=said):
        served.connect(folder, **{option: True})
    edit(CONFIG, **{option: True})(folder)
    with pytest.raises(BadUsage, match=said):
        served.connect(folder)
    model = served.connect(folder, **{option: False})
    setattr(model.config, option, True)
    with pytest.raises(BadUsage, match=said):
        model(input_ids=IDS)


def test_an_output_that_is_no_longer_asked_for(served: Swarm, llama: Path) -> None:
    with pytest.raises(BadUsage, match="output_attentions"):
        served.connect(llama, output_attentions=True)
    model = served.connect(llama, num_hidden_layers=3)
    model.config.output_hidden_states = True
    with pytest.raises(BadUsage, match="output_hidden_states"):
        model(input_ids=IDS)
    model.config.output_hidden_states = False
    assert model.generate(IDS, max_new_tokens=2, eos_token_id=None).shape == (1, 10)


SCRIPT: dict[str, Any] = {
    "device_map": "auto",
    "low_cpu_mem_usage": True,
    "trust_remote_code": True,
    "attn_implementation": "flash_attention_2",
    "token": False,
    "local_files_only": True,
    "use_safetensors": True,
    "max_memory": {0: "20GiB"},
    "torch_dtype": "bfloat16",
}


def test_arguments_of_every_second_script(
    served: Swarm, llama: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """What has no effect is said once."""
    options._say.cache_clear()
    for _ in range(2):
        model = served.connect(llama, cache_dir=tmp_path, **SCRIPT)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert model(input_ids=IDS).logits.shape == (1, 8, 128)
    said = [record.getMessage() for record in caplog.records if record.name == "client.model.options"]
    names = ["attn_implementation", "max_memory", "trust_remote_code"]
    assert [message.partition(" ")[0] for message in said] == names
    assert all(" has no effect through a swarm: " in message for message in said)


@pytest.mark.parametrize(
    "place", ["auto", "balanced", "cpu", torch.device("cpu"), {"": "cpu"}, {"a": "cpu", "b": "cpu"}]
)
def test_a_place_for_what_this_machine_holds(place: Any) -> None:
    for name in ("device", "device_map"):
        hub, found = options.take_loading_options({name: place})
        found_here = place in ("auto", "balanced")
        assert found == options.Place(choose_device("auto" if found_here else "cpu"), is_asked_for=not found_here)
        assert hub == Hub()
    assert options.take_loading_options({})[1] is None


def test_where_files_come_from(served: Swarm, llama: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    asked = []

    def download(model: str, name: str, **arguments: Any) -> str:
        asked.append(arguments)
        if not (llama / name).exists():
            raise FileNotFoundError(name)
        return str(llama / name)

    monkeypatch.setattr(checkpoint, "hf_hub_download", download)
    served.connect("me/mine", revision="v1", token="secret", cache_dir=tmp_path, local_files_only=True)
    files = {"revision": "v1", "token": "secret", "cache_dir": tmp_path, "local_files_only": True}
    assert all(arguments == files for arguments in asked)
    assert len(asked) > 3


@pytest.mark.parametrize(
    ("option", "said"),
    [
        (
            {"device_map": {"model": 0, "lm_head": "cpu"}},
            'What this machine holds goes to one device; give device="auto"',
        ),
        ({"device_map": "disk"}, "The device 'disk' cannot be used: "),
        ({"device": -1}, "The device '-1' cannot be used: "),
        ({"device": "cpu", "device_map": "auto"}, "device and device_map say the same here; give one of them"),
        ({"use_safetensors": False}, "Weights are read in the safetensors format only"),
        ({"load_in_4bit": True}, "load_in_4bit: the blocks are as their peers quantize them"),
        (
            {"quantization_config": transformers.BitsAndBytesConfig(load_in_8bit=True)},
            "quantization_config: the blocks",
        ),
    ],
)
def test_arguments_that_would_mislead(option: dict[str, Any], said: str, served: Swarm, llama: Path) -> None:
    with pytest.raises(BadUsage, match=said) as caught:
        served.connect(llama, **option)
    assert str(caught.value).endswith(".")
