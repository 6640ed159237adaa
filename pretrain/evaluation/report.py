"""The result of an evaluation as Markdown, and as scalars for TensorBoard."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from pretrain.core.errors import StorageError
from pretrain.evaluation.result import LengthsResult, NeedleResult

UNITS = {"loss": "nats per token", "window": "tokens", "stride": "tokens", "targets": "tokens"}
HELDOUT = ("step", "targets", "window", "stride", "loss", "perplexity", "accuracy", "bits_per_byte")
GROUP = ("targets", "loss", "perplexity", "accuracy", "bits_per_byte")
BASELINE = ("loss", "perplexity", "bits_per_byte", "targets", "windows")
LENGTH = ("loss", "standard_error", "perplexity", "accuracy")
NEEDLE = {"accuracy": "Found", "loss": "Loss of the value, nats a token"}
CODE = ("problems", "samples", "timed_out", "without_network")


def _shown(value: Any) -> str:
    if value is None:
        return "-"
    return f"{value:.4f}" if isinstance(value, float) else str(value)


def _table(columns: list[str], rows: list[list[Any]]) -> list[str]:
    lines = [
        columns,
        ["---"] * len(columns),
        *([_shown(cell).replace("|", "\\|").replace("\n", "⏎") for cell in row] for row in rows),
    ]
    return ["| " + " | ".join(line) + " |" for line in lines]


def markdown(result: Mapping[str, Any]) -> str:
    """The whole result as Markdown: a section for each evaluation."""
    lines = [f"# {result['checkpoint']}", ""]
    if result.get("depends_on_batch") is not None:
        together = ""
        if "batch_size" in result:
            together = f" Held-out windows were computed {result['batch_size']} at once."
        lines += [f"Results depend on the batch: {result['depends_on_batch']}.{together}", ""]
    if "loss" in result:
        lines += _heldout_section(result)
    if "lengths" in result:
        lines += _lengths_section(result["lengths"])
    if "needles" in result:
        lines += _needles_section(result["needles"])
    if "tasks" in result:
        lines += _section(
            "Tasks (lm-evaluation-harness)",
            ["task", "metric", "value"],
            [
                [task, name, value]
                for task, metrics in result["tasks"].items()
                for name, value in metrics.items()
                if value is not None
            ],
        )
    if "references" in result:
        rows = [list(item) for item in result["references"].items()]
        lines += _section("Against references", ["what", "value"], rows)
    if "code" in result:
        code = result["code"]
        rows = [[f"pass@{k}", value] for k, value in code["pass_at"].items()]
        rows += [[name.replace("_", " "), code[name]] for name in CODE]
        lines += _section("Code", ["what", "value"], rows)
    if "texts" in result:
        rows = [[text["prompt"], text["text"]] for text in result["texts"]]
        lines += _section("Texts", ["prompt", "text"], rows)
    return "\n".join(lines)


def _section(title: str, columns: list[str], rows: list[list[Any]]) -> list[str]:
    return [f"## {title}", "", *_table(columns, rows), ""]


def _heldout_section(result: Mapping[str, Any]) -> list[str]:
    """The score on held-out text: in total, by source, by length, and of the baselines."""
    rows = [
        [name.replace("_", " "), f"{_shown(result[name])} {UNITS.get(name, '')}".strip()]
        for name in HELDOUT
    ]
    if result["better_than_bigram_by"] is not None:
        rows.append(
            ["better than bigram by", f"{result['better_than_bigram_by']:.4f} nats per token"]
        )
    lines = _section(f"{result['split']} split of {result['data']}", ["what", "value"], rows)
    lines += _scores("source", result["by_source"], GROUP)
    lines += _scores("tokens of the document", result["by_length"], GROUP)
    if result["baselines"]:
        lines += _scores("baseline", result["baselines"], BASELINE)
    return lines


def _lengths_section(result: LengthsResult) -> list[str]:
    """Loss by context length, and by position in the longest context."""
    variants = result["variants"]
    lengths = list(next(iter(variants.values())))
    trained = result["trained_length"]
    title = (
        f"Context lengths, on {result['sections']} sections of {result['section_tokens']} tokens"
    )
    lines = [f"## {title}", ""]
    if trained is not None:
        lines += [f"Trained with {result['trained_position']} on {trained} tokens.", ""]
    lines += _table(
        ["positions", "context, tokens", "loss", "standard error", "perplexity", "accuracy"],
        [
            [name, length, *(score[key] for key in LENGTH)]  # type: ignore[literal-required]
            for name, scores in variants.items()
            for length, score in scores.items()
        ],
    )
    longest = [scores[lengths[-1]]["by_position"] for scores in variants.values()]
    rows = [
        [places, *(groups[places]["loss"] if places in groups else None for groups in longest)]
        for places in longest[0]
    ]
    heading = f"loss at positions of {lengths[-1]} tokens"
    return [*lines, "", *_table([heading, *variants], rows), ""]


def _needles_section(result: NeedleResult) -> list[str]:
    """Retrieval by context length (rows) and depth (columns): accuracy, then loss."""
    title = f"Needles of the form {result['form']}, {result['samples']} at each length and depth"
    lines = [f"## {title}", ""]
    if result["trained_length"] is not None:
        trained = f"{result['trained_position']} on {result['trained_length']} tokens"
        lines += [f"Trained with {trained}.", ""]
    if result["depends_on_batch"] is not None:
        lines += [f"Results depend on the batch: {result['depends_on_batch']}.", ""]
    # As mappings, whose keys may be variables.
    variants: Mapping[str, Mapping[str, Mapping[str, Mapping[str, object]]]] = result["variants"]
    depths = list(next(iter(next(iter(variants.values())).values())))
    columns = ["positions", "context, tokens", *(f"depth {depth}" for depth in depths)]
    for key, what in NEEDLE.items():
        rows = [
            [name, length, *(cell[key] for cell in by_depth.values())]
            for name, by_length in variants.items()
            for length, by_depth in by_length.items()
        ]
        lines += [f"{what}:", "", *_table(columns, rows), ""]
    return lines


def _scores(
    label: str, scores: Mapping[str, Mapping[str, Any]], columns: Sequence[str]
) -> list[str]:
    rows = [[name, *(score[column] for column in columns)] for name, score in scores.items()]
    return [*_table([label, *(column.replace("_", " ") for column in columns)], rows), ""]


def numbers(result: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, float]]:
    """Every number of a nested result by its path, such as ``by_source/python/loss``."""
    for name, value in result.items():
        # TensorBoard's tags have no spaces or commas; the harness names metrics "acc,none".
        path = f"{prefix}{str(name).removesuffix(',none').replace(',', '/').replace(' ', '_')}"
        if isinstance(value, Mapping):
            yield from numbers(value, f"{path}/")
        elif isinstance(value, int | float) and not isinstance(value, bool):
            yield path, float(value)


def write_markdown(result: Mapping[str, Any], path: Path) -> None:
    """Writes the report; raises :class:`StorageError` if the file cannot be written."""
    temporary = path.with_name(path.name + ".partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_text(markdown(result), encoding="utf-8")
        os.replace(temporary, path)
    except OSError as error:
        raise StorageError(
            f"cannot write {path}: {error.strerror}; choose another --markdown path"
        ) from None


def write_tensorboard(
    result: Mapping[str, Any], folder: Path, step: int, forget_later: bool = False
) -> None:
    """Writes every number as ``evaluation/<path>``, and every text, at ``step``.

    Args:
        forget_later: hide what the folder has of this step and of later ones.

    Raises:
        StorageError: if the folder cannot be written to.
    """
    from torch.utils.tensorboard import SummaryWriter

    try:
        # TensorBoard reads files in the order of their names, which begin with the second. Two
        # files of one second differ by a number that it compares as text: 10 is before 9.
        while any(folder.glob(f"events.out.tfevents.{int(time.time()):010}.*")):
            time.sleep(0.05)
        with SummaryWriter(str(folder), purge_step=step if forget_later else None) as writer:
            for name, value in numbers(result):
                writer.add_scalar(f"evaluation/{name}", value, step)
            for number, text in enumerate(result.get("texts", [])):
                writer.add_text(
                    f"evaluation/text_{number}", f"{text['prompt']}**{text['text']}**", step
                )
    except OSError as error:
        raise StorageError(
            f"cannot write to {folder}: {error.strerror}; choose another --tensorboard folder"
        ) from None
