"""Building a client's model: the Hugging Face class itself, ghosts in place of its blocks."""

from typing import Any, NoReturn, cast

import torch
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from client.adapters.source import AdapterSource
from client.generation.dynamic_rope import DynamicRope
from client.ghosts.blocks import GhostBlocks, make_ghosts, matrix_names
from client.ghosts.factors import FactorCache
from client.ghosts.norms import NormCache
from client.ghosts.questions import WeightReader
from client.model.handle import SwarmHandle
from client.model.parallel import leave_out_ghosts
from client.model.petals import add_sessions
from client.model.pseudo_layer import PseudoLayer
from client.model.remote_blocks import RemoteBlocks
from client.model.saving import freeze, hide_ghosts
from client.requests.caller import Caller
from client.swarm.swarm import Swarm
from protocol.errors import BadUsage, UnsupportedModel
from protocol.model.anatomy import BlockList, find_blocks, find_form, has_other_parts, hidden_size
from protocol.model.checkpoint import Checkpoint
from protocol.model.loading import LOADING, load_part
from protocol.model.split_linear import split_linears
from protocol.model.tensor_names import blocks_of

_REMOTE = "remote"
ALL_ATTENTION_FUNCTIONS.register(_REMOTE, lambda *args, **kwargs: None)
ALL_MASK_ATTENTION_FUNCTIONS.register(
    _REMOTE, lambda *args, **kwargs: torch.zeros(1, 1, 1, 1, dtype=torch.bool, device=kwargs.get("device"))
)


def build_model(
    cls: type[PreTrainedModel], checkpoint: Checkpoint, config: PreTrainedConfig, swarm: Swarm, dtype: torch.dtype
) -> PreTrainedModel:
    """A `cls` that holds what lies outside of the blocks and runs the blocks on `swarm`.

    Raises `UnsupportedModel` for an architecture without like blocks, or for missing weights.
    """
    with LOADING, torch.device("meta"):
        donor = cls._from_config(config, dtype=dtype)
    where = find_blocks(donor)

    def cut(model: PreTrainedModel) -> None:
        setattr(where.trunk_of(model), where.attribute, torch.nn.ModuleList())

    blocks = blocks_of(checkpoint.weight_map, donor, where)
    outside = checkpoint.state_dict(lambda name: name not in blocks)
    model, missing = load_part(cls, config, outside, cut, dtype=dtype)
    _check_missing(model, missing, where, checkpoint)
    names = matrix_names(where.of(donor))
    reader = WeightReader(NormCache(swarm, names).norm, FactorCache(swarm, names))
    ghosts = make_ghosts(where.of(donor), reader)
    setattr(where.trunk_of(model), where.attribute, ghosts)
    hide_ghosts(ghosts)
    leave_out_ghosts()
    _attach(model, where, ghosts, swarm)
    if (head := model.get_output_embeddings()) is not None:
        split_linears(head)
    freeze(model)
    model.eval()
    return model


def _check_missing(model: PreTrainedModel, missing: list[str], where: BlockList, checkpoint: Checkpoint) -> None:
    """Heads of a task may be new; the trunk and a language model's head must not be."""
    head = model.get_output_embeddings()
    needed = [where.trunk, *(name for name, module in model.named_modules() if module is head)]
    lost = [name for name in missing if any(part and name.startswith(f"{part}.") for part in needed)]
    if lost:
        advice = "; use the class of the whole model, as AutoDistributedModelForCausalLM does"
        raise UnsupportedModel(
            f"{checkpoint.name} lacks weights that {type(model).__name__} needs, such as {lost[0]}"
            f"{advice if has_other_parts(checkpoint.config) and not has_other_parts(model.config) else ''}."
        )


def _attach(model: PreTrainedModel, where: BlockList, ghosts: GhostBlocks, swarm: Swarm) -> None:
    trunk = where.trunk_of(model)
    rope = DynamicRope.of(cast(PreTrainedConfig, trunk.config))
    remote = RemoteBlocks(Caller(swarm), AdapterSource(model, ghosts), ghosts, rope)
    layer = PseudoLayer(remote, ghosts)
    ghosts.attach(layer)
    model.config._attn_implementation = _REMOTE  # no masks are built here: the peers build them
    trunk.register_forward_pre_hook(layer.capture, with_kwargs=True)
    if has_other_parts(model.config):
        for module, _ in where.around(model):
            module.register_forward_pre_hook(layer.capture_around, with_kwargs=True)
    _probe(model, trunk, layer)
    object.__setattr__(model, "swarm", SwarmHandle(swarm, layer, remote))
    object.__setattr__(model, "init_continuous_batching", _refuse_continuous_batching)
    for owner, name, module in ((model, "transformer", trunk), (trunk, "h", ghosts)):  # as Petals calls them
        if not hasattr(owner, name):
            object.__setattr__(owner, name, module)  # not a submodule
    if model.can_generate():
        add_sessions(model)


def _refuse_continuous_batching(*_: Any, **__: Any) -> NoReturn:
    """Where all of Transformers' ways to continuous batching begin."""
    raise BadUsage(
        "generate_batch (Transformers' continuous batching) needs the keys and values on this machine, and they are on "
        "the peers; use generate, which takes prompts padded at the left."
    )


@torch.no_grad()
def _probe(model: PreTrainedModel, trunk: torch.nn.Module, layer: PseudoLayer) -> None:
    """Find out whether this trunk expects tensors or tuples of its blocks."""
    width = int(cast(torch.nn.Embedding, model.get_input_embeddings()).weight.shape[1])
    inputs: dict[str, Any] = {
        "inputs_embeds": torch.zeros(2, 3, width, dtype=model.dtype),
        "attention_mask": torch.ones(2, 3, dtype=torch.long),
        "use_cache": False,
    }
    widths = (width, hidden_size(model.config))
    if not find_form(
        layer, lambda: trunk(**inputs)[0], lambda out: out.shape[:2] == (2, 3) and out.shape[-1] in widths
    ):
        raise UnsupportedModel(f"{type(trunk).__name__} does not run over remote blocks; it cannot be used in a swarm.")
    layer.probing = False
