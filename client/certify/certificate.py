"""What was measured of each wire codec, and when a codec is called safe."""

from dataclasses import asdict, dataclass
from typing import Any

MAX_KL, MIN_TOP1, MAX_LOSS = 1e-3, 0.99, 0.005
"""What is called safe: nats per token, share of tokens, relative difference of the loss."""


@dataclass(frozen=True)
class Extent:
    """How much is measured."""

    spans: int
    tokens: int
    """Tokens of the text on which distributions are compared."""
    steps: int
    """Optimizer steps of each training."""


@dataclass(frozen=True)
class Effect:
    """What one codec does."""

    codec: str
    gradients: str
    bytes_per_value: float
    kl: float
    """Kullback-Leibler divergence of the next token's distribution from the true one, nats, mean over tokens."""
    top1: float
    """Share of tokens whose likeliest successor is the same."""
    perplexity: float
    loss: float
    """Mean of the training's last quarter."""
    loss_change: float
    """Relative."""

    @property
    def excesses(self) -> list[str]:
        """What is not within its threshold; what is no number is not."""
        within = {"KL": self.kl <= MAX_KL, "top-1": self.top1 >= MIN_TOP1, "loss": abs(self.loss_change) <= MAX_LOSS}
        return [name for name, is_within in within.items() if not is_within]

    @property
    def is_safe(self) -> bool:
        """Whether all that was measured is within the thresholds."""
        return not self.excesses


@dataclass(frozen=True)
class Certificate:
    """The result for a model."""

    model: str
    dtype: str
    extent: Extent
    perplexity: float
    loss: float
    effects: tuple[Effect, ...]

    def as_json(self) -> dict[str, Any]:
        """Plain values, the thresholds and verdicts among them."""
        codecs = [{**asdict(effect), "safe": effect.is_safe} for effect in self.effects]
        limits = {"kl": MAX_KL, "top1": MIN_TOP1, "loss_change": MAX_LOSS}
        whole = {name: value for name, value in asdict(self).items() if name not in ("extent", "effects")}
        return {**whole, **asdict(self.extent), "limits": limits, "codecs": codecs}
