"""Three machines that share nothing but a network, and the three commands that a new user types on them."""

import re
import shutil
import time
from pathlib import Path

from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.tools.machines import machines
from tests.tools.namespaces import Networks
from tests.tools.swarm import ForkServer, Peer

PROMPT = "w1 w2 w3"
LORA_STEP = """
import sys
import torch
from peft import LoraConfig, get_peft_model
torch.set_num_threads(1)
if sys.argv[1:]:
    from transformers import AutoModelForCausalLM
    model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
else:
    from client import AutoDistributedModelForCausalLM
    model = AutoDistributedModelForCausalLM.from_pretrained("our-model")
torch.manual_seed(0)
model = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False))
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
tokens = torch.arange(1, 13).reshape(2, 6)
for _ in range(2):
    loss = model(input_ids=tokens, labels=tokens).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    print(loss.item().hex())
"""


def read_offer(serving: Peer) -> list[str]:
    """The command for other machines that `peer serve` shows when it is ready."""
    deadline = time.monotonic() + 10
    while (offer := re.search(r"^ +peer (join \S+)$", serving.stderr.read_text(), re.M)) is None:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    return offer[1].split()


def test_three_commands(networks: Networks, fork_server: ForkServer, llama: Path, tmp_path: Path):
    lan = networks.lan()
    hosts = [networks.host(name, lan) for name in ("one", "two", "laptop")]
    (tmp_path / "step.py").write_text(LORA_STEP)
    with machines(fork_server, tmp_path, *hosts) as (one, two, laptop):
        shutil.copytree(llama, one.folder / "our-model")
        one.run("swarm", "create", "lab")
        serving = one.start("serve", "./our-model")
        serving.wait_ready()
        join = read_offer(serving)

        assert two.run(*join) == "joined swarm=lab role=serve\n"
        two.start("serve").wait_ready()

        laptop.run(*join)
        said = laptop.run("generate", "our-model", PROMPT, "--max-new-tokens", "8")
        model, tokenizer = AutoModelForCausalLM.from_pretrained(llama), AutoTokenizer.from_pretrained(llama)
        tokens = model.generate(**tokenizer(PROMPT, return_tensors="pt"), max_new_tokens=8, do_sample=False)
        assert said.strip() == tokenizer.decode(tokens[0, 3:], skip_special_tokens=True).strip()
        losses = laptop.run(script=tmp_path / "step.py")
        assert losses == laptop.run(str(llama), script=tmp_path / "step.py")

        # From then on, after any restart and in any order, there is nothing to type or paste.
        for machine in (one, two, laptop):
            machine.turn_off()
        two.start("serve").wait_ready()
        assert laptop.run("generate", "our-model", PROMPT, "--max-new-tokens", "8") == said
        again = one.start("serve")
        again.wait_ready()
        assert again.blocks == serving.blocks
        two.turn_off()
        assert laptop.run("generate", "our-model", PROMPT, "--max-new-tokens", "8") == said
