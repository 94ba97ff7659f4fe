"""A gateway over the small llama of three peers."""

import shutil
from collections.abc import Iterator
from pathlib import Path

import openai
import pytest
import torch

from tests.tools.arena import with_adapter
from tests.tools.gateway import Local, RunningGateway, new_gateway
from tests.tools.swarm import ForkServer, Swarm
from tests.tools.words import save_tokenizer

_TEMPLATE = (
    "{% for message in messages %}w9 {{ message.content }} {% endfor %}"
    "{% if tools %}w11 {% endif %}{% if add_generation_prompt %}w10{% endif %}"
)


@pytest.fixture(scope="session")
def spoken(llama_swarm: tuple[Path, Swarm], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model of `llama_swarm` with a tokenizer and a chat template."""
    folder = shutil.copytree(llama_swarm[0], tmp_path_factory.mktemp("spoken") / "llama")
    tokenizer = save_tokenizer(folder, 128)
    tokenizer.chat_template = _TEMPLATE
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def local(spoken: Path) -> Local:
    return Local(spoken)


@pytest.fixture(scope="session")
def adapters(spoken: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with adapters: `blocks` is on the blocks only, `head` on the LM head as well."""
    import peft
    from transformers import AutoModelForCausalLM

    folder = tmp_path_factory.mktemp("adapters")
    with_adapter(AutoModelForCausalLM.from_pretrained(spoken)).save_pretrained(folder / "blocks")
    torch.manual_seed(8)
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "lm_head"], init_lora_weights=False, task_type="CAUSAL_LM")
    peft.get_peft_model(AutoModelForCausalLM.from_pretrained(spoken), config).save_pretrained(folder / "head")
    return folder


@pytest.fixture(scope="module")
def gateway(
    fork_server: ForkServer,
    llama_swarm: tuple[Path, Swarm],
    spoken: Path,
    adapters: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[RunningGateway]:
    options = ["--adapter", f"tuned={adapters / 'blocks'}", "--adapter-folder", str(adapters)]
    folder = tmp_path_factory.mktemp("gateway")
    with new_gateway(fork_server, llama_swarm[1], spoken, folder, options) as running:
        yield running


@pytest.fixture(scope="module")
def client(gateway: RunningGateway) -> openai.OpenAI:
    return gateway.client()
