"""A swarm that has not what it takes."""

import signal
import threading
from pathlib import Path

import httpx2 as httpx

from tests.client.gateway.test_sessions import metric, text
from tests.tools.gateway import Local, new_gateway
from tests.tools.swarm import ForkServer, Swarm


def test_peers_with_little_room(
    fork_server: ForkServer, swarm: Swarm, spoken: Path, local: Local, tmp_path: Path
) -> None:
    """Kept prefixes give way to texts in the making, and those wait for each other; nothing fails."""
    swarm.serve(spoken, "0:5", options=("--cache-tokens", "600"))
    prompts = [list(range(5 + number, 45 + number)) for number in range(12)]
    with (
        new_gateway(fork_server, swarm, spoken, tmp_path, ["--max-running", "4"]) as gateway,
        gateway.client() as client,
    ):
        found: dict[int, str] = {}

        def ask(number: int) -> None:
            found[number] = text(client, prompts[number], 20)

        threads = [threading.Thread(target=ask, args=(number,)) for number in range(len(prompts))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert found == {number: local.text(prompt, 20, eos_token_id=None) for number, prompt in enumerate(prompts)}
        assert metric(gateway, "hivetune_kept_prefix_tokens") > 0


def test_a_swarm_that_is_not_there(fork_server: ForkServer, swarm: Swarm, spoken: Path, tmp_path: Path) -> None:
    """One sentence, and when to ask again."""
    swarm.serve(spoken, "0:2")
    with new_gateway(fork_server, swarm, spoken, tmp_path) as gateway:
        content = {"model": "llama", "prompt": [5], "max_tokens": 1}
        answer = httpx.post(f"{gateway.url}/v1/completions", json=content, timeout=120)
        assert answer.status_code == 503, answer.text
        assert answer.json()["error"]["code"] == "no_route"
        assert "2:5" in answer.json()["error"]["message"]
        assert int(answer.headers["Retry-After"]) > 0
        assert httpx.get(f"{gateway.url}/health").status_code == 200
        gateway.stop(signal.SIGTERM)
