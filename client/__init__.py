"""Using a swarm: Transformers models whose blocks run on remote peers.

The names are imported at first use: `import client` costs nothing. Where it comes before torch, this process's idle
threads leave the cores to peers on the same machine sooner.
"""

from typing import TYPE_CHECKING, Any

from protocol.machine.openmp import spin_briefly

if TYPE_CHECKING:
    from client.auto import (
        AutoDistributedModelForCausalLM,
        AutoDistributedModelForSequenceClassification,
        AutoDistributedModelForTokenClassification,
    )
    from client.swarm.config import SwarmConfig

__all__ = [
    "AutoDistributedModelForCausalLM",
    "AutoDistributedModelForSequenceClassification",
    "AutoDistributedModelForTokenClassification",
    "SwarmConfig",
]


spin_briefly()


def __getattr__(name: str) -> Any:
    if name == "SwarmConfig":
        from client.swarm.config import SwarmConfig

        return SwarmConfig
    if not name.startswith(("AutoDistributed", "Distributed")):
        raise AttributeError(f"module 'client' has no attribute {name!r}")
    from client import auto

    return getattr(auto, name) if name in __all__ else auto.distributed_class(name)
