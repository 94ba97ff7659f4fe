"""Every family of language models that Transformers has, over a swarm and on one machine: are the numbers the same?

`python -m benchmarks.families` takes those that see or hear as well, `--all` every causal language model too, and names
of model types only these. Each is a small random model with Transformers' own defaults but for its sizes, on two real
peers (blocks 0:2, 2:5). A line each says what came of it:

- exact: the logits of a padded batch, 20 greedy tokens, and the loss and gradients of LoRA on all linear layers of the
  blocks equal those of the plain model, to the last bit;
- differs: they do not, and by how much;
- refused: in these words, by `peer serve` or by the client;
- not tried: the plain model itself cannot be made small, or does not run on text alone.
"""

import argparse
import re
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import transformers as tf
from transformers.models.auto import modeling_auto
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from protocol.errors import SwarmError, first_line
from protocol.model.anatomy import find_blocks, has_other_parts
from tests.tools.families import build_small, whole_class
from tests.tools.parity import differences, local_model, padded_batch
from tests.tools.swarm import ForkServer, new_swarm

_SIZES: dict[str, Any] = {
    "vocab_size": 128, "hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8,
    "intermediate_size": 64, "max_position_embeddings": 256, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
    "sliding_window": 8, "num_experts": 4, "num_local_experts": 4, "n_routed_experts": 4, "moe_num_experts": 4,
    "num_experts_per_tok": 2, "moe_intermediate_size": 16, "shared_expert_intermediate_size": 16, "n_group": 2,
    "topk_group": 1, "first_k_dense_replace": 2, "q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8, "v_head_dim": 8, "linear_num_key_heads": 2, "linear_num_value_heads": 4,
    "linear_key_head_dim": 8, "linear_value_head_dim": 8,
}  # fmt: skip
_SENSES: dict[str, Any] = {
    "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "depth": 2, "num_attention_heads": 2,
    "num_heads": 2, "embed_dim": 16, "out_hidden_size": 32,
}  # fmt: skip


_MOST = 10**8
"""Parameters of a model that is tried."""
_PLAIN = {"global_head_dim": 8, "num_global_key_value_heads": 2, "hidden_size_per_layer_input": 0}
_OWN: dict[str, dict[str, Any]] = {"gemma4_text": _PLAIN, "gemma4_unified_text": _PLAIN}
"""What some language models need besides; this is the larger Gemma 4, without inputs of their own for each layer."""


def small_config(kind: type[tf.PretrainedConfig], is_text: bool = True) -> tf.PretrainedConfig:
    """A configuration of this kind, and of its parts, with small sizes and otherwise Transformers' defaults."""
    whole = kind()
    parts = {
        name: part for name in whole.sub_configs if isinstance(part := getattr(whole, name, None), tf.PretrainedConfig)
    }
    text = whole.get_text_config()
    if parts:
        return kind(**{name: small_config(type(part), part is text).to_dict() for name, part in parts.items()})
    sizes = _SIZES | {"num_hidden_layers": 5} if is_text else _SENSES
    own = {whole.attribute_map.get(name, name): size for name, size in sizes.items()}
    given = {name: size for name, size in own.items() if type(vars(whole).get(name)) is type(size)}
    if "kv_lora_rank" in given:  # of such attention every head has keys of its own
        given["num_key_value_heads"] = given["num_attention_heads"]
    rope = vars(whole).get("rope_parameters") or {}
    if "mrope_section" in {*rope, *getattr(kind, "ignore_keys_at_rope_validation", ())}:
        half = int(4 * rope.get("partial_rotary_factor", 1))
        given["rope_parameters"] = rope | {"rope_type": "default", "mrope_section": [half - 2, 1, 1]}
    return kind(**given | _OWN.get(whole.model_type, {}))


def families(everything: bool) -> Iterator[str]:
    """The model types to try."""
    seeing = modeling_auto.MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES
    yield from seeing
    for name in modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        if name not in seeing and (everything or has_other_parts(CONFIG_MAPPING[name]())):
            yield name


def outcome(name: str, server: ForkServer, root: Path) -> str:
    """What came of a family."""
    try:
        config = small_config(CONFIG_MAPPING[name])
        with torch.device("meta"):
            size = whole_class(config).from_config(config).num_parameters()
        if size > _MOST:
            return f"not tried: its sizes go by other names, so it has {size:.1e} parameters"
        path = build_small(root / name, config)
        local = local_model(path)
        with torch.no_grad():
            local(**padded_batch())
    except Exception as error:  # whatever a family needs that is not known here
        return f"not tried: {type(error).__name__}: {' '.join(str(error).split())[:200]}"
    with new_swarm(server) as swarm:
        try:
            swarm.serve(path, "0:2", "2:5")
        except AssertionError:
            said = [line for peer in swarm.peers for line in peer.stderr.read_text().splitlines()]
            return f"refused by `peer serve`: {said[-1] if said else 'nothing was said'}"
        try:
            remote = swarm.connect(path)
            where = find_blocks(local)
            leaves = {n.rpartition(".")[2] for n, m in where.of(local).named_modules() if type(m) is torch.nn.Linear}
            found = differences(remote, local, rf"{re.escape(where.path)}\..*\.({'|'.join(sorted(leaves))})")
        except SwarmError as error:
            return f"refused by the client: {error}"
        except Exception as error:  # a fault of ours, which is what this looks for
            return f"FAILED: {type(error).__name__}: {first_line(error)[:200]}"
        kind = type(remote).__name__
        if type(remote) is not type(local):
            return f"FAILED: {kind} instead of {type(local).__name__}"
        worst = {part: found[part] for part in sorted(found, key=found.__getitem__)[-3:]}
        return f"differs ({kind}): {worst}" if found else f"exact ({kind})"


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="model types; default: all that see or hear as well")
    parser.add_argument("--all", action="store_true", help="causal language models that do nothing else, too")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    tf.logging.set_verbosity_error()
    torch.set_num_threads(1)
    server = ForkServer()
    with tempfile.TemporaryDirectory() as root:
        for name in arguments.names or families(arguments.all):
            print(f"{name}: {outcome(name, server, Path(root))}", flush=True)
    server.close()


if __name__ == "__main__":
    main()
