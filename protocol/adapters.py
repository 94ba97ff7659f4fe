"""Adapters on the wire: which PEFT methods and options may travel, and a bundle's content hash."""

import hashlib
import json
from collections.abc import Sequence
from typing import Annotated, Any, Self

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from protocol.errors import BadAdapter, first_problem
from protocol.tensors import encode

_LYCORIS = ("r", "alpha", "rank_dropout", "module_dropout", "rank_pattern", "alpha_pattern")
_LORA = ("r", "lora_alpha", "lora_dropout", "fan_in_fan_out", "use_rslora", "use_dora", "lora_bias", "rank_pattern",
         "alpha_pattern")  # fmt: skip
METHODS: dict[str, tuple[str, ...]] = {
    "LORA": _LORA,
    "ADALORA": (*_LORA, "target_r", "init_r", "total_step"),
    "IA3": ("feedforward_modules", "fan_in_fan_out"),
    "VERA": ("r", "projection_prng_key", "save_projection", "vera_dropout", "d_initial", "fan_in_fan_out"),
    "LOHA": _LYCORIS,
    "LOKR": (*_LYCORIS, "decompose_both", "decompose_factor", "rank_dropout_scale"),
    "OFT": ("r", "oft_block_size", "module_dropout", "fan_in_fan_out", "coft", "eps", "block_share",
            "use_cayley_neumann", "num_cayley_neumann_terms"),
    "BOFT": ("boft_block_size", "boft_block_num", "boft_n_butterfly_factor", "boft_dropout", "fan_in_fan_out"),
    "FOURIERFT": ("n_frequency", "scaling", "random_loc_seed", "fan_in_fan_out", "n_frequency_pattern"),
    "HRA": ("r", "apply_GS"),
    "RANDLORA": ("r", "projection_prng_key", "save_projection", "sparse", "very_sparse", "randlora_dropout",
                 "fan_in_fan_out", "randlora_alpha"),
}  # fmt: skip
"""PEFT method -> the options that shape its modules or its arithmetic. All other options stay with the client."""

DROPOUTS = ("lora_dropout", "vera_dropout", "boft_dropout", "randlora_dropout", "rank_dropout", "module_dropout")
PATTERNS = ("rank_pattern", "alpha_pattern", "n_frequency_pattern")
MAX_NUMBER = 1 << 20
MAX_RANK = 1 << 12
"""PEFT allocates some methods' tensors, rank x width, before a peer can compare them with those that came."""
_RANKS = ("r", "init_r", "target_r", "rank_pattern")
HASH_BYTES = 16

Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9_.\-]{1,200}$")]


class AdapterSpec(BaseModel):
    """One PEFT adapter, its targets resolved to names: no pattern of a client's ever runs on a peer."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9_\-]{1,100}$")]
    method: str
    options: dict[str, Any]
    targets: tuple[Name, ...] = ()
    """Modules, `BLOCK.PATH`."""
    parameters: tuple[Name, ...] = ()
    """Parameters that LoRA is put on directly, such as the fused experts of a layer: `BLOCK.PATH.PARAMETER`."""

    @model_validator(mode="after")
    def _only_known_options(self) -> Self:
        if self.method not in METHODS:
            raise ValueError(f"PEFT method {self.method!r} is not one of {', '.join(METHODS)}")
        if not (self.targets or self.parameters):
            raise ValueError("an adapter needs a target")
        if self.parameters and self.method != "LORA":
            raise ValueError(f"{self.method} cannot be on parameters, only LORA can")
        names = {*self.targets, *self.parameters}
        for key, value in self.options.items():
            if key not in METHODS[self.method]:
                raise ValueError(f"option {key!r} of {self.method} may not travel to a peer")
            _check_value(key, value)
            if key in PATTERNS and isinstance(value, dict) and (foreign := value.keys() - names):
                # PEFT runs the keys as regular expressions, so they must be names.
                raise ValueError(f"{key} speaks of {min(foreign)!r}, which is no target")
        return self


class Manifest(BaseModel):
    """The description of a bundle: the active adapters, in order, and where their tensors are."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    adapters: tuple[AdapterSpec, ...] = Field(min_length=1, max_length=16)
    scaling: dict[Name, dict[str, float]]
    """Module -> adapter -> factor, as it is now (it may have been rescaled since the adapter was made)."""
    tensors: dict[Name, int]
    """`BLOCK.PATH` of a parameter or buffer -> number of the tensor; several names may share one."""
    trainable: tuple[Name, ...]
    """The parameters whose gradients a backward returns."""

    def to_json(self) -> str:
        """Canonical JSON."""
        return json.dumps(self.model_dump(mode="json"), sort_keys=True, separators=(",", ":"))

    @classmethod
    def from_json(cls, text: str) -> Self:
        """The manifest in `text`. Raises `BadAdapter` for anything that is not one."""
        try:
            return cls.model_validate_json(text)
        except ValidationError as error:
            where, problem = first_problem(error)
            raise BadAdapter(f"Adapter refused: {problem} ({where or 'manifest'}).") from error

    @property
    def has_dropout(self) -> bool:
        """Whether adapters drop something out in training mode."""
        return any(spec.options.get(name) for spec in self.adapters for name in DROPOUTS)

    def config_key(self) -> str:
        """A key of the module tree: bundles with equal keys differ in their tensors only."""
        return json.dumps([spec.model_dump(mode="json") for spec in self.adapters], sort_keys=True)


def bundle_hash(manifest: str, tensors: Sequence[torch.Tensor]) -> bytes:
    """The content hash (BLAKE2b, 16 bytes) of a bundle."""
    digest = hashlib.blake2b(manifest.encode(), digest_size=HASH_BYTES)
    for tensor in tensors:
        entry, data = encode("", tensor)
        digest.update(f"{entry.dtype}{list(entry.shape)}".encode())
        digest.update(data)
    return digest.digest()


def _check_value(key: str, value: Any) -> None:
    """Plain JSON only, and no number that would make a peer allocate much."""
    if key in PATTERNS:
        if not isinstance(value, dict | None):
            raise ValueError(f"option {key!r} has a value of type {type(value).__name__}; expected one per target")
        items = list((value or {}).values())
    else:
        items = value if isinstance(value, list) and key not in _RANKS else [value]
    for item in items:
        _check_item(key, item)


def _check_item(key: str, value: Any) -> None:
    if isinstance(value, dict | list):
        raise ValueError(f"option {key!r} is nested too deeply")
    if key in _RANKS and not isinstance(value, int | None):
        raise ValueError(f"option {key!r} has a value of type {type(value).__name__}; expected an integer")
    limit = MAX_RANK if key in _RANKS else MAX_NUMBER
    if isinstance(value, int | float) and not abs(value) <= limit:
        raise ValueError(f"option {key!r} is {value}; at most {limit}")
