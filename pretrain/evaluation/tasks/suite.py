"""All evaluations of one model, in one result."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import cast

import torch

from data_pipeline.shards.split import SplitName
from pretrain.checkpoint.layout import read_state
from pretrain.core.errors import ConfigError
from pretrain.evaluation.checkpoint import whole_checkpoint
from pretrain.evaluation.generation.generators import (
    NativeGenerator,
    TransformersGenerator,
    open_generator,
)
from pretrain.evaluation.generation.sampling import Sampling
from pretrain.evaluation.generation.writing import Writer
from pretrain.evaluation.heldout.heldout import score_checkpoint, score_transformers
from pretrain.evaluation.heldout.lengths import (
    LengthOptions,
    score_checkpoint_lengths,
    score_transformers_lengths,
)
from pretrain.evaluation.heldout.references import read_references, score_references
from pretrain.evaluation.heldout.scores import HeldoutScore
from pretrain.evaluation.needle.score import (
    NeedleOptions,
    score_checkpoint_needles,
    score_transformers_needles,
)
from pretrain.evaluation.result import CodeResult, EvaluationResult, WrittenText
from pretrain.evaluation.tasks.code import STOP, read_problems, score_code
from pretrain.evaluation.tasks.harness import run_tasks
from pretrain.export.hf_files import is_hf_folder

WRITING_BATCH = 8
GREEDY = Sampling(greedy=True)


@dataclass(frozen=True)
class HeldoutOptions:
    """See :func:`pretrain.evaluation.heldout.heldout.score_checkpoint`."""

    data: str | None = None
    split: SplitName = "validation"
    max_windows: int | None = None
    baselines: Sequence[str] = ("bigram",)
    window: int | None = None
    stride: int | None = None


@dataclass(frozen=True)
class TaskOptions:
    """See :func:`pretrain.evaluation.tasks.harness.run_tasks`."""

    tasks: Sequence[str]
    include_path: Path | None = None
    num_fewshot: int | None = None
    limit: int | None = None


@dataclass(frozen=True)
class CodeOptions:
    """Problems to solve. The programs are run in :mod:`pretrain.evaluation.tasks.sandbox`.

    Attributes:
        sampling, max_new_tokens: of solutions; those of all texts by default.
    """

    problems: Path
    num_samples: int = 1
    pass_at: Sequence[int] = (1,)
    timeout_seconds: float = 10.0
    memory_bytes: int = 1 << 30
    sampling: Sampling | None = None
    max_new_tokens: int | None = None


@dataclass(frozen=True)
class Suite:
    """What is evaluated; parts that are None or empty are left out.

    Attributes:
        prompts: texts to continue.
        references: JSONL file of prompts and references.
        sampling: of all texts; of code too, unless its options have their own.
        stop: strings that end a text.
        batch_size: windows, requests or texts at once.
    """

    device: torch.device
    heldout: HeldoutOptions | None = None
    lengths: LengthOptions | None = None
    needles: NeedleOptions | None = None
    tasks: TaskOptions | None = None
    prompts: Sequence[str] = ()
    references: Path | None = None
    code: CodeOptions | None = None
    sampling: Sampling = GREEDY
    max_new_tokens: int = 64
    stop: Sequence[str] = ()
    batch_size: int | None = None

    def run(self, path: Path) -> EvaluationResult:
        """Evaluates a checkpoint of this project, or a Hugging Face folder.

        Raises:
            PipelineError: if one of the evaluations cannot be done.
        """
        folder = path if is_hf_folder(path) else whole_checkpoint(path)
        step = None if is_hf_folder(folder) else read_state(folder)["step"]
        result: EvaluationResult = {"checkpoint": str(folder), "step": step}
        if self.heldout is not None:
            result.update(self._heldout(folder, self.heldout).to_dict())
        if self.lengths is not None:
            result["lengths"] = (
                score_transformers_lengths(
                    folder, self.lengths, self.device, self.batch_size or WRITING_BATCH
                )
                if is_hf_folder(folder)
                else score_checkpoint_lengths(folder, self.lengths, self.device, self.batch_size)
            )
        if self.needles is not None:
            score = score_transformers_needles if is_hf_folder(folder) else score_checkpoint_needles
            result["needles"] = score(folder, self.needles, self.device, self.batch_size)
        # Opened only if needed: the score on held-out text has loaded the model once already.
        if self.tasks or self.prompts or self.references or self.code:
            self._run_generator(open_generator(folder, self.device), result)
        return result

    def _run_generator(
        self, opened: NativeGenerator | TransformersGenerator, result: EvaluationResult
    ) -> None:
        """Adds to ``result`` what needs a model that writes texts."""
        batch_size = self.batch_size or WRITING_BATCH
        result["depends_on_batch"] = opened.call_dependence
        writer = Writer(opened, self.sampling, self.max_new_tokens, self.stop)
        if self.tasks is not None:
            options = self.tasks
            result["tasks"] = run_tasks(
                opened,
                options.tasks,
                options.include_path,
                options.num_fewshot,
                options.limit,
                batch_size,
            )
        if self.prompts:
            texts = writer.write(self.prompts, batch_size)
            result["texts"] = [
                cast(WrittenText, {"prompt": prompt, **asdict(text)})
                for prompt, text in zip(self.prompts, texts, strict=True)
            ]
        if self.references is not None:
            prompts, references = read_references(self.references)
            written = [text.text for text in writer.write(prompts, batch_size)]
            result["references"] = asdict(score_references(written, references))
        if self.code is not None:
            result["code"] = self._code(opened, self.code)

    def _heldout(self, folder: Path, options: HeldoutOptions) -> HeldoutScore:
        if not is_hf_folder(folder):
            return score_checkpoint(
                folder,
                options.data,
                options.split,
                self.device,
                batch_size=self.batch_size,
                max_windows=options.max_windows,
                baselines=options.baselines,
                window=options.window,
                stride=options.stride,
            )
        if options.data is None:
            raise ConfigError(
                f"{folder} does not say what it was trained on: give held-out text with --data"
                " FOLDER"
            )
        return score_transformers(
            folder,
            options.data,
            options.split,
            self.device,
            batch_size=self.batch_size or WRITING_BATCH,
            max_windows=options.max_windows,
            baselines=options.baselines,
            window=options.window,
            stride=options.stride,
        )

    def _code(
        self, opened: NativeGenerator | TransformersGenerator, options: CodeOptions
    ) -> CodeResult:
        writer = Writer(
            opened,
            options.sampling or self.sampling,
            options.max_new_tokens or self.max_new_tokens,
            (*STOP, *self.stop),
        )
        score = score_code(
            read_problems(options.problems),
            writer,
            options.num_samples,
            options.pass_at,
            self.batch_size or WRITING_BATCH,
            options.timeout_seconds,
            options.memory_bytes,
        )
        pass_at = {str(k): value for k, value in score.pass_at.items()}
        return cast(CodeResult, {**asdict(score), "pass_at": pass_at})
