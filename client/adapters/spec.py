"""One of PEFT's adapters, described for the wire; what a swarm cannot do is refused here."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from client.adapters.dropout import adapter_dropout
from client.adapters.peft_layers import is_on_parameter, target_of
from protocol.adapters import METHODS, PATTERNS, AdapterSpec
from protocol.errors import BadAdapter

if TYPE_CHECKING:  # it takes seconds to import
    from peft import PeftConfig
    from peft.tuners.tuners_utils import BaseTunerLayer

_ALPHA = {"LORA": "lora_alpha", "ADALORA": "lora_alpha"}
"""Method -> the attribute of its layers that holds alpha, where it is not `alpha`."""
_REFUSED: dict[str, Any] = {
    "bias": "none", "layer_replication": None, "use_qalora": False,
    "alora_invocation_tokens": None, "velora_config": None, "monteclora_config": None, "arrow_config": None,
    "kasa_config": None, "use_bdlora": None, "megatron_config": None, "use_effective_conv2d": False,
}  # fmt: skip
"""Options that change a model in ways that do not travel, and the values at which they do not."""


def spec_of(
    name: str, alias: str, config: "PeftConfig", layers: "Mapping[str, BaseTunerLayer]", training: bool
) -> AdapterSpec:
    """The adapter `name`, which is active on `layers` (by path), called `alias` on the wire.

    `training`: leave out dropout that is not live. Raises `BadAdapter` for a method, an option or dropout that does not
    work through a swarm.
    """
    targets = {target_of(path, layer): layer for path, layer in layers.items()}
    method = config.peft_type.value if hasattr(config.peft_type, "value") else str(config.peft_type)
    if method not in METHODS:
        raise BadAdapter(f"PEFT method {method} does not work through a swarm; expected one of {', '.join(METHODS)}.")
    values = config.to_dict()
    _refuse_options(method, values)
    options = {key: _plain(values[key]) for key in METHODS[method] if key in values}
    options |= _dropout(name, targets, training)
    attributes = ("r", _ALPHA.get(method, "alpha"), "fourierft_n_frequency")
    for pattern, attribute in zip(PATTERNS, attributes, strict=True):
        if options.get(pattern):
            options[pattern] = _resolve(name, targets, attribute)
    if method == "LORA" and {*(ranks := _ranks(name, targets)).values()} != {options["r"]}:
        options["rank_pattern"] = ranks
    if "feedforward_modules" in options:
        options["feedforward_modules"] = sorted(t for t, layer in targets.items() if layer.is_feedforward)
    parameters = tuple(target for target, layer in targets.items() if is_on_parameter(layer))
    modules = tuple(target for target in targets if target not in parameters)
    return AdapterSpec(name=alias, method=method, options=options, targets=modules, parameters=parameters)


def _refuse_options(method: str, values: Mapping[str, Any]) -> None:
    for option, harmless in _REFUSED.items():
        if values.get(option) and values[option] != harmless:
            raise BadAdapter(f"{option}={values[option]!r} of {method} does not work through a swarm; leave it out.")


def _dropout(adapter: str, targets: "Mapping[str, BaseTunerLayer]", training: bool) -> dict[str, float]:
    """Option -> rate, as the modules have it: TRL switches them off while the configuration stays as it was."""
    found = [
        {option: rate if is_live or not training else 0.0 for option, (rate, is_live) in rates.items()}
        for rates in (adapter_dropout(layer, adapter) for layer in targets.values())
    ]
    if any(rates != found[0] for rates in found):
        raise BadAdapter(f"Adapter {adapter!r} has other dropout on some modules than on others; make it the same.")
    return found[0]


def _resolve(adapter: str, targets: "Mapping[str, BaseTunerLayer]", attribute: str) -> dict[str, Any]:
    """What a pattern option came to for each target: a peer never runs a pattern of a client's."""
    found = {target: getattr(layer, attribute, {}) for target, layer in targets.items()}
    return {target: values[adapter] for target, values in found.items() if adapter in values}


def _ranks(adapter: str, targets: "Mapping[str, BaseTunerLayer]") -> dict[str, int]:
    """Target -> the rank that LoRA has there: hot-swapping and its preparation change it, not the configuration."""
    return {
        target: layer.lora_A[adapter].weight.shape[0] // getattr(layer, "num_experts", 1)
        for target, layer in targets.items()
    }


def _plain(value: Any) -> Any:
    return sorted(value) if isinstance(value, set) else value
