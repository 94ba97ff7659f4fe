"""The model classes that users name. Torch and Transformers are imported when a model is made, not with this module."""

from typing import TYPE_CHECKING, Any

from protocol.errors import BadUsage
from protocol.machine.imports import without_collection

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_CAUSAL_LM = "MODEL_FOR_CAUSAL_LM_MAPPING"
_OTHER_NAMES = {"use_auth_token": "token", "allowed_servers": "allowed_peers", "blocked_servers": "blocked_peers"}
"""Earlier names of Transformers, and Petals' names."""


def _load(cls: "type[PreTrainedModel] | None", mapping: str, model: str, given: dict[str, Any]) -> "PreTrainedModel":
    with without_collection():
        from client.swarm.config import SwarmConfig
        from client.swarm.membership import joining

    options = {_OTHER_NAMES.get(name, name): value for name, value in given.items()}
    if len(options) < len(given):
        name = next(name for name in _OTHER_NAMES if name in given and _OTHER_NAMES[name] in given)
        raise BadUsage(f"{name} is another name of {_OTHER_NAMES[name]}; give one of them.")
    fields = {name: options.pop(name) for name in SwarmConfig.model_fields if name in options}
    network = SwarmConfig.make(options.pop("swarm_config", None), **fields)
    with joining(network) as joined:
        with without_collection():
            from client.model.load import load_distributed

        return load_distributed(cls, mapping, model, network, joined, **options)


class _AutoDistributed:
    """Makes a Transformers model of the right class whose blocks run on a swarm."""

    _mapping: str
    """The name of Transformers' mapping of configurations to classes for the task."""

    def __init__(self) -> None:
        raise BadUsage(f"{type(self).__name__} is not constructed; use {type(self).__name__}.from_pretrained(...).")

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str, **options: Any) -> "PreTrainedModel":
        """A model that holds what lies outside of the blocks and runs the blocks on the peers of a swarm.

        Also of a folder that `save_pretrained` of such a model, or a `Trainer` with it, has written. Nothing requires
        gradients until a PEFT adapter is put on it or `requires_grad` is set for a weight that is on this machine.

        `options`: the fields of `SwarmConfig` (`initial_peers=[...]` above all), or `swarm_config=` whole; `revision`;
        `dtype` of what this machine holds (default: the checkpoint's), and `device` for it: "auto", "cuda:0", ...
        (default: torch's, the CPU); other arguments of Transformers and Petals (docs/compatibility.md), `device_map`
        among them; fields of the model's configuration that no block computes by (`num_labels=3`). Raises `BadUsage`,
        `UnsupportedModel`, `PeerUnreachable`; a call of the model may raise `NoRoute` and other `protocol.errors`.
        """
        return _load(None, cls._mapping, pretrained_model_name_or_path, options)


class AutoDistributedModelForCausalLM(_AutoDistributed):
    """Causal language models."""

    _mapping = _CAUSAL_LM


class AutoDistributedModelForSequenceClassification(_AutoDistributed):
    """Sequence classifiers; the head is on this machine."""

    _mapping = "MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING"


class AutoDistributedModelForTokenClassification(_AutoDistributed):
    """Token classifiers; the head is on this machine."""

    _mapping = "MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING"


def distributed_class(name: str) -> type[_AutoDistributed]:
    """`DistributedBloomForCausalLM` and its like: for any class that Transformers has. Raises `AttributeError`."""
    with without_collection():
        import transformers
        from transformers import PreTrainedModel

    base = getattr(transformers, name.removeprefix("Distributed"), None)
    if not name.startswith("Distributed") or not isinstance(base, type) or not issubclass(base, PreTrainedModel):
        raise AttributeError(f"module 'client' has no attribute {name!r}")

    def from_pretrained(cls: Any, pretrained_model_name_or_path: str, /, **options: Any) -> Any:
        return _load(base, _CAUSAL_LM, pretrained_model_name_or_path, options)

    doc = f"A {base.__name__} whose blocks run on a swarm."
    return type(name, (_AutoDistributed,), {"from_pretrained": classmethod(from_pretrained), "__doc__": doc})
