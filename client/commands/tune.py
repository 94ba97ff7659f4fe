"""`peer tune`: a fine-tuning run over a swarm, from its description to its adapter."""

import json
import os
import shlex
import signal
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from bootstrap.options import Discovery, SwarmName, as_path, find_swarm
from client.commands.device import enough_memory
from protocol.errors import BadUsage
from protocol.machine.signals import like_interrupt

if TYPE_CHECKING:
    from client.swarm.routes import Hop
    from client.tune.description.config import TuneConfig
    from client.tune.running.plan import Plan


def tune(
    config: Annotated[str | None, typer.Argument(help="A YAML file that describes the run; see --init.")] = None,
    overrides: Annotated[list[str] | None, typer.Argument(help="Changes to it: trainer.steps=100 ...")] = None,
    swarm: SwarmName = None,
    discovery: Discovery = True,
    device: Annotated[
        str | None, typer.Option(help="For what this machine holds: auto, cpu, cuda:0, ...; default: as CONFIG says.")
    ] = None,
    resume: Annotated[bool, typer.Option(help="Go on from the newest checkpoint of this run.")] = False,
    plan: Annotated[bool, typer.Option(help="Show what the run would do, and stop.")] = False,
    init: Annotated[bool, typer.Option(help="Write a commented example file (to CONFIG, or to the screen).")] = False,
    schema: Annotated[bool, typer.Option(help="Print the JSON schema of the file.")] = False,
) -> None:
    """Fine-tune an adapter through a swarm, as one file describes it."""
    changes = list(overrides or ())
    if config is not None and _is_override(config):  # a run that is described by overrides alone
        changes, config = [config, *changes], None
    path = None if config is None else as_path(config)
    if swarm is not None:
        changes.append(f"swarm={json.dumps(swarm)}")  # YAML takes JSON
    if not discovery:
        changes.append("discovery=false")
    if device is not None:
        changes.append(f"device={json.dumps(device)}")
    if init:
        _write_example(path)
    elif schema:
        from client.tune.description.config import json_schema

        print(json.dumps(json_schema(), indent=2))
    else:
        run_tune(path, changes, resume, plan)


def run_tune(path: Path | None, overrides: Sequence[str], resume: bool, plan_only: bool) -> None:
    """Carry out, or with `plan_only` show, the run that a file and `a.b=c` overrides describe.

    Raises `TuneError` (its subclasses say what) and whatever the swarm raises, each with one sentence for a person.
    """
    from client.auto import AutoDistributedModelForCausalLM
    from client.model.load import local_name
    from client.tokenizer import load_tokenizer, vocabulary_size
    from client.tune.description.config import load_config
    from client.tune.running.dataset import prepare
    from client.tune.running.run import TuneRun, check_output
    from protocol.machine.devices import choose_device
    from protocol.machine.terminal import new_console
    from protocol.model.anatomy import context_length
    from protocol.model.checkpoint import open_checkpoint

    if os.environ.get("WORLD_SIZE", "1") != "1":
        raise BadUsage(
            "`peer tune` trains in one process, and a launcher such as torchrun has started several; run it without "
            "one, or use Trainer in a script of your own (docs/compatibility.md)."
        )
    console = new_console()
    config = load_config(path, overrides)
    find_swarm(config.swarm, config.initial_peers, config.discovery)  # what is wrong with them need not wait
    check_output(config, resume)
    if config.device != "auto":
        choose_device(config.device)  # before the data is read, which may take long
    place = local_name(
        config.model,
        config.revision,
        initial_peers=config.initial_peers,
        swarm=config.swarm,
        discovery=config.discovery,
    )
    tokenizer = load_tokenizer(place, config.revision)
    described = open_checkpoint(place, config.revision).config
    prepared = prepare(config, tokenizer, context_length(described), vocabulary_size(described))
    model = AutoDistributedModelForCausalLM.from_pretrained(
        config.model,
        revision=config.revision,
        initial_peers=config.initial_peers,
        swarm=config.swarm,
        discovery=config.discovery,
        **config.network.model_dump(exclude_unset=True),
        dtype=config.dtype,
        device=config.device,
    )
    again = shlex.join(["peer", "tune", *([str(path)] if path else []), *overrides, "--resume"])
    less = "make trainer.batch_size or data.max_length smaller, or give --device cpu"
    with like_interrupt(signal.SIGTERM), enough_memory(less):  # it saves a checkpoint too
        run = TuneRun(config, model, tokenizer, prepared, resume=resume, resume_command=f"`{again}`")
        plan = run.plan()
        console.print(run.plan(_swarm_rows(model, plan, config)))
        if plan_only:
            return
        result = run.train(console)
    console.print(f"{result}; adapter: {result.adapter}", markup=False)
    console.print(f"before and after: {run.folder.samples}; the losses: {run.folder.plot}", markup=False)


def _swarm_rows(model: Any, plan: "Plan", config: "TuneConfig") -> list[tuple[str, str]]:
    """What the swarm adds to the plan: the route, bytes over this machine's link, expected time."""
    from client.model.handle import swarm_of
    from protocol.model.anatomy import hidden_size

    route = swarm_of(model).route("forward")
    rows, tokens = plan.widest_batch
    accumulation = config.trainer.gradient_accumulation
    hidden = rows * tokens * hidden_size(model.config) * model.dtype.itemsize
    trainable = sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad)
    # Per hop and micro-batch: hidden states out and back, their gradients out and back; adapters' gradients back.
    total = accumulation * (4 * hidden * len(route) + trainable) + trainable
    seconds = accumulation * rows * tokens * sum(_seconds_per_token(hop) for hop in route)
    return [
        ("peers on the route", ", ".join(str(hop) for hop in route)),
        ("over the wire", f"at most {total / 2**20:,.1f} MiB a step"),
        ("expected time", f"about {_duration(seconds * plan.steps)} ({seconds:.1f} s a step, links not counted)"),
    ]


def _seconds_per_token(hop: "Hop") -> float:
    """Forward and backward, which costs about twice a forward when weights are frozen."""
    return 3 * (hop.end - hop.start) / hop.peer.speed.forward


def _duration(seconds: float) -> str:
    return time.strftime("%H:%M:%S", time.gmtime(seconds)) if seconds < 86400 else f"{seconds / 86400:.1f} days"


def _is_override(argument: str) -> bool:
    """Whether it is `a.b=c`: the path of a file may have a `=` in it too."""
    key, equals, _ = argument.partition("=")
    return bool(equals) and "/" not in key and not os.path.isfile(argument)  # Path's raises where a name is too long


def _write_example(path: Path | None) -> None:
    from client.tune.description.example import example_yaml

    if path is None:
        print(example_yaml(), end="")
        return
    try:
        with path.open("x", encoding="utf-8") as file:
            file.write(example_yaml())
    except OSError as error:
        raise BadUsage(f"{path} cannot be written: {error.strerror}.") from error
    print(f"Wrote {path}; change it, then run `peer tune {path}`.")
