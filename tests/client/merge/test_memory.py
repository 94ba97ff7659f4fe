"""Merging takes the memory of a module, not of the model."""

import textwrap
from pathlib import Path

import peft
import pytest
import torch
import transformers as tf
from safetensors import safe_open
from safetensors.torch import save_file

from client.merge.write import ShardWriter, Spec
from tests.tools.swarm import ForkServer

_MEASURE = """
    import re, sys, threading, time, torch
    from pathlib import Path
    from client.merge.run import merge_adapter
    from transformers import LlamaForCausalLM  # imported on demand: not what is measured

    def anonymous() -> int:
        return int(re.search(r"RssAnon:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024

    torch.set_num_threads(1)
    peak, done = 0, False

    def watch() -> None:
        global peak
        while not done:
            peak = max(peak, anonymous())
            time.sleep(0.002)

    start = anonymous()
    watcher = threading.Thread(target=watch)
    watcher.start()
    merge_adapter(*map(Path, sys.argv[1:]))
    done = True
    watcher.join()
    print(peak - start)
"""


def _llama_of_400_mb(folder: Path) -> tuple[tf.PreTrainedModel, int]:
    """Writes the model tensor by tensor; returns it without weights, and its bytes."""
    config = tf.LlamaConfig(
        hidden_size=1024, intermediate_size=2816, num_hidden_layers=10, num_attention_heads=8, vocab_size=32000
    )
    with torch.device("meta"):
        model = tf.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(folder)
    plan = [Spec(name, tuple(tensor.shape), torch.bfloat16) for name, tensor in model.state_dict().items()]
    with ShardWriter(folder, plan, 2**27) as writer:
        for spec in plan:
            writer.write(spec.name, torch.full(spec.shape, 0.01, dtype=torch.bfloat16))
        writer.finish()
    return model, writer.nbytes


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads Linux's /proc")
def test_memory(fork_server: ForkServer, tmp_path: Path) -> None:
    """A LoRA of every linear module of a 400 MB model is merged in a third of that."""
    model, nbytes = _llama_of_400_mb(tmp_path / "base")
    assert nbytes > 380e6
    with torch.device("meta"):
        adapted = peft.get_peft_model(model, peft.LoraConfig(r=8, target_modules="all-linear", task_type="CAUSAL_LM"))
        factors = peft.get_peft_model_state_dict(adapted, save_embedding_layers=False)
    adapted.peft_config["default"].save_pretrained(tmp_path / "adapter")
    file = tmp_path / "adapter/adapter_model.safetensors"
    save_file({key: torch.full(tensor.shape, 0.1) for key, tensor in factors.items()}, file)
    (tmp_path / "measure.py").write_text(textwrap.dedent(_MEASURE))
    arguments = [str(tmp_path / name) for name in ("adapter", "base", "out")]
    assert int(fork_server.run(*arguments, script=tmp_path / "measure.py", cwd=tmp_path).split()[-1]) < nbytes / 3
    for file in (tmp_path / "out").glob("*.safetensors"):
        with safe_open(file, "pt") as opened:
            for key in opened.keys():  # noqa: SIM118
                merged = torch.tensor(0.01 + (0.08 if "_proj" in key else 0.0), dtype=torch.bfloat16)
                assert torch.equal(opened.get_tensor(key).view(-1)[[0, -1]], merged.expand(2)), key
