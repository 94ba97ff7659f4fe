"""The options that commands share."""

import inspect
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import pytest

from bootstrap.options import as_model, as_path
from client.commands.app import app as client_app
from peer.commands.app import app as peer_app
from peer.commands.swarm import app as swarm_app
from protocol.errors import BadUsage
from tests.tools.command import Command

MODELS = {"model", "base", "adapter"}


def parameters() -> Iterator[tuple[str, Any, Any]]:
    """Of all commands: name, type, and what Typer is told."""
    for app in (peer_app, swarm_app, client_app):
        for command in app.registered_commands:
            assert command.callback
            for parameter in inspect.signature(command.callback).parameters.values():
                kind, option = get_args(parameter.annotation)
                yield f"{command.callback.__name__} {parameter.name}", kind, option


def test_every_path_and_model_is_read_in_one_way() -> None:
    found = {name: option.parser for name, kind, option in parameters() if Path in (kind, *get_args(kind))}
    assert len(found) > 7
    assert {name for name, parser in found.items() if parser is not as_path} == set()
    models = {name: option.parser for name, _, option in parameters() if name.split()[1] in MODELS}
    assert len(models) > 8
    # The gateway's are NAME=FOLDER, whose folder the command reads.
    assert {name for name, parser in models.items() if parser is not as_model} == {"gateway adapter"}


def test_a_home_on_the_command_line(command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    assert command("tune", "--init", "~/tune.yaml").code == 0
    assert (tmp_path / "tune.yaml").exists()
    (tmp_path / "serve.yaml").write_text("identity: ~/noid\nhost: 127.0.0.1\nmodel: ~/no-model\n")
    assert f"'{tmp_path}/no-model' has no config.json" in command("serve", "--config=~/serve.yaml").refusal()
    assert not (tmp_path / "~").exists()


def test_what_is_no_path() -> None:
    with pytest.raises(BadUsage, match=r"^https://a//b is a URL; expected a path on this machine.*\.$"):
        as_path("https://a//b")
    with pytest.raises(BadUsage, match=r"^~nobody-here/m is in the home of a user .*\.$"):
        as_model("~nobody-here/m")
