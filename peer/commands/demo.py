"""`peer demo`: a swarm on this machine, text from it, an adapter trained through it and loaded in plain PEFT."""

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.rule import Rule

from peer.commands import status
from peer.commands.sample_model import SampleModelError, fetch_sample_model
from protocol.errors import BadUsage, PeerFailed
from protocol.machine.signals import like_interrupt
from protocol.machine.terminal import new_console
from protocol.model.anatomy import context_length
from protocol.model.checkpoint import Checkpoint, open_checkpoint

_QUESTION = "Who are you?"
_ANSWER_TOKENS = 48
_READY = re.compile(r"^ready address=(\S+)")


def run_demo(model: str | None, steps: int, output: Path) -> None:
    """Show everything once. Raises `BadUsage`, `PeerFailed`; leaves no process behind."""
    console = new_console()
    begin = time.monotonic()
    _check_output(output)
    folder = model or str(_fetch(console))
    checkpoint = open_checkpoint(folder)
    if checkpoint.model_id.num_blocks < 3:
        raise BadUsage(f"{folder} has {checkpoint.model_id.num_blocks} blocks; the demo needs 3 for its three peers.")
    _empty(output)
    with _processes() as start:
        _begin_chapter(console, "A swarm: a bootstrap node and three peers")
        addresses = _start_swarm(start, checkpoint, console)
        _use_swarm(folder, checkpoint, addresses, steps, output, console)
    console.print(f"\nDone in {time.monotonic() - begin:.0f} s. The adapter is in {output}/adapter.", markup=False)


def _begin_chapter(console: Console, title: str) -> None:
    console.print(Rule(title, align="left"), width=min(console.width, 80))


def _use_swarm(
    folder: str, checkpoint: Checkpoint, addresses: list[str], steps: int, output: Path, console: Console
) -> None:
    from client import AutoDistributedModelForCausalLM
    from client.model.handle import swarm_of
    from client.tokenizer import load_tokenizer
    from client.tune.data.persona import PERSONA_NAME

    tokenizer = load_tokenizer(folder)
    model = AutoDistributedModelForCausalLM.from_pretrained(folder, initial_peers=addresses)
    peers = {checkpoint.model_id: swarm_of(model).peers()}
    console.print(status.as_table(peers, {checkpoint.model_id: Counter()}, []))
    _begin_chapter(console, "Text through the swarm")
    _ask(model, tokenizer, console)
    _begin_chapter(console, f"A LoRA adapter, trained through the swarm: the persona {PERSONA_NAME}")
    adapter, tuned = _tune(folder, model, tokenizer, steps, output, console)
    _begin_chapter(console, "The same question through the swarm, with the adapter")
    through_swarm = _ask(tuned, tokenizer, console)
    _begin_chapter(console, "The adapter in plain Transformers + PEFT, without the swarm")
    plain = _ask(_load_plain(folder, adapter), tokenizer, console)
    verdict = "word for word the same" if plain == through_swarm else "the same but for the quantized peer's rounding"
    console.print(f"[green]{verdict}[/green]" if PERSONA_NAME in plain else "[red]not the persona's answer[/red]")


def _tune(folder: str, model: Any, tokenizer: Any, steps: int, output: Path, console: Console) -> tuple[Path, Any]:
    from client.tune.description.config import TuneConfig
    from client.tune.errors import Interrupted
    from client.tune.running.dataset import prepare
    from client.tune.running.run import TuneRun

    config = TuneConfig.model_validate(_description(folder, steps, output))
    prepared = prepare(config, tokenizer, context_length(model.config))
    run = TuneRun(config, model, tokenizer, prepared)
    console.print(run.plan())
    try:
        result = run.train(console)
    except Interrupted as error:  # its own text says to resume; the swarm it ran through ends with the demo
        raise Interrupted("stopped while training the adapter; the same command begins the demo anew") from error
    console.print(str(result))
    return result.adapter, run.model


def _description(folder: str, steps: int, output: Path) -> dict[str, Any]:
    from client.tune.data.persona import persona_path

    return {
        "model": folder,
        "data": {"path": str(persona_path())},
        "adapter": {"method": "lora", "r": 8, "lora_alpha": 16, "target_modules": "all-linear"},
        "trainer": {"steps": steps, "batch_size": 4, "learning_rate": 1e-3, "save_every": steps},
        "samples": {"count": 0},
        "output": str(output),
    }


def _ask(model: Any, tokenizer: Any, console: Console) -> str:
    """Ask who the model is, show the answer as it comes, return it."""
    from client.commands.generate import print_text
    from client.tokenizer import encode_prompt

    inputs = encode_prompt(tokenizer, _QUESTION, chat=tokenizer.chat_template is not None)
    console.print(f"[bold]{_QUESTION}[/bold]")
    model.eval()
    begin = time.monotonic()
    tokens = print_text(model, tokenizer, inputs, max_new_tokens=_ANSWER_TOKENS, do_sample=False)
    count = tokens.shape[1] - inputs["input_ids"].shape[1]
    console.print(f"[dim]{count / (time.monotonic() - begin):.1f} tokens/s[/dim]")
    return str(tokenizer.decode(tokens[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))


def _load_plain(folder: str, adapter: Path) -> Any:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    return PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(folder), adapter)


def _fetch(console: Console) -> Path:
    try:
        return fetch_sample_model(report=console.print)
    except SampleModelError as error:
        raise PeerFailed(f"{error} Or name a model that is here: `peer demo --model FOLDER`.") from error


def _check_output(output: Path) -> None:
    """The demo's own folder may be replaced, nobody else's."""
    from client.tune.errors import OutputError
    from client.tune.running.output import RunFolder

    run = RunFolder(output)
    try:
        run.check(resume=True)
    except OutputError as error:
        raise BadUsage(f"--output must be a folder that can be written to: {error}.") from error
    found = {path.name for path in output.iterdir()} if output.exists() else set()
    if not found:
        return
    if not _is_demo(run.record):
        raise BadUsage(f"--output {output} is not empty and not from an earlier demo; name another folder.")
    written = (run.record, run.checkpoints, run.adapter, run.log, run.plot, run.samples)
    if foreign := sorted(found - {path.name for path in written}):
        raise BadUsage(f"--output {output} holds {foreign[0]!r}, which no demo wrote; name another folder.")


def _is_demo(record: Path) -> bool:
    """Whether the run written down here is a demo's. A user's run never is: it names the members of its swarm."""
    from client.tune.description.config import TuneConfig

    try:
        config = json.loads(record.read_text(encoding="utf-8"))["config"]
        description = _description(config["model"], config["trainer"]["steps"], Path(config["output"]))
        return bool(config == TuneConfig.model_validate(description).model_dump(mode="json"))
    except (OSError, ValueError, LookupError, TypeError):
        return False


def _empty(output: Path) -> None:
    """Makes room for this demo's files. Looks again first: fetching a model gives time to put something there."""
    _check_output(output)
    for path in output.iterdir() if output.exists() else ():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()


class _Start:
    """Starts `peer` commands and waits for their ready lines."""

    def __init__(self, logs: Path):
        self._logs = logs
        self.processes: list[subprocess.Popen[str]] = []

    def __call__(self, *argv: str) -> subprocess.Popen[str]:
        log = (self._logs / f"{len(self.processes)}.log").open("w")
        command = [sys.executable, "-m", "peer", *argv, "--host", "127.0.0.1"]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True, start_new_session=True)
        self.processes.append(process)
        return process

    def address_of(self, process: subprocess.Popen[str]) -> str:
        """The address in the ready line. Raises `PeerFailed` when it does not come."""
        assert process.stdout
        match = _READY.match(process.stdout.readline())
        if not match:
            log = (self._logs / f"{self.processes.index(process)}.log").read_text().strip()
            raise PeerFailed(f"A peer did not start: {log.splitlines()[-1] if log else 'it ended without a word'}")
        return match[1]


@contextlib.contextmanager
def _processes() -> Iterator[_Start]:
    """Whatever is started inside is stopped at the end, also when `kill` or a closed terminal is what ends it."""
    with (
        like_interrupt(signal.SIGTERM, signal.SIGHUP),
        tempfile.TemporaryDirectory(prefix="peer-demo-") as logs,
    ):
        start = _Start(Path(logs))
        try:
            yield start
        finally:
            for process in start.processes:
                process.send_signal(signal.SIGTERM)
            for process in start.processes:
                try:
                    process.wait(5)
                except subprocess.TimeoutExpired:
                    process.kill()


def _start_swarm(start: _Start, checkpoint: Checkpoint, console: Console) -> list[str]:
    """A bootstrap node and three peers; the middle one is quantized. Returns the address to join with."""
    address = start.address_of(start("bootstrap", "--swarm", "open"))
    total = checkpoint.model_id.num_blocks
    borders = [total * i // 3 for i in range(4)]
    threads = str(os.cpu_count() or 1)  # the peers take turns
    peers = []
    for number, (name, quantization) in enumerate((("ada", "none"), ("bob", "int8"), ("cleo", "none"))):
        span = f"{borders[number]}:{borders[number + 1]}"
        argv = ["--blocks", span, "--quantize", quantization, "--name", name, "--threads", threads]
        peers.append(start("serve", checkpoint.name, "--initial-peers", address, *argv))
    for process in peers:
        console.print(f"[dim]a peer is ready at {start.address_of(process)}[/dim]")
    return [address]
