"""Every command of docs/fine-tuning.md, and the examples, against a real swarm."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
import transformers
from peft import PeftModel

from tests.tools.families import family_config
from tests.tools.swarm import ForkServer, Swarm, new_swarm
from tests.tools.words import save_tokenizer

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def served(
    fork_server: ForkServer, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Callable[[str], tuple[Path, str]]]:
    """Family -> the folder of a model that can read and write, and the address of a swarm that serves it."""
    swarms: list[Swarm] = []
    stack = []

    def serve(family: str) -> tuple[Path, str]:
        folder = tmp_path_factory.mktemp(family)
        torch.manual_seed(0)
        transformers.AutoModelForCausalLM.from_config(family_config(family)).save_pretrained(folder)
        save_tokenizer(folder, 128)
        context = new_swarm(fork_server)
        stack.append(context)
        swarm = context.__enter__()
        swarms.append(swarm)
        swarm.serve(folder, "0:3", "3:5")
        return folder, swarm.peers[0].address

    yield serve
    for context in stack:
        context.__exit__(None, None, None)


def run(argv: list[str], cwd: Path, **environment: str) -> str:
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    done = subprocess.run(
        argv, cwd=cwd, env={**os.environ, "PATH": path, "PYTHONPATH": str(ROOT), **environment},
        capture_output=True, text=True, timeout=240,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_every_command_of_the_tutorial(served: Callable[[str], tuple[Path, str]], tmp_path: Path) -> None:
    model, address = served("llama")
    page = (ROOT / "docs" / "fine-tuning.md").read_text()
    blocks = re.findall(r"```bash\n(.*?)```", page, re.S)
    assert len(blocks) == 5
    output = run(["bash", "-ec", "\n".join(blocks)], tmp_path, MODEL=str(model), ADDRESS=address)
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
    served: Callable[[str], tuple[Path, str]], tmp_path: Path, script: str, family: str, rest: list[str], expected: str
) -> None:
    model, address = served(family)
    output = run([sys.executable, str(ROOT / "examples" / script), str(model), address, *rest], tmp_path)
    assert expected in output
