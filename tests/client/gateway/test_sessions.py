"""What is kept on peers, and peers that die."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx2 as httpx
import openai
import pytest

from tests.tools.gateway import Local, RunningGateway, new_gateway
from tests.tools.swarm import ForkServer, Swarm


def metric(gateway: RunningGateway, name: str) -> float:
    lines = httpx.get(f"{gateway.url}/metrics").text.splitlines()
    return float(next(line for line in lines if line.startswith(f"{name} ")).split()[1])


def text(client: openai.OpenAI, prompt: Any, new: int) -> str:
    answer = client.completions.create(
        model="llama", prompt=prompt, max_tokens=new, temperature=0, extra_body={"ignore_eos": True}
    )
    return answer.choices[0].text


def test_a_conversation_is_read_once(gateway: RunningGateway, client: openai.OpenAI, local: Local) -> None:
    """Every turn goes on from what the one before has left; so does another that begins alike, by less of it."""
    history = list(range(40, 60))
    for turn in range(3):
        before = metric(gateway, "hivetune_reused_prefix_tokens")
        assert text(client, history, 6) == local.text(history, 6, eos_token_id=None)
        kept = metric(gateway, "hivetune_reused_prefix_tokens") - before
        assert kept == (len(history) - 4 if turn else 0)  # all but what is new, and the answer's last token
        history += [*local.tokens(history, 6, eos_token_id=None), 70 + turn, 80, 81]
    other = [*history[:25], 99, 98]
    before = metric(gateway, "hivetune_reused_prefix_tokens")
    assert text(client, other, 6) == local.text(other, 6, eos_token_id=None)
    assert metric(gateway, "hivetune_reused_prefix_tokens") - before == 25
    assert text(client, history[:10], 6) == local.text(history[:10], 6, eos_token_id=None)


def test_adapters_do_not_share_keys(gateway: RunningGateway, client: openai.OpenAI) -> None:
    prompt = list(range(90, 110))
    text(client, prompt, 2)
    before = metric(gateway, "hivetune_reused_prefix_tokens")
    client.completions.create(model="tuned", prompt=prompt, max_tokens=2, temperature=0)
    assert metric(gateway, "hivetune_reused_prefix_tokens") == before


def test_peers_that_die(fork_server: ForkServer, swarm: Swarm, spoken: Path, local: Local, tmp_path: Path) -> None:
    """In the middle of eight streams, and between two turns of a conversation: nobody notices."""
    _, victim = swarm.serve(spoken, "0:2", "2:5")
    new = 60
    prompts = [list(range(5, 8 + count)) for count in range(8)]
    expected = [local.text(prompt, new, eos_token_id=None) for prompt in prompts]
    with new_gateway(fork_server, swarm, spoken, tmp_path) as gateway, gateway.client() as client:
        heirs: list[Any] = []

        def read(number: int) -> str:
            stream = client.completions.create(
                model="llama", prompt=prompts[number], max_tokens=new, temperature=0, stream=True,
                extra_body={"ignore_eos": True},
            )  # fmt: skip
            pieces = []
            for count, piece in enumerate(stream):
                pieces.append(piece.choices[0].text)
                if number == 0 and count == 20:
                    heirs.extend(swarm.serve(spoken, "2:5"))
                    victim.kill()
            return "".join(pieces)

        with ThreadPoolExecutor(8) as pool:
            assert list(pool.map(read, range(8))) == expected
        swarm.serve(spoken, "2:5")
        heirs[0].kill()
        turn = [*prompts[0], *local.tokens(prompts[0], new, eos_token_id=None), 9]
        assert text(client, turn, 8) == local.text(turn, 8, eos_token_id=None)
        assert metric(gateway, "hivetune_reused_prefix_tokens") > len(prompts[0])


@pytest.mark.parametrize("family", ["bloom", "opt", "gemma2"])
def test_other_families(fork_server: ForkServer, swarm: Swarm, models: Any, family: str, tmp_path: Path) -> None:
    """Those whose positions or scales are outside of the blocks, and sliding windows, past which a prefix is cut."""
    from shutil import copytree

    from tests.tools.words import save_tokenizer

    path = copytree(models(family), tmp_path / "model" / "llama")
    save_tokenizer(path, 128)
    swarm.serve(path, "0:5")
    local = Local(path)
    prompt = list(range(30, 55))
    with new_gateway(fork_server, swarm, path, tmp_path) as gateway, gateway.client() as client:
        with ThreadPoolExecutor(3) as pool:
            prompts = [prompt, prompt[:3], prompt[3:]]
            found = list(pool.map(lambda each: text(client, each, 12), prompts))
        assert found == [local.text(each, 12, eos_token_id=None) for each in prompts]
        turn = [*prompt[:20], 9, 8]
        assert text(client, turn, 12) == local.text(turn, 12, eos_token_id=None)
        assert metric(gateway, "hivetune_reused_prefix_tokens") > 19
        assert "Error" not in gateway.stderr.read_text()
