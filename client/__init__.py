"""Using a swarm: Transformers models whose blocks run on remote peers."""

from typing import Any

from client.auto import (
    AutoDistributedModelForCausalLM,
    AutoDistributedModelForSequenceClassification,
    AutoDistributedModelForTokenClassification,
    distributed_class,
)
from client.config import SwarmConfig

__all__ = [
    "AutoDistributedModelForCausalLM",
    "AutoDistributedModelForSequenceClassification",
    "AutoDistributedModelForTokenClassification",
    "SwarmConfig",
]


def __getattr__(name: str) -> Any:
    return distributed_class(name)
