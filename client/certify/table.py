"""A codec certificate as a table."""

from rich import box
from rich.console import Group
from rich.table import Table
from rich.text import Text

from client.certify.certificate import MAX_KL, MAX_LOSS, MIN_TOP1, Certificate, Effect


def as_table(certificate: Certificate) -> Group:
    """One line per codec, the model as it is on top."""
    extent = certificate.extent
    table = Table(
        box=box.SIMPLE,
        caption=f"{extent.tokens} tokens of text, {extent.steps} steps of LoRA; bytes per value. Safe: KL at most "
        f"{MAX_KL:g} nats per token, top-1 at least {MIN_TOP1:.0%}, loss within {MAX_LOSS:.1%}.",
    )
    for name in ("codec", "gradients", "bytes", "KL", "top-1", "perplexity", "loss", "safe"):
        is_text = name in ("codec", "gradients", "safe")
        table.add_column(name, justify="left" if is_text else "right", overflow="fold")
    table.add_row("none", "none", "", "", "", f"{certificate.perplexity:.3f}", f"{certificate.loss:.4f}", "")
    for effect in certificate.effects:
        table.add_row(*_cells(effect))
    title = f"{certificate.model} in {certificate.dtype}, {extent.spans} spans"
    return Group(Text(title, style="table.title"), table)


def _cells(effect: Effect) -> tuple[str, ...]:
    return (
        effect.codec, effect.gradients, f"{effect.bytes_per_value:.2f}", f"{effect.kl:.1e}" if effect.kl else "0",
        f"{effect.top1:.1%}", f"{effect.perplexity:.3f}", f"{effect.loss_change:+.2%}",
        "[green]yes[/green]" if effect.is_safe else f"[red]no[/red]: {', '.join(effect.excesses)}",
    )  # fmt: skip
