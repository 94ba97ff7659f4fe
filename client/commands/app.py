"""The client's commands together."""

import typer

from client.commands.certify import certify
from client.commands.gateway import gateway
from client.commands.generate import generate
from client.commands.merge import merge
from client.commands.tune import tune

app = typer.Typer(add_completion=False)
for command in (generate, gateway, tune, merge, certify):
    app.command()(command)
