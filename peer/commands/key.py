"""`peer key ...`: the key file of a private swarm, and its rotation."""

from pathlib import Path
from typing import Annotated

import typer

from bootstrap.options import as_path

app = typer.Typer(no_args_is_help=True, help="The key of a private swarm: make one, rotate it.")

KeyPath = Annotated[Path, typer.Argument(parser=as_path, metavar="FILE", help="The key file.")]
_NEXT = "Bring the file to every member; those that run read it again by themselves."


@app.command()
def create(file: KeyPath) -> None:
    """Write a new key; whoever has this file is a full member of the swarm."""
    from bootstrap.key_file import create_key

    print(f"{file} holds the new key {create_key(file)}. Give it to members only, as --swarm-key {file}.")


@app.command()
def add(file: KeyPath) -> None:
    """Rotation, step 1: add a new key, which members accept and do not use yet."""
    from bootstrap.key_file import add_key

    print(f"{file} has the key {add_key(file)} as well, accepted but not used. {_NEXT} Then: peer key use {file}")


@app.command()
def use(file: KeyPath) -> None:
    """Rotation, step 2, when every member has step 1's file: use the new key, and accept the old."""
    from bootstrap.key_file import use_newest_key

    print(f"{file} uses the key {use_newest_key(file)} and accepts the old. {_NEXT} Then: peer key drop {file}")


@app.command()
def drop(file: KeyPath) -> None:
    """Rotation, step 3, when every member has step 2's file: drop the old key."""
    from bootstrap.key_file import drop_old_keys

    print(f"{file} holds the key {drop_old_keys(file)} alone. {_NEXT} Whoever has only the old key is out.")
