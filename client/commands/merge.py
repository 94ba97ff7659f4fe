"""`peer merge`: an adapter merged into its base model, on this machine."""

from pathlib import Path
from typing import Annotated

import typer

from bootstrap.options import as_model, as_path


def merge(
    adapter: Annotated[str, typer.Argument(parser=as_model, help="A PEFT adapter: a folder or hub name.")],
    out: Annotated[Path, typer.Option(parser=as_path, metavar="DIR", help="Where the merged model goes.")],
    base: Annotated[
        str | None,
        typer.Option(
            parser=as_model,
            metavar="MODEL",
            help="A folder or hub name; default: the model that the adapter was trained on.",
        ),
    ] = None,
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16; auto: as the base is stored.")] = "auto",
    revision: Annotated[
        str | None, typer.Option(help="Revision of a hub base; default: the one that the adapter was trained on.")
    ] = None,
) -> None:
    """Merge an adapter into its base model, block by block, in bounded memory."""
    from client.merge.run import merge_adapter
    from client.model.load import named_dtype

    chosen_dtype = None if dtype == "auto" else named_dtype(dtype)
    merge_adapter(adapter, base, out, revision=revision, dtype=chosen_dtype, report=print)
