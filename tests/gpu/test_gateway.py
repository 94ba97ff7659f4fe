"""A gateway's engine whose model is on the GPU."""

import queue
from pathlib import Path

import pytest
import torch

from client.gateway.engine.engine import Engine
from client.gateway.engine.growing import Echoed, Event, Finished, Grown, Wanted
from client.gateway.engine.sampling import Sampling
from client.gateway.engine.served import Shelf
from tests.tools.arena import with_adapter
from tests.tools.swarm import Both
from tests.tools.words import save_tokenizer


def test_same_texts_and_logprobs(llamas: Both, device: torch.device, tmp_path: Path) -> None:
    tokenizer = save_tokenizer(tmp_path, 128)
    with_adapter(llamas.local()).save_pretrained(tmp_path / "tuned")
    engine = Engine(Shelf(llamas.remote().to(device), "llama", str(llamas.path), tokenizer), 1000, 8)
    models = [engine.shelf.base, engine.load("tuned", tmp_path / "tuned").result(60)]
    events = queue.Queue[tuple[int, Event]]()
    prompts = [list(range(5, 9 + 3 * number)) for number in range(4)]
    for number, prompt in enumerate(prompts):
        sampling = Sampling(temperature=0, ignore_eos=True)
        wanted = Wanted(models[number % 2], prompt, 6, sampling, logprobs=1, echo_logprobs=True)
        engine.start([(wanted, lambda event, number=number: events.put((number, event)))])  # type: ignore[misc]
    found: list[list[int]] = [[] for _ in prompts]
    echoed: dict[int, list[float]] = {}
    left = len(prompts)
    while left:
        number, event = events.get(timeout=60)
        if isinstance(event, Grown) and event.token is not None:
            found[number].append(event.token)
        elif isinstance(event, Echoed):
            echoed[number] = [each.logprob for each in event.logprobs if each]
        else:
            assert isinstance(event, Finished), event
            left -= 1
    engine.stop()
    plain = [llamas.local(), with_adapter(llamas.local()).eval()]
    for number, prompt in enumerate(prompts):
        local = plain[number % 2]
        ids = torch.tensor([prompt])
        tokens = local.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            max_new_tokens=6,
            eos_token_id=None,
            pad_token_id=0,
        )
        assert found[number] == tokens[0, len(prompt) :].tolist()
        reference = local(ids).logits[0, :-1].detach().log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0]
        assert echoed[number] == pytest.approx(reference.tolist(), abs=1e-5)
