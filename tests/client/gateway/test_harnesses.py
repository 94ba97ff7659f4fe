"""Programs of others that speak OpenAI's HTTP, unmodified. They are installed by the extra `clients`."""

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from tests.tools.gateway import Local, RunningGateway

_TASK = {
    "task": "words", "dataset_path": "json", "test_split": "train", "output_type": "multiple_choice",
    "doc_to_text": "{{question}}", "doc_to_choice": ["w20", "w21 w22", "w23"], "doc_to_target": "answer",
    "metric_list": [{"metric": "acc"}],
}  # fmt: skip
_EVALUATE = """
import json, sys
from lm_eval import simple_evaluate
model, arguments, task, out = json.loads(sys.argv[1])
found = simple_evaluate(model, arguments, tasks=[task], bootstrap_iters=0)
told = [[list(map(float, answer)) for answer in sample["filtered_resps"]] for sample in found["samples"]["words"]]
json.dump({"acc": found["results"]["words"]["acc,none"], "answers": told}, open(out, "w"))
"""


@pytest.mark.skipif(find_spec("lm_eval") is None, reason="needs lm_eval: pip install '.[clients]'")
@pytest.mark.parametrize("batch", [1, 3])
def test_lm_eval(gateway: RunningGateway, spoken: Path, tmp_path: Path, batch: int) -> None:
    """A task's log-likelihoods are those of the same task on plain local Transformers."""
    rows = [{"question": " ".join(f"w{n + i}" for i in range(5 + n)), "answer": n % 3} for n in range(6)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    task = _TASK | {"dataset_kwargs": {"data_files": str(tmp_path / "rows.jsonl")}}

    def evaluate(kind: str, **arguments: object) -> dict:  # type: ignore[type-arg]
        out = tmp_path / f"{kind}.json"
        command = [sys.executable, "-c", _EVALUATE, json.dumps([kind, arguments, task, str(out)])]
        environment = os.environ | {"HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1"}
        done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path)
        assert done.returncode == 0, done.stderr[-3000:]
        return json.loads(out.read_text())  # type: ignore[no-any-return]

    url = f"{gateway.url}/v1/completions"
    ours = evaluate("local-completions", base_url=url, model="llama", batch_size=batch, num_concurrent=2)
    local = evaluate("hf", pretrained=str(spoken), device="cpu", dtype="float32")
    assert ours["acc"] == local["acc"]
    for mine, reference in zip(ours["answers"], local["answers"], strict=True):
        assert [likelihood for likelihood, _ in mine] == pytest.approx([value for value, _ in reference], abs=1e-5)
        assert [is_greedy for _, is_greedy in mine] == [is_greedy for _, is_greedy in reference]


@pytest.mark.skipif(find_spec("langchain_openai") is None, reason="needs langchain_openai: pip install '.[clients]'")
def test_langchain(gateway: RunningGateway, local: Local) -> None:
    from langchain_openai import ChatOpenAI

    model = ChatOpenAI(
        model="llama", base_url=f"{gateway.url}/v1", api_key="none", temperature=0, max_tokens=8, max_retries=0
    )
    expected = local.text("w9 w6 w7 w10", 8)
    assert model.invoke("w6 w7").content == expected
    assert "".join(str(piece.content) for piece in model.stream("w6 w7")) == expected
