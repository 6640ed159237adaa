"""Scores on held-out text: of a group of targets, of a baseline, and of a model."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import cast

from pretrain.evaluation.heldout.perplexity import Evaluation
from pretrain.evaluation.result import EvaluationResult


@dataclass(frozen=True)
class GroupScore:
    """The score of a group of targets.

    Attributes:
        loss: nats per token.
        accuracy: share of the targets that were the likeliest token.
        bits_per_byte: None unless all windows were scored.
    """

    targets: int
    loss: float
    perplexity: float
    accuracy: float
    bits_per_byte: float | None

    @classmethod
    def of(cls, nats: float, targets: int, correct: int, utf8_bytes: int | None) -> GroupScore:
        """The score from sums over the targets, and the size of their text in bytes if known."""
        evaluation = Evaluation(nats, targets, correct)
        bits = evaluation.bits_per_byte(utf8_bytes) if utf8_bytes else None
        return cls(targets, evaluation.loss, evaluation.perplexity, evaluation.accuracy, bits)


@dataclass(frozen=True)
class BaselineScore:
    """The score of another model on the same text.

    Attributes:
        loss: nats per token of the baseline's own tokenizer; compare bits per byte instead if the
            tokenizers differ.
        windows: training samples that an n-gram was fitted on; None for other baselines.
    """

    loss: float
    perplexity: float
    bits_per_byte: float | None
    targets: int
    windows: int | None = None


@dataclass(frozen=True)
class HeldoutScore:
    """A model's result.

    Attributes:
        step: None for a Hugging Face folder.
        window, stride: in tokens.
        batch_size: windows that were computed together.
        depends_on_batch: why the result depends on the batch size; None if it does not.
    """

    data: str
    step: int | None
    split: str
    window: int
    stride: int
    batch_size: int
    depends_on_batch: str | None
    targets: int
    loss: float
    perplexity: float
    accuracy: float
    bits_per_byte: float | None
    by_source: dict[str, GroupScore]
    by_length: dict[str, GroupScore]
    baselines: dict[str, BaselineScore] = field(default_factory=dict)

    @property
    def bigram(self) -> BaselineScore | None:
        """The score of the bigram model, if it was asked for."""
        return self.baselines.get("bigram")

    @property
    def better_by(self) -> float | None:
        """Nats per token by which the model beats the bigram; negative if it does not."""
        return None if self.bigram is None else self.bigram.loss - self.loss

    def to_dict(self) -> EvaluationResult:
        """The score as JSON has it."""
        bigram = None if self.bigram is None else asdict(self.bigram)
        fields = {**asdict(self), "bigram": bigram, "better_than_bigram_by": self.better_by}
        return cast(EvaluationResult, fields)


@dataclass(frozen=True)
class ModelScore:
    """The part of a :class:`HeldoutScore` that depends on the model's logits."""

    total: GroupScore
    by_source: dict[str, GroupScore]
    by_length: dict[str, GroupScore]
