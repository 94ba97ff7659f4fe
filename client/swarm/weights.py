"""A client's model by its name: that of this machine, else the swarm's, else the hub's."""

from concurrent.futures import Future
from pathlib import Path

from client.swarm.loop import LOOP
from client.swarm.membership import Membership
from protocol.model.checkpoint import Checkpoint, Hub, is_here, may_be_on_hub, open_checkpoint
from protocol.weights.cache import Cache
from protocol.weights.fetch import Network
from protocol.weights.obtain import Library, Obtained, Pins


def open_model(model: str, revision: str | None, hub: Hub, joining: Future[Membership]) -> Checkpoint:
    """The checkpoint of a folder, of a model that the swarm gives, or of a hub name.

    What belongs to the client is fetched from the swarm when it is read. Raises `UnsupportedModel`, `BadUsage`,
    `NoWeights`, `PeerUnreachable`.
    """
    folder = Path(model)
    in_cache = Cache().find(folder) is not None
    if not in_cache and (revision is not None or is_here(model, revision, hub) or not may_be_on_hub(model)):
        return open_checkpoint(model, revision, hub)
    obtained = LOOP.run(_obtain(joining.result(), model))
    return open_checkpoint(model, revision, hub) if obtained is None else obtained.open()


async def _obtain(membership: Membership, model: str) -> Obtained | None:
    network = Network(
        lambda: membership.member, lambda: membership.member.peer_id, lambda: membership.member.directory.weights()
    )
    cache = Cache()
    library = Library(network, cache, Pins(membership.swarm.models if membership.swarm is not None else cache.root))
    if (known := await library.reopen(Path(model))) is not None:
        return known
    offer = await library.find(model)
    return await library.obtain(offer) if offer is not None else None
