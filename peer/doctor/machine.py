"""Checks of this machine: disk, memory, device."""

import asyncio
import shutil

from peer.doctor.case import Case
from peer.doctor.check import Finding, Findings, ok, warning, wrong
from protocol.errors import BadUsage, SwarmError, UnsupportedModel
from protocol.name import CACHE_VARIABLE, cache_folder

_TIGHT, _FULL = 10e9, 0.5e9
"""Bytes."""


async def disk(case: Case) -> Findings:
    """Room for weights."""
    folder = cache_folder()
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    sentence = f"{free / 1e9:,.1f} GB are free on the disk of {folder}, where fetched weights are kept"
    mend = f"Delete what is not needed, or have another folder used (${CACHE_VARIABLE})."
    if free < _FULL:
        return [wrong(f"{sentence}: that is too little.", mend)]
    return [warning(f"{sentence}: that is little.", mend) if free < _TIGHT else ok(f"{sentence}.")]


async def memory(case: Case) -> Findings:
    """Room for the blocks, where a model was named."""
    return [await asyncio.to_thread(_memory, case)]


async def device(case: Case) -> Findings:
    """The device that would compute, tried out."""
    return [await asyncio.to_thread(_device, case)]


def _memory(case: Case) -> Finding:
    from peer.start.memory import WEIGHTS_SHARE, DeviceMemory

    try:
        where = case.serving.torch_device
    except BadUsage:  # the next check says so
        return ok("It is not looked at, as the device cannot be used.")
    free = DeviceMemory.of(where).within(case.serving.memory_limit)
    sentence = f"{free / 1e9:,.1f} GB of memory are free on {where}"
    if case.model is None:
        return ok(f"{sentence}; name a model (--model) to see whether its blocks fit.")
    from peer.span.loading import block_bytes
    from protocol.model.checkpoint import is_here, open_checkpoint

    if not is_here(case.model):
        return ok(f"{sentence}; {case.model} is not on this machine yet, so the size of its blocks is not known.")
    try:
        checkpoint = open_checkpoint(case.model)
        total = checkpoint.model_id.num_blocks
        blocks = case.serving.span(total)
        block = block_bytes(checkpoint, case.serving.weights_dtype, case.serving.quantize)
    except UnsupportedModel as error:
        return wrong(f"{case.model} is no model that this machine can open: {error}", "Name a folder or a hub model.")
    except SwarmError as error:
        return wrong(str(error), "Correct the option.")
    fit = min(total, int(free * WEIGHTS_SHARE // block))
    count = len(blocks) if blocks is not None else max(1, fit)
    needed = f"{count} of {case.model}'s {total} blocks take {count * block / 1e9:,.1f} GB, beside what users need"
    mend = f"Serve {fit} blocks at most, or quantize them (--quantize nf4)." if fit else "Quantize (--quantize nf4)."
    if count * block > free:
        return wrong(f"{sentence}, and {needed}: they do not fit.", mend)
    return warning(f"{sentence}, and {needed}: little is left for these.", mend) if count > fit else ok(
        f"{sentence}, and {needed}: {fit} blocks fit."
    )  # fmt: skip


def _device(case: Case) -> Finding:
    from protocol.machine.devices import describe, devices

    try:
        chosen = case.serving.torch_device
    except BadUsage as error:
        return wrong(str(error), "Choose another device (--device), or see docs/hardware.md.")
    if chosen.type == "cpu" and case.serving.device == "auto" and (cards := devices()):
        names = ", ".join(map(describe, cards))
        return warning(f"The CPU computes, as none of these works: {names}.", "See docs/hardware.md.")
    return ok(f"{describe(chosen)} computes.")
