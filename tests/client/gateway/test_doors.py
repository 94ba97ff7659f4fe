"""Who is let in, how much, and what of it holds up others."""

import http.client
import json
import signal
import socket
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx2 as httpx
import openai
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from tests.client.gateway.test_sessions import metric
from tests.tools.command import Command
from tests.tools.gateway import Local, RunningGateway, new_gateway
from tests.tools.swarm import ForkServer, Swarm

KEYS = ["first-key-0123456789", "second-key-0123456789"]
FOREVER: dict[str, Any] = {"model": "llama", "prompt": [5, 6, 7], "max_tokens": 240, "ignore_eos": True}


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("keys") / "keys"
    file.write_text("# mine\n" + "\n".join(KEYS) + "\n")
    return file


@pytest.fixture(scope="module")
def guarded(
    fork_server: ForkServer,
    llama_swarm: tuple[Path, Swarm],
    spoken: Path,
    keys: Path,
    adapters: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[RunningGateway]:
    options = ["--api-key", str(keys), "--max-body", "20000", "--max-requests-per-key", "2", "--host", "0.0.0.0"]
    options += ["--requests-per-minute", "25", "--adapter-folder", str(adapters)]
    folder = tmp_path_factory.mktemp("guarded")
    with new_gateway(fork_server, llama_swarm[1], spoken, folder, options) as running:
        running.url = running.url.replace("0.0.0.0", "127.0.0.1")
        yield running


def wait_for_rest(gateway: RunningGateway, seconds: float) -> None:
    """Nothing is in the making after so many seconds."""
    deadline = time.monotonic() + seconds
    while metric(gateway, "hivetune_running_texts"):
        assert time.monotonic() < deadline
        time.sleep(0.02)


def raw(gateway: RunningGateway, body: bytes, *headers: str, length: int | None = None) -> socket.socket:
    """A connection on which a request has been sent, as far as `body` goes."""
    host, port = gateway.url.removeprefix("http://").split(":")
    connection = socket.create_connection((host, int(port)), 20)
    lines = ["POST /v1/completions HTTP/1.1", f"Host: {host}", "Content-Type: application/json", *headers]
    lines += [f"Content-Length: {len(body) if length is None else length}", "", ""]
    connection.sendall("\r\n".join(lines).encode() + body)
    return connection


def test_only_known_keys(guarded: RunningGateway, keys: Path) -> None:
    def ask(key: str | None) -> int:
        headers = {} if key is None else {"Authorization": f"Bearer {key}"}
        return httpx.get(f"{guarded.url}/v1/models", headers=headers).status_code

    assert [ask(key) for key in (None, "first", *KEYS)] == [401, 401, 200, 200]
    assert httpx.get(f"{guarded.url}/health").status_code == 200
    keys.write_text(KEYS[0] + "\n")
    assert [ask(key) for key in KEYS] == [200, 401]
    keys.unlink()
    assert [ask(key) for key in KEYS] == [401, 401]
    keys.write_text("\n".join(KEYS) + "\n")
    assert [ask(key) for key in KEYS] == [200, 200]


def test_limits_of_a_key(guarded: RunningGateway) -> None:
    def ask(key: str, **options: Any) -> httpx.Response:
        content = {"model": "llama", "prompt": [5], "max_tokens": 1} | options
        headers = {"Authorization": f"Bearer {key}"}
        return httpx.post(f"{guarded.url}/v1/completions", json=content, headers=headers, timeout=60)

    assert ask(KEYS[0], prompt=[5] * 20_000).status_code == 413
    body = json.dumps(FOREVER | {"stream": True}).encode()
    streams = [raw(guarded, body, f"Authorization: Bearer {KEYS[0]}") for _ in range(2)]
    assert [stream.recv(12) for stream in streams] == [b"HTTP/1.1 200"] * 2
    refused = ask(KEYS[0])
    assert refused.status_code == 429
    assert refused.headers["Retry-After"] == "1"
    assert refused.json()["error"]["type"] == "rate_limit_error"
    assert ask(KEYS[1]).status_code == 200
    for stream in streams:
        stream.close()
    deadline = time.monotonic() + 1
    while ask(KEYS[0]).status_code == 429:
        assert time.monotonic() < deadline
    found = [ask(KEYS[0]) for _ in range(25)][-1]
    assert found.status_code == 429
    assert found.json()["error"]["code"] == "rate_limit_exceeded"
    assert 50 < int(found.headers["Retry-After"]) <= 60
    client = openai.OpenAI(base_url=f"{guarded.url}/v1", api_key=KEYS[0], max_retries=0)
    with client, pytest.raises(openai.RateLimitError):
        client.completions.create(model="llama", prompt="w5")
    assert ask(KEYS[1]).status_code == 200


def test_an_adapter_that_does_not_fit_leaves_nothing(guarded: RunningGateway, adapters: Path, local: Local) -> None:
    bad = adapters / "bad"
    bad.mkdir()
    tensors = load_file(adapters / "blocks" / "adapter_model.safetensors")
    save_file(
        {name: tensor[:, :-1].contiguous() for name, tensor in tensors.items()}, bad / "adapter_model.safetensors"
    )
    (bad / "adapter_config.json").write_text((adapters / "blocks" / "adapter_config.json").read_text())

    def post(path: str, **content: Any) -> httpx.Response:
        return httpx.post(f"{guarded.url}{path}", json=content, headers={"Authorization": f"Bearer {KEYS[1]}"})

    refused = post("/v1/load_lora_adapter", lora_name="bad", lora_path="bad")
    assert refused.status_code == 400
    assert post("/v1/load_lora_adapter", lora_name="good", lora_path="blocks").is_success
    question = {"prompt": [5, 6, 7], "max_tokens": 8, "temperature": 0}
    answers = [post("/v1/completions", model=name, **question).json() for name in ("llama", "good")]
    base, good = (answer["choices"][0]["text"] for answer in answers)
    assert base == local.text([5, 6, 7], 8)
    assert good != base


def test_not_for_others_without_a_key(command: Command, spoken: Path) -> None:
    asked = command("gateway", spoken, "--host", "0.0.0.0", "--initial-peers", "/ip4/127.0.0.1/tcp/1/p2p/Qm")
    assert "--host 0.0.0.0 is reached by others: give --api-key FILE" in asked.refusal()


def test_no_other_site_is_let_in(gateway: RunningGateway) -> None:
    """A page of another site in a browser on this machine."""
    models = f"{gateway.url}/v1/models"
    assert httpx.get(models, headers={"Host": "evil.example"}).status_code == 403
    assert "access-control-allow-origin" not in httpx.get(models, headers={"Origin": "http://evil.example"}).headers
    asked = {"Origin": "http://evil.example", "Access-Control-Request-Method": "POST"}
    preflight = httpx.request("OPTIONS", f"{gateway.url}/v1/completions", headers=asked)
    assert preflight.status_code == 405
    assert not any(name.startswith("access-control") for name in preflight.headers)
    plain = httpx.post(
        f"{gateway.url}/v1/completions", content=json.dumps(FOREVER), headers={"Content-Type": "text/plain"}
    )
    assert plain.status_code == 415


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_goes_away(gateway: RunningGateway, stream: bool) -> None:
    wait_for_rest(gateway, 5)
    connection = raw(gateway, json.dumps(FOREVER | {"stream": stream, "n": 3}).encode())
    while metric(gateway, "hivetune_running_texts") < 3:
        time.sleep(0.01)
    connection.close()
    wait_for_rest(gateway, 1)


def test_slow_readers_and_senders_hold_up_nobody(gateway: RunningGateway, client: openai.OpenAI, local: Local) -> None:
    body = json.dumps(FOREVER | {"stream": True, "logprobs": 20}).encode()
    slow = [raw(gateway, body) for _ in range(3)]
    slow += [raw(gateway, body[:50], length=len(body)) for _ in range(10)]
    answer = client.completions.create(model="llama", prompt=[5, 6, 7], max_tokens=12, temperature=0, timeout=20)
    assert answer.choices[0].text == local.text([5, 6, 7], 12)
    for connection in slow:
        connection.close()
    wait_for_rest(gateway, 2)


def test_what_runs_is_finished(
    fork_server: ForkServer, llama_swarm: tuple[Path, Swarm], spoken: Path, local: Local, tmp_path: Path
) -> None:
    expected = local.text([5, 6, 7], 100, eos_token_id=None)
    with new_gateway(fork_server, llama_swarm[1], spoken, tmp_path) as own, own.client() as client:
        stream = client.completions.create(
            model="llama", prompt=[5, 6, 7], max_tokens=100, temperature=0, stream=True, extra_body={"ignore_eos": True}
        )
        begin = next(stream).choices[0].text
        own.send(signal.SIGTERM)
        assert begin + "".join(piece.choices[0].text for piece in stream) == expected
        own.stop(signal.SIGCONT)
        assert own.stdout.with_suffix(".code").read_text() == "0"


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=4),
    max_leaves=8,
)
FIELDS = st.sampled_from(
    ["prompt", "n", "stop", "stream", "stream_options", "seed", "temperature", "top_p", "top_k", "logit_bias",
     "logprobs", "echo", "response_format", "messages", "tools", "tool_choice", "best_of", "frequency_penalty",
     "max_tokens", "model"]
)  # fmt: skip


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    path=st.sampled_from(["completions", "chat/completions", "load_lora_adapter"]),
    changes=st.dictionaries(FIELDS, JSON, max_size=3),
)
def test_any_json_is_answered(gateway: RunningGateway, path: str, changes: dict[str, Any]) -> None:
    """By a text, or by a refusal in OpenAI's form; never by a failure."""
    content = {
        "model": "llama",
        "prompt": [5],
        "messages": [{"role": "user", "content": "w5"}],
        "max_tokens": 1,
    } | changes
    body = json.dumps(content)
    answer = httpx.post(
        f"{gateway.url}/v1/{path}", content=body, headers={"Content-Type": "application/json"}, timeout=60
    )
    assert answer.status_code in (200, 400, 404), (answer.text, body)
    if answer.status_code != 200:
        error = answer.json()["error"]
        assert error["message"].endswith("."), error
        assert "\n" not in error["message"]


@pytest.mark.parametrize(
    "body",
    [b"", b"{", b"[]", b"null", b"\xff\xfe", b"[" * 100_000, b'{"a":' * 50_000, b'{"model": "\\ud800"}',
     b'{"n": 1e999}',
     b'{"model": "llama", "prompt": "\\ud83d"}', b'{"model": "llama", "prompt": [' + b"9" * 5000 + b"]}"],
)  # fmt: skip
def test_hostile_json(gateway: RunningGateway, body: bytes) -> None:
    with ThreadPoolExecutor(1), raw(gateway, body, "Connection: close") as connection:
        answer = http.client.HTTPResponse(connection)
        answer.begin()
        assert answer.status == 400
        assert json.loads(answer.read())["error"]["message"].endswith(".")
    assert "Traceback" not in gateway.stderr.read_text()
