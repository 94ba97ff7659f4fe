"""A client whose model is on the GPU: same numbers, and one wait each way. Its peers are on the CPU and on GPUs."""

import collections
import contextlib
import os
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import peft
import pytest
import torch

from tests.tools.device_library import is_loaded
from tests.tools.swarm import Both, ForkServer, new_swarm

LORA = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.default.weight"
GREEDY = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}


@pytest.fixture
def waits(pretended: Any) -> Iterator[collections.Counter[tuple[str, str]]]:
    """Thread and operation -> how often it waited for the GPU."""
    seen = collections.Counter[tuple[str, str]]()
    pretended.on_wait(lambda name: seen.update([(threading.current_thread().name, name)]))
    yield seen
    pretended.on_wait(None)


def batch(device: torch.device | str) -> dict[str, torch.Tensor]:
    """Two rows, the first one padded at the left."""
    ids = torch.randint(3, 100, (2, 8), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    return {"input_ids": ids.to(device), "attention_mask": mask.to(device)}


def with_lora(model: Any) -> Any:
    torch.manual_seed(7)
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
    return peft.get_peft_model(model, config)


def trained(model: Any, device: torch.device | str) -> dict[str, torch.Tensor]:
    """The loss of a step and its gradients, in host memory."""
    inputs = batch(device)
    loss = model(**inputs, labels=inputs["input_ids"]).loss
    loss.backward()
    found = {name: tensor for name, tensor in model.named_parameters() if tensor.requires_grad}
    assert all(tensor.grad.device == tensor.device for tensor in found.values())
    return {"loss": loss.detach().cpu()} | {name: tensor.grad.cpu() for name, tensor in found.items()}


def test_same_tokens(llamas: Both, device: torch.device) -> None:
    ours, theirs = llamas.remote().to(device), llamas.local()
    for beams in (1, 3):
        generated = ours.generate(**batch(device), **GREEDY, num_beams=beams)
        assert torch.equal(generated.cpu(), theirs.generate(**batch("cpu"), **GREEDY, num_beams=beams))


def test_alibi_and_a_mask(fork_server: ForkServer, device: torch.device, models: Callable[[str], Path]) -> None:
    """Falcon computes with the mask itself, before any block is asked."""
    with new_swarm(fork_server) as swarm:
        swarm.serve(models("falcon_alibi"), "0:5", options=("--device", str(device)))
        both = Both(models("falcon_alibi"), swarm)
        ours = both.remote().to(device).generate(**batch(device), **GREEDY)
        assert torch.equal(ours.cpu(), both.local().generate(**batch("cpu"), **GREEDY))


def test_rows_of_a_cache(llamas: Both, device: torch.device) -> None:
    def run(model: Any, where: torch.device | str) -> torch.Tensor:
        with torch.no_grad():
            cache = model(**batch(where)).past_key_values
            cache.batch_repeat_interleave(2)
            cache.batch_select_indices(torch.tensor([0, 2, -1], device=where))
            cache.reorder_cache(torch.tensor([2, 0, 1], device=where))
            return model(torch.full((3, 1), 5, device=where), past_key_values=cache).logits.cpu()

    torch.testing.assert_close(run(llamas.remote().to(device), device), run(llamas.local(), "cpu"))


@contextlib.contextmanager
def behind(device: torch.device) -> Iterator[None]:
    """On a real GPU all within the block is done on a stream of its own, which is seconds behind the program."""
    if is_loaded():
        yield
        return
    with torch.cuda.stream(torch.cuda.Stream(device)):
        torch.cuda._sleep(10**9)
        yield


@pytest.mark.parametrize("adapters_follow", [True, False])
def test_a_training_step(adapters_follow: bool, llamas: Both, device: torch.device) -> None:
    """PEFT puts adapters where the blocks' weights seem to be, which is host memory."""
    model = with_lora(llamas.remote()).to(device) if adapters_follow else with_lora(llamas.remote().to(device))
    assert model.get_parameter(LORA).device == (device if adapters_follow else torch.device("cpu"))
    with behind(device):
        ours = trained(model, device)
    theirs = trained(with_lora(llamas.local()), "cpu")
    assert len(ours) == 21
    torch.testing.assert_close(ours, theirs)


def test_a_trained_prefix(llamas: Both, device: torch.device) -> None:
    def run(model: Any, where: torch.device | str) -> dict[str, torch.Tensor]:
        torch.manual_seed(7)
        config = peft.PrefixTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM")
        return trained(peft.get_peft_model(model, config).to(where), where)

    torch.testing.assert_close(run(llamas.remote(), device), run(llamas.local(), "cpu"))


def test_a_step_waits_once_each_way(
    llamas: Both, device: torch.device, pretended: Any, waits: collections.Counter[tuple[str, str]]
) -> None:
    model, inputs = with_lora(llamas.remote()).to(device), batch(device)
    me = threading.current_thread().name
    for micro_batches in (1, 2):
        model.swarm.config.__dict__["micro_batch_tokens"] = 16 // micro_batches
        waits.clear()
        pretended.reset()
        logits = model(**inputs).logits
        assert waits == {(me, "stream.synchronize"): 1}
        # Hidden states, mask and the 20 tensors of the adapter, each once; back come hidden states.
        copies = {name: count for name, count in pretended.operations().items() if name.startswith("copy to")}
        assert copies == {"copy to the host": 22, "copy to the device": 1}
        waits.clear()
        pretended.reset()
        logits.backward(torch.ones_like(logits))
        assert waits.total() == 2
        assert set(waits.values()) == {1}, "one for the gradient on its way out, on autograd's thread; one back"
        copies = {name: count for name, count in pretended.operations().items() if name.startswith("copy to")}
        assert copies == {"copy to the host": 1, "copy to the device": 20}


def test_a_decode_step_waits_once(
    llamas: Both, device: torch.device, pretended: Any, waits: collections.Counter[tuple[str, str]]
) -> None:
    model = with_lora(llamas.remote()).to(device).eval()
    with torch.no_grad():
        cache = model(**batch(device)).past_key_values
        token = torch.full((2, 1), 5, device=device)
        waits.clear()
        pretended.reset()
        model(token, past_key_values=cache)
    assert waits == {(threading.current_thread().name, "stream.synchronize"): 1}
    copies = {name: count for name, count in pretended.operations().items() if name.startswith("copy to")}
    assert copies == {"copy to the host": 1, "copy to the device": 1}


def test_what_is_kept_is_in_host_memory(llamas: Both, device: torch.device, pretended: Any) -> None:
    """Of a generation the history of each stage, of a training call what went into each hop."""
    model, hidden = llamas.remote().to(device), torch.randn(4, 64, 32).to(device)
    before = pretended.bytes_now()
    with torch.no_grad():
        assert model.model(inputs_embeds=hidden).past_key_values.get_seq_length() == 64
    assert pretended.bytes_now() == before
    output = model.swarm.blocks(hidden.requires_grad_())
    assert pretended.bytes_now() == before + output.nbytes
    output.sum().backward()


def test_ctrl_c_ends_a_backward(llamas: Both, device: torch.device) -> None:
    """Autograd has a thread for the GPU, and signals do not reach it."""
    model, inputs = with_lora(llamas.remote()).to(device), batch(device)
    loss = model(**inputs, labels=inputs["input_ids"]).loss
    stopped = llamas.swarm.peers[0]
    stopped.send(signal.SIGSTOP)
    timer = threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGINT))
    timer.start()
    try:
        with pytest.raises(KeyboardInterrupt):
            loss.backward()
    finally:
        timer.join()
        stopped.send(signal.SIGCONT)
    trained(model, device)
