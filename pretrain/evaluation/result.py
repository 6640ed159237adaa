"""The result of an evaluation, as ``tools/evaluate.py --json`` writes it."""

from __future__ import annotations

from typing import TypedDict

from pretrain.core.files import JsonObject

# A metric that the harness could not compute is None.
TaskMetrics = dict[str, float | str | None]
ScoreFields = dict[str, float | None]


class WrittenText(TypedDict):
    """A prompt and its continuation; see :class:`pretrain.evaluation.generation.writing.Continuation`."""

    prompt: str
    text: str
    new_tokens: int
    ended: str


class CodeResult(TypedDict):
    """:class:`pretrain.evaluation.tasks.code.CodeScore`; JSON has no integer keys."""

    problems: int
    samples: int
    pass_at: dict[str, float]
    passed: dict[str, int]
    timed_out: int
    without_network: bool


class LengthScore(TypedDict):
    """The score at one context length.

    Attributes:
        loss: nats per token.
        standard_error: of the loss, over sections of the text; None for a single section.
        by_position: loss and targets of groups of positions in the context.
    """

    targets: int
    loss: float
    standard_error: float | None
    perplexity: float
    accuracy: float
    by_position: dict[str, JsonObject]


class LengthsResult(TypedDict):
    """Scores of the same sections of text at several context lengths.

    Attributes:
        trained_length: tokens; None for a Hugging Face folder, which does not say.
        sections, section_tokens: how many, of the longest length each.
        document_mask: whether contexts end with their document, and positions count in it.
        variants: scores by length, by position encoding.
    """

    data: str
    split: str
    trained_position: str
    trained_length: int | None
    sections: int
    section_tokens: int
    document_mask: bool
    variants: dict[str, dict[str, LengthScore]]


class NeedleScore(TypedDict):
    """Retrieval at one context length and depth.

    Attributes:
        accuracy: share of contexts whose value greedy decoding finds whole.
        loss: nats per token of the value.
    """

    contexts: int
    accuracy: float
    loss: float


class NeedleResult(TypedDict):
    """Scores of the same needles at several context lengths and depths.

    Attributes:
        form: see :data:`pretrain.evaluation.needle.forms.FORMS`.
        trained_length: tokens; None for a Hugging Face folder, which does not say.
        samples: needles, each with a filler of its own.
        value_tokens: the mean length of a value.
        depends_on_batch: why the result depends on the batch size; None if it does not.
        variants: scores by length and by depth, by position encoding.
    """

    data: str
    split: str
    form: str
    trained_position: str
    trained_length: int | None
    samples: int
    value_tokens: float
    depends_on_batch: str | None
    variants: dict[str, dict[str, dict[str, NeedleScore]]]


class EvaluationResult(TypedDict, total=False):
    """All that was measured of one model; what was not asked for is missing.

    The score on held-out text is not nested: its keys are those of
    :class:`pretrain.evaluation.heldout.scores.HeldoutScore`.
    """

    checkpoint: str
    step: int | None
    data: str
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
    by_source: dict[str, ScoreFields]
    by_length: dict[str, ScoreFields]
    baselines: dict[str, ScoreFields]
    bigram: ScoreFields | None
    better_than_bigram_by: float | None
    lengths: LengthsResult
    needles: NeedleResult
    tasks: dict[str, TaskMetrics]
    texts: list[WrittenText]
    references: dict[str, float]
    code: CodeResult
