"""How a request wants its tokens chosen: by Transformers' own processors, in `generate`'s order."""

from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList


@dataclass(frozen=True)
class Sampling:
    """What a request says; None: what the checkpoint's generation_config.json says, or nothing."""

    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    seed: int | None = None
    min_tokens: int = 0
    ignore_eos: bool = False


class Chooser:
    """Chooses the tokens of one sequence.

    `others`: further processors, which come before what only sampling has, as `generate(logits_processor=...)`'s do.
    """

    def __init__(self, model: Any, sampling: Sampling, prompt: int, others: Sequence[LogitsProcessor] = ()):
        config = _as_generation_config(model.generation_config, sampling)
        model._prepare_special_tokens(config, kwargs_has_attention_mask=True, device="cpu")
        own = [_Penalties(prompt, sampling)] if sampling.frequency_penalty or sampling.presence_penalty else []
        self._processors: LogitsProcessorList = model._get_logits_processor(
            config, input_ids_seq_length=prompt, logits_processor=LogitsProcessorList([*own, *others]), device="cpu"
        )
        eos = config.eos_token_id
        found = [eos] if isinstance(eos, int) else list(eos or ())
        self.ends = frozenset(() if sampling.ignore_eos else found)
        """The tokens with which a text ends."""
        self._do_sample = bool(config.do_sample)
        self._generator = torch.Generator()
        if sampling.seed is None:
            self._generator.seed()
        else:
            self._generator.manual_seed(sampling.seed)

    def choose(self, tokens: Sequence[int], logits: torch.Tensor) -> int:
        """The token that follows `tokens`, by logits (1, vocabulary), float32 on the CPU, which stay as they are."""
        scores: Any = logits
        if self._processors:
            scores = self._processors(torch.tensor([tokens]), logits.clone())  # type: ignore[arg-type]
        if self._do_sample:
            return int(torch.multinomial(scores.softmax(-1), 1, generator=self._generator))
        return int(scores.argmax(-1))


class _Penalties(LogitsProcessor):
    """OpenAI's penalties for tokens that are in the answer already: for each time, and for being there at all."""

    def __init__(self, prompt: int, sampling: Sampling):
        self._prompt, self._frequency, self._presence = prompt, sampling.frequency_penalty, sampling.presence_penalty

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        counts = torch.zeros_like(scores)
        answer = input_ids[:, self._prompt :]
        counts.scatter_add_(1, answer, torch.ones_like(answer, dtype=scores.dtype))
        return scores - self._frequency * counts - self._presence * (counts > 0)  # type: ignore[return-value]


def _as_generation_config(defaults: GenerationConfig, sampling: Sampling) -> GenerationConfig:
    """What `generate` would be told; beams and the like that a checkpoint asks for are left out."""
    config = deepcopy(defaults)
    given: dict[str, Any] = {
        "temperature": sampling.temperature, "top_p": sampling.top_p, "top_k": sampling.top_k,
        "min_p": sampling.min_p, "repetition_penalty": sampling.repetition_penalty,
    }  # fmt: skip
    for name, value in given.items():
        if value is not None:
            setattr(config, name, value)
    config.temperature = 1.0 if config.temperature is None else config.temperature
    config.do_sample = config.temperature > 0
    config.num_beams, config.guidance_scale, config.top_k = 1, None, config.top_k or 0
    if sampling.logit_bias:
        config.sequence_bias = {(token,): float(bias) for token, bias in sampling.logit_bias.items()}
    if sampling.min_tokens:
        config.min_new_tokens = sampling.min_tokens
    return config
