"""The typed recipe: everything one run is, checked before anything starts.

Each section is frozen and refuses unknown keys. ``kind`` chooses a component and with it the fields
that are allowed. Units are part of a field's name or of its description. Hugging Face's names are
used wherever it has one.
"""

from __future__ import annotations

import math
from typing import Annotated, Literal

from pydantic import BeforeValidator, Field, model_validator

from data_pipeline.config import DataConfig
from pretrain.config.callbacks import CallbackConfig
from pretrain.config.guards import GuardConfig
from pretrain.config.phases import PhaseConfig
from pretrain.config.published import PublishedConfig
from pretrain.config.schedules import CosineSchedule, ScheduleConfig
from pretrain.config.trackers import CardConfig, TrackersConfig
from pretrain.core.registry import OneOf
from pretrain.core.section import (
    NonNegative,
    Positive,
    Ranks,
    Section,
    Sequences,
    SequenceTokens,
    Tokens,
)
from pretrain.model.config import ModelConfig, Recomputation
from pretrain.optim.config import Optimizer


def _on_or_off(value: object) -> object:
    # YAML reads a bare on or off as a boolean.
    return {True: "on", False: "off"}[value] if isinstance(value, bool) else value


def _which_recomputation(value: object) -> object:
    # Recipes from before there was a choice say true or false.
    return {True: "full", False: "none"}[value] if isinstance(value, bool) else value


class TrainConfig(Section):
    """Sizes and number format of one run.

    The number of steps (:class:`pretrain.config.timeline.Timeline`) and the gradient accumulation
    are derived, never given.
    """

    # Sizes. One owner each: the ds_config's batch sizes and accumulation are filled in from these.
    sequence_length: SequenceTokens = Field(description="tokens")
    micro_batch_size: Sequences = Field(description="sequences a rank holds at once")
    global_batch_size: Sequences = Field(description="sequences a step, over all ranks")
    # Exactly one of these two says how long the run is.
    train_tokens: Tokens | None = Field(
        None,
        description=(
            "tokens of the whole run, rounded up to whole steps; each phase is rounded up too"
        ),
    )
    epochs: Annotated[float, Field(gt=0, le=10**6)] | None = Field(
        None,
        description=(
            "instead of train_tokens: passes over the training split, rounded up to whole steps. "
            "A step that an epoch ends in takes its other sequences from the next epoch"
        ),
    )
    epoch_samples: Positive | None = Field(
        None,
        description=(
            "sequences of the run's longest length in one epoch; a run fills it in from its data"
        ),
    )
    # Number formats.
    precision: Literal["auto", "fp32", "bf16", "fp16", "fp8"] = Field(
        "auto",
        description=(
            "'auto': bf16 if the hardware multiplies it natively, else fp32; 'fp8': "
            "bf16 with linear layers in fp8"
        ),
    )
    tf32: bool = Field(
        False,
        description=(
            "GPUs multiply fp32 matrices with 10 bits of mantissa; CPUs have no such products"
        ),
    )
    # Speed and memory: none of these changes what is learned, except by rounding.
    compile: Literal["auto", "none", "blocks", "all"] = Field(
        "auto",
        description=(
            "'blocks': torch.compile of attention and of dense blocks, once at the start; 'all': "
            "also what is between the matrix products of experts and head; 'auto': blocks on a "
            "GPU that Triton compiles for, except at ZeRO stage 3, else none"
        ),
    )
    fused_kernels: Literal["auto", "none"] = Field(
        "auto",
        description=(
            "'auto': Triton kernels on CUDA for what is between the matrix products, if Triton is "
            "installed; 'none': torch's operators everywhere"
        ),
    )
    activation_checkpointing: Annotated[Recomputation, BeforeValidator(_which_recomputation)] = (
        Field(
            "none",
            description=(
                "'full': recompute each block in the backward pass, and keep only its input; "
                "'selective': keep the outputs of matrix products, attention and exchanges between "
                "ranks, and recompute the rest; true and false are full and none"
            ),
        )
    )
    # Of the norm over all parameters and ranks, which DeepSpeed computes.
    grad_clip: Annotated[float, Field(ge=0)] = Field(
        1.0, description="largest global gradient norm; 0 switches clipping off"
    )
    self_test: Annotated[Literal["auto", "on", "off"], BeforeValidator(_on_or_off)] = Field(
        "auto",
        description=(
            "at the start, compare losses and gradients of one small batch with those of a single "
            "rank; 'auto': if several ranks will train for more than an hour"
        ),
    )
    deterministic: bool = Field(
        False,
        description=(
            "only kernels that give the same bits every time; an operation that has none "
            "is an error"
        ),
    )

    @model_validator(mode="after")
    def _has_one_length(self) -> TrainConfig:
        if (self.train_tokens is None) == (self.epochs is None):
            what = "is missing" if self.epochs is None else "and epochs are both given"
            raise ValueError(
                f"train_tokens {what}: the run's length is one of the two, so give one and make "
                "the other null"
            )
        if self.epochs is None and self.epoch_samples is not None:
            raise ValueError("epoch_samples belongs to epochs: leave it out")
        return self

    @property
    def tokens_per_step(self) -> int:
        """Tokens of one optimizer step, over all ranks."""
        return self.global_batch_size * self.sequence_length


def shared_sizes(sp_size: int, tp_size: int) -> str:
    """ ", sp_size N, tp_size M" of those above 1, for sentences."""
    sizes = {"sp_size": sp_size, "tp_size": tp_size}
    return "".join(f", {name} {size}" for name, size in sizes.items() if size > 1)


class ParallelConfig(Section):
    """How the ranks share the model. ZeRO is in the ds_config."""

    @property
    def token_parts(self) -> int:
        """Ranks that share each sequence."""
        return self.sp_size * self.tp_size

    ep_size: Ranks = Field(1, description="ranks that share one set of experts")
    sp_size: Ranks = Field(
        1,
        description=(
            "ranks that share each sequence, for lengths that do not fit on one: each computes a "
            "part of the tokens, and in attention a part of the heads (DeepSpeed Ulysses)"
        ),
    )
    tp_size: Ranks = Field(
        1,
        description=(
            "ranks that share the matrices of attention, of dense and shared feed-forwards, and "
            "the vocabulary, each with a part of the tokens too (Megatron's tensor parallelism)"
        ),
    )
    timeout_seconds: Annotated[float, Field(ge=2)] = Field(
        300.0,
        description=(
            "a rank that gives no sign of life, or holds up the others in a step, for as long is "
            "lost: all ranks end with exit code 7; validation and saving may take longer"
        ),
    )

    @property
    def fewest_ranks(self) -> int:
        """The smallest number of ranks that a run can have."""
        return math.lcm(self.ep_size, self.token_parts)


class CheckpointConfig(Section):
    """When a run saves, and which checkpoints it keeps."""

    interval_steps: Positive = 1000
    background: bool = Field(
        True,
        description=(
            "training waits only until its state is copied, in host memory of the size of the "
            "checkpoint; off: until it is written"
        ),
    )
    keep_last: Positive = Field(2, description="newest checkpoints that are kept")
    keep_best: bool = Field(
        False,
        description="also keep the one with the lowest validation loss; checkpoints/best names it",
    )
    keep_every_hours: float | None = Field(
        None,
        gt=0,
        description="also keep the first checkpoint of every so many hours since 1970 (UTC)",
    )
    keep_epochs: bool = Field(
        False,
        description=(
            "save after each pass over the training split, and keep these; "
            "checkpoints/epoch_N names them"
        ),
    )


class ValidationConfig(Section):
    """When the loss over held-out data is measured."""

    interval_steps: NonNegative = Field(
        500, description="0: only at the ends of kept epochs, of phases, and of the run"
    )
    max_windows: Positive | None = Field(
        None,
        description=(
            "sequences an in-loop validation reads, and the best is judged on; a run's "
            "end reads more as well"
        ),
    )
    final_windows: Positive | None = Field(
        None, description="sequences that the end of a run reads; all of them by default"
    )
    batch_tokens: Positive = Field(
        4096,
        description=(
            "tokens that a rank computes at once, at least a micro batch; always a micro batch if "
            "experts drop tokens, because losses would depend on it"
        ),
    )


class CodeEvaluation(Section):
    """pass@k of programs that each checkpoint writes (Chen et al. 2021), run in a sandbox.

    Its limits of time, memory, files and network guard against accidents, not against malice.
    """

    problems: str = Field(
        description='JSONL file: HumanEval\'s "task_id", "prompt", "test", "entry_point" a line'
    )
    allow_execution: bool = Field(
        False, description="has to be true: programs that the model writes are run"
    )
    num_samples: Positive = Field(1, description="solutions of each problem")
    pass_at: list[Positive] = Field([1], min_length=1, description="values of k")
    temperature: Annotated[float | None, Field(gt=0)] = Field(
        None, description="of drawn solutions; the likeliest token by default"
    )
    max_new_tokens: Positive = Field(256, description="tokens of a solution")
    program_seconds: Annotated[float, Field(gt=0)] = Field(10.0, description="for each program")
    program_memory_mib: Positive = Field(1024, description="for each program")

    @model_validator(mode="after")
    def _samples_are_enough_and_differ(self) -> CodeEvaluation:
        if max(self.pass_at) > self.num_samples:
            raise ValueError(
                f"pass@{max(self.pass_at)} needs {max(self.pass_at)} samples of each problem, and "
                f"num_samples is {self.num_samples}"
            )
        # Without chance all samples of a problem would be one and the same.
        if self.num_samples > 1 and self.temperature is None:
            raise ValueError("several samples of a problem need a temperature")
        return self


class EvaluationConfig(Section):
    """What is evaluated of saved checkpoints during the run, by ``tools/evaluate.py --watch``.

    That is one more process, on the machine of rank 0, which opens the whole model in fp32 on
    ``device``. Results are in evaluations.jsonl and TensorBoard.
    """

    interval_steps: Positive | None = Field(
        None,
        description="a multiple of checkpoint.interval_steps; every saved checkpoint by default",
    )
    heldout: bool = Field(
        True,
        description=(
            "perplexity, bits per byte and accuracy of the validation split, by source "
            "and by length"
        ),
    )
    max_windows: Positive | None = Field(
        None, description="sequences of the validation split; all of them by default"
    )
    prompts: list[str] = Field([], description="each is continued, always with the likeliest token")
    max_new_tokens: Positive = Field(64, description="tokens of such a continuation")
    tasks: list[str] = Field([], description="of lm-evaluation-harness")
    include_path: str | None = Field(None, description="folder of task files")
    limit: Positive | None = Field(
        None, description="documents of each task; all of them by default"
    )
    code: CodeEvaluation | None = None
    device: str = Field(
        "cpu", description="cpu, cuda or cuda:N, with memory that training leaves free"
    )
    finish_seconds: NonNegative = Field(
        600, description="how long the end of the training waits for the last evaluation"
    )


class LoggingConfig(Section):
    """When records of metrics are made."""

    interval_steps: Positive = 10
    usage_interval_steps: Positive = Field(
        100, description="window over which the choices of every expert are counted"
    )
    hot_expert_factor: Annotated[float, Field(gt=0)] = Field(
        5.0, description="an expert is hot above this many times the mean count of its layer"
    )
    tensorboard: bool = True


class Recipe(Section):
    """A whole run. ``name`` only chooses the default folders."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]
    plugins: list[str] = Field(
        [],
        description=(
            "modules that define further kinds of parts, imported before the rest is "
            "read; see docs/extending.md"
        ),
    )
    # Of weights and data order; of dropout and router noise with the rank added to it.
    seed: NonNegative = 1234
    # Where the run is, and what it starts from.
    run_path: str | None = Field(None, description="folder of the run; runs/<name> by default")
    initial_weights: str | None = Field(
        None,
        description=(
            "weights that a new run starts from, with a fresh optimizer and schedule; a resumed "
            "run ignores it. A checkpoint's folder, or a file of tensors by this project's names: "
            ".safetensors, or a state dict by torch.save (.pt, .pth, .bin, .ckpt)"
        ),
    )
    initial_weights_partial: bool = Field(
        False,
        description="also start from weights that do not all fit; what does not fit is listed",
    )
    branch_from: str | None = Field(
        None,
        description=(
            "a checkpoint of another run that a new run continues from, optimizer and data "
            "order included; a resumed run ignores it"
        ),
    )
    # What is trained, on what, and how.
    data: DataConfig = DataConfig()
    model: ModelConfig
    train: TrainConfig
    phases: list[PhaseConfig] = Field(
        [],
        description="one after the other; without any the other sections hold for the whole run",
    )
    optimizer: Annotated[Optimizer, OneOf()]
    schedule: Annotated[ScheduleConfig, OneOf()] = CosineSchedule()
    parallel: ParallelConfig = ParallelConfig()
    # What happens around the steps.
    checkpoint: CheckpointConfig = CheckpointConfig()
    validation: ValidationConfig = ValidationConfig()
    logging: LoggingConfig = LoggingConfig()
    guards: GuardConfig = GuardConfig()
    evaluation: EvaluationConfig | None = Field(
        None, description="of each saved checkpoint, during the training; none by default"
    )
    trackers: TrackersConfig | None = Field(
        None, description="experiment trackers; none by default"
    )
    callbacks: list[Annotated[CallbackConfig, OneOf()]] = Field(
        [],
        description="of plugins, after those that every run has, in this order",
    )
    published: PublishedConfig | None = Field(
        None, description="a published loss curve that is drawn with this run's; none by default"
    )
    card: CardConfig = CardConfig()

    @property
    def data_path(self) -> str:
        """The folder of the data."""
        return self.data.path or f"data/{self.name}"

    @property
    def output_path(self) -> str:
        """The folder of the run."""
        return self.run_path or f"runs/{self.name}"
