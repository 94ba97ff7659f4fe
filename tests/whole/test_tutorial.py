"""Every command of docs/fine-tuning.md, and the examples, against a real swarm."""

import json
import os
import re
import shlex
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from string import Template

import pytest
import torch
import transformers
from peft import PeftModel

from tests.tools.swarm import ForkServer, Swarm, new_swarm
from tests.tools.words import save_tokenizer

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def served(
    llama: Path,
    llama_swarm: tuple[Path, Swarm],
    models: Callable[[str], Path],
    fork_server: ForkServer,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[dict[str, tuple[Path, str]]]:
    """Family -> the folder of a model that can read and write, and the address of a swarm that serves it."""
    bloom = shutil.copytree(models("bloom"), tmp_path_factory.mktemp("spoken") / "bloom")
    save_tokenizer(bloom, 128)
    with new_swarm(fork_server) as swarm:
        swarm.serve(bloom, "0:3", "3:5")
        yield {"llama": (llama, llama_swarm[1].peers[0].address), "bloom": (bloom, swarm.peers[0].address)}


def test_every_command_of_the_tutorial(
    served: dict[str, tuple[Path, str]], fork_server: ForkServer, tmp_path: Path
) -> None:
    model, address = served["llama"]
    page = (ROOT / "docs" / "fine-tuning.md").read_text()
    blocks = re.findall(r"```bash\n(.*?)```", page, re.S)
    assert len(blocks) == 5
    given, output = {"MODEL": str(model), "ADDRESS": address}, ""
    for command in re.split(r"^(?=peer )", "".join(blocks), flags=re.M):
        if command.startswith("peer "):
            output += fork_server.run(*shlex.split(Template(command).substitute(given))[1:], cwd=tmp_path)
        else:  # writes files
            subprocess.run(["bash", "-ec", command], cwd=tmp_path, env=os.environ | given, check=True)
    assert "peers on the route" in output
    losses = [json.loads(line)["loss"] for line in (tmp_path / "tuned" / "log.jsonl").read_text().splitlines()]
    assert len(losses) == 4
    assert (tmp_path / "tuned" / "loss.png").stat().st_size > 1000
    base = transformers.AutoModelForCausalLM.from_pretrained(model)
    adapted = PeftModel.from_pretrained(base, tmp_path / "tuned" / "adapter").eval()
    merged = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    ids = torch.arange(3, 20)[None]
    with torch.no_grad():
        torch.testing.assert_close(merged(ids).logits, adapted(ids).logits, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("script", "family", "rest", "expected"),
    [
        ("generate.py", "llama", ["w5 w6 w7"], "w"),
        ("petals_style.py", "bloom", [], "gradient norm of the word embeddings: tensor("),
        ("lora_trainer.py", "llama", ["adapter"], "train_loss"),
    ],
)
def test_examples(
    served: dict[str, tuple[Path, str]],
    fork_server: ForkServer,
    tmp_path: Path,
    script: str,
    family: str,
    rest: list[str],
    expected: str,
) -> None:
    model, address = served[family]
    output = fork_server.run(str(model), address, *rest, script=ROOT / "examples" / script, cwd=tmp_path)
    assert expected in output
