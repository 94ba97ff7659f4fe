"""Merging an adapter into a base model, one module at a time, so that the whole model is never in memory.

PEFT injects the adapter into a model whose weights are stubs; then each adapted module in turn gets its weights from
the base's files, is merged by PEFT and written. What no adapter touches is copied from file to file.
"""

import json
import logging
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from client.merge.adapter import CONFIG_FILE, WEIGHTS_FILE, AdapterFolder
from client.merge.base import SIDE_FILES, BaseCheckpoint, MergeError, find_folder, read_json
from client.merge.origin import choose_revision
from client.merge.plan import MergePlan
from client.merge.write import ShardWriter, check_out, check_space, unfinished

__all__ = ["MergeError", "MergeReport", "merge_adapter"]

_logger = logging.getLogger(__name__)
_CHAT_TEMPLATES = "chat_template*"
_TOKENIZER_FILES = ("tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt",
                    _CHAT_TEMPLATES, "*.model", "*.tiktoken")  # fmt: skip


@dataclass(frozen=True)
class MergeReport:
    """What `merge_adapter` wrote."""

    out: Path
    method: str
    """The PEFT method, as PEFT spells it: LORA, IA3, ..."""
    modules: int
    """How many modules were adapted."""
    tensors: int
    nbytes: int
    """Bytes of the weights."""
    shards: int
    untied: bool
    """Whether embedding and head were one weight and are two now, because the adapter made them differ."""


def merge_adapter(
    adapter: Path | str,
    base: Path | str | None,
    out: Path,
    *,
    revision: str | None = None,
    dtype: torch.dtype | None = None,
    max_shard_bytes: int = 2 * 2**30,
    report: Callable[[str], None] = _logger.info,
) -> MergeReport:
    """Merge the PEFT adapter `adapter` into `base` (folders or hub names) and write a plain model folder `out`.

    `base` None: the model that the adapter was trained on, by its own config. `revision`: of a base on the hub; None:
    the one that the adapter was trained on.
    Weights keep the type they are stored in (bitsandbytes-quantized ones: the type they were quantized from), or get
    `dtype`; the arithmetic runs in the wider of the two. The result computes what the adapted model computes: where
    the adapter makes tied embeddings differ, the result has two of them. Memory: the weights of one module a few times
    over (of a block's experts, where they are fused; of the embeddings, where adapted). `out` appears when all is
    written. `report` gets a line now and then. Raises MergeError, whose message is one sentence for a person.
    """
    out = Path(out)
    check_out(out)
    tuned = AdapterFolder(find_folder(adapter, "adapter", (CONFIG_FILE, WEIGHTS_FILE, *_TOKENIZER_FILES)))
    base = str(base or tuned.base_name or "")
    if not base:
        raise MergeError(f"{tuned.folder / CONFIG_FILE} names no base model; name the one it was trained on (--base).")
    revision, notes = choose_revision(tuned.config.to_dict(), base, revision)
    checkpoint = BaseCheckpoint(find_folder(base, "base model", ("*.safetensors", *SIDE_FILES), revision))
    plan = MergePlan(tuned, checkpoint, dtype)
    specs = [spec for unit in plan.units for spec in unit.specs]
    check_space(out, sum(spec.nbytes for spec in specs))
    report(f"Merging a {tuned.method} adapter of {plan.modules} modules into {checkpoint.folder}.")
    for note in notes:
        report(note)
    with unfinished(out) as folder:
        with ShardWriter(folder, specs, max_shard_bytes) as writer:
            _write_weights(plan, writer, report)
        _copy_files(checkpoint.folder, tuned.folder, folder)
        (folder / "config.json").write_text(json.dumps(plan.config(), indent=2) + "\n", encoding="utf-8")
    report(f"Wrote {out}: {writer.nbytes / 1e9:.2f} GB in {writer.shards} file(s).")
    return MergeReport(out, tuned.method, plan.modules, len(specs), writer.nbytes, writer.shards, plan.untied)


def _write_weights(plan: MergePlan, writer: ShardWriter, report: Callable[[str], None]) -> None:
    done = tenths = 0
    for unit in plan.units:
        plan.write(unit, writer)
        done += len(unit.sites)
        if done * 10 // max(plan.modules, 1) > tenths:
            tenths = done * 10 // plan.modules
            report(f"Merged {done} of {plan.modules} modules.")
    writer.finish()


def _copy_files(base: Path, adapter: Path, out: Path) -> None:
    """Tokenizer, generation config and the like; the adapter's tokenizer, or its chat template alone, where it brings
    one, goes over the base's.
    """
    _copy_matching(base, SIDE_FILES, out)
    tokenizer = adapter / "tokenizer_config.json"
    if tokenizer.is_file() and "chat_template" in read_json(tokenizer, "a tokenizer's folder"):
        for file in out.glob(_CHAT_TEMPLATES):  # which Transformers would take before the one in the adapter's config
            file.unlink()
    _copy_matching(adapter, _TOKENIZER_FILES if tokenizer.is_file() else (_CHAT_TEMPLATES,), out)


def _copy_matching(source: Path, patterns: tuple[str, ...], out: Path) -> None:
    for pattern in patterns:
        for file in source.glob(pattern):
            if file.is_file() and not file.name.endswith((".index.json", ".safetensors")):
                shutil.copyfile(file, out / file.name)
