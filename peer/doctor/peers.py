"""Checks of those that serve: reachable by which carrier, how far away, how fast, and whether all blocks are served."""

import asyncio
import time
from contextlib import suppress

from bootstrap.member import Member
from peer.doctor.case import Case
from peer.doctor.check import Finding, Findings, ok, warning, wrong
from protocol import swarm_pb2 as pb
from protocol.channel import VERSION, Message
from protocol.connections import dial
from protocol.errors import BadRequest, PeerFull, SwarmError, WrongModel
from protocol.machine.paths import model_name
from protocol.records import ModelId, PeerRecord, PeerState, holes
from protocol.stream import Carrier
from protocol.weights.obtain import offers

_PATIENCE = 6.0
_AT_ONCE = 8
_MOST = 64
"""Peers of one model that are tried."""
_BY = {"direct": "directly", "libp2p": "by libp2p"}


async def weights(case: Case) -> Findings:
    """Where the files of the model that was named would come from."""
    if case.model is None:
        return [ok("They are not looked for, as no model was named (--model).")]
    from protocol.model.checkpoint import is_here, may_be_on_hub

    if await asyncio.to_thread(is_here, case.model):
        return [ok(f"{case.model} is on this machine.")]
    member = await case.join()
    offered = offers(await member.directory.weights()) if member is not None and member.others else []
    found = [offer for offer in offered if case.model in (offer.model.name, offer.label)]
    if whole := sum(offer.whole for offer in found):
        return [ok(f"{whole} member(s) give all files of {case.model}.")]
    mend = "Let a machine that has the model give it: `peer share FOLDER`, or `peer serve FOLDER`."
    if found:
        return [warning(f"Members give parts of {case.model}, and none gives all of it.", mend)]
    if may_be_on_hub(case.model) and "/" in case.model:
        return [ok(f"No member gives {case.model}, so it would come from the hub, if that has it.")]
    return [wrong(f"{case.model} is not on this machine, and no member gives it.", mend)]


async def peers(case: Case) -> Findings:
    """Of the model that was named, or of all."""
    member = await case.join()
    if member is None or not member.others:
        return [ok("There is no peer to be tried, as no member answers.")]
    try:
        models = await case.models()
    except SwarmError as error:
        return [wrong(f"The peers could not be looked up: {error}", "See the checks above.")]
    wanted = _only(models, case.model)
    if not wanted:
        served = ", ".join(model.name for model in models) or "none"
        nobody = f"No peer serves {case.model or 'any model'} in this swarm; its models: {served}."
        return [warning(nobody, "Start one: `peer serve MODEL`.")]
    found: list[Finding] = []
    for model, records in wanted.items():
        found += await _of_one(member, model, records)
    return found


def _only(models: dict[ModelId, list[PeerRecord]], wanted: str | None) -> dict[ModelId, list[PeerRecord]]:
    if wanted is None:
        return models
    name = model_name(wanted)
    return {model: records for model, records in models.items() if model.name == name}


async def _of_one(member: Member, model: ModelId, records: list[PeerRecord]) -> list[Finding]:
    turn = asyncio.Semaphore(_AT_ONCE)

    async def one(record: PeerRecord) -> tuple[bool, Finding]:
        async with turn:
            return await _peer(member, record)

    tried = await asyncio.gather(*map(one, records[:_MOST]))
    good = [record for record, (is_good, _) in zip(records, tried, strict=False) if is_good]
    missing = holes([record for record in good if record.state is PeerState.ONLINE], 0, model.num_blocks)
    if not missing:
        last = ok(f"All {model.num_blocks} blocks of {model.name} are served by peers that answer.")
    else:
        spans = ", ".join(f"{hole.start}:{hole.stop}" for hole in missing)
        last = wrong(
            f"Blocks {spans} of {model.name} are served by no peer that answers, so it cannot be used.",
            f"Start a peer for them (`peer serve {model.name} --blocks {missing[0].start}:{missing[0].stop}`), or see "
            "above what is wrong with theirs.",
        )
    return [*(finding for _, finding in tried), last]


async def _peer(member: Member, record: PeerRecord) -> tuple[bool, Finding]:
    """Whether a peer can be used, and what there is to say of it."""
    carriers: list[Carrier] = ["direct", "libp2p"] if record.direct is not None else ["libp2p"]
    trips: dict[Carrier, float] = {}
    problem: SwarmError | None = None
    for carrier in carriers:
        try:
            trips[carrier] = await _greet(member, record, carrier)
        except SwarmError as error:
            problem = error
    who = f"{record.name or record.peer_id}, blocks {record.start}:{record.end}"
    fast = f"computes {record.speed.decode / (record.end - record.start):,.0f} tok/s"
    if isinstance(problem, BadRequest):
        return False, warning(f"{who}: {problem}", "Install the same version on both machines.")
    if not trips:
        mend = "See whether it still runs; if it does, run `peer doctor` on its machine."
        return False, warning(f"{who}, does not answer: {problem}", mend)
    by = ", ".join(f"{trip * 1e3:,.0f} ms {_BY[carrier]}" for carrier, trip in trips.items())
    if record.state is not PeerState.ONLINE:
        return True, warning(f"{who}, is leaving ({by}).")
    if problem is not None:
        failed = ", ".join(_BY[carrier] for carrier in carriers if carrier not in trips)
        mend = "It can be used, more slowly; run `peer doctor` on its machine."
        return True, warning(f"{who}, answers ({by}), but not {failed}: {problem}", mend)
    return True, ok(f"{who}, answers in {by}, {fast}.")


async def _greet(member: Member, record: PeerRecord, carrier: Carrier) -> float:
    """Seconds of a greeting's round trip. Raises `PeerUnreachable`, `NotAMember`, `BadRequest` for another protocol."""
    channel = await dial(member, record.peer_id, _PATIENCE, carrier)
    try:
        begin = time.perf_counter()
        with suppress(WrongModel, PeerFull):  # no weights are named: that is the answer of a peer that is well
            await channel.call(Message(pb.Hello(version=VERSION, config_hash=record.model.config_hash)))
        return time.perf_counter() - begin
    finally:
        channel.close()
