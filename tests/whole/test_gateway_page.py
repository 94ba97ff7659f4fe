"""Every command of docs/gateway.md, against a real swarm."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from string import Template
from typing import Any

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.tools.arena import with_adapter
from tests.tools.gateway import RunningGateway
from tests.tools.swarm import ForkServer, Swarm

ROOT = Path(__file__).parents[2]


@pytest.mark.skipif(not shutil.which("curl") or not shutil.which("openssl"), reason="needs curl and openssl")
def test_every_command_of_the_page(
    llama: Path, llama_swarm: tuple[Path, Swarm], fork_server: ForkServer, tmp_path: Path
) -> None:
    model = shutil.copytree(llama, tmp_path / "llama")
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.chat_template = "{% for message in messages %}{{ message.content }} {% endfor %}"
    tokenizer.save_pretrained(model)
    with_adapter(AutoModelForCausalLM.from_pretrained(model)).save_pretrained(tmp_path / "adapters" / "first")
    given = {"MODEL": str(model), "ADDRESS": llama_swarm[1].peers[0].address, "ADAPTERS": str(tmp_path / "adapters")}
    page = (ROOT / "docs" / "gateway.md").read_text()
    blocks = re.findall(r"```(bash|python)\n(.*?)```", page, re.S)
    assert len(blocks) == 6
    printed: list[str] = []
    gateways: list[RunningGateway] = []

    def run(command: list[str]) -> None:
        environment = os.environ | given | {"OPENAI_API_KEY": "none"}
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        printed.append(done.stdout)

    for language, block in blocks:
        if language == "python":
            run([sys.executable, "-c", block])
            continue
        before, is_gateway, options = block.partition("peer gateway ")
        run(["bash", "-ec", before])
        if is_gateway:
            for gateway in gateways:
                gateway.stop()
            argv = ["gateway", *shlex.split(Template(options).substitute(given)), "--port", "0"]
            out, err = tmp_path / "out", tmp_path / "err"
            out.unlink(missing_ok=True)
            gateways = [RunningGateway(fork_server.start(argv, out, err, cwd=tmp_path), out, err)]
            gateways[0].wait_ready()
            given |= {"URL": gateways[0].url, "OPENAI_BASE_URL": f"{gateways[0].url}/v1"}
    gateways[0].stop()
    models, *rest = printed[1].split("data: ", 1)
    assert '"id":"my-model"' in models
    assert rest[0].endswith("data: [DONE]\n\n")
    assert printed[2].strip()
    tuned: dict[str, Any] = json.loads(printed[4].partition("Success")[0])
    assert tuned["model"] == "tuned"
    assert "'late' removed" in printed[4]
