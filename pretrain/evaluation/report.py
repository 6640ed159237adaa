"""A result of :class:`pretrain.evaluation.tasks.suite.Suite` as Markdown, and as numbers for
TensorBoard.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from pretrain.core.errors import StorageError

UNITS = {"loss": "nats per token", "window": "tokens", "stride": "tokens", "targets": "tokens"}
HELDOUT = ("step", "targets", "window", "stride", "loss", "perplexity", "accuracy", "bits_per_byte")
GROUP = ("targets", "loss", "perplexity", "accuracy", "bits_per_byte")
BASELINE = ("loss", "perplexity", "bits_per_byte", "targets", "windows")


def _shown(value: Any) -> str:
    return "-" if value is None else f"{value:.4f}" if isinstance(value, float) else str(value)


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
        together = (
            f" Held-out windows were computed {result['batch_size']} at once."
            if "batch_size" in result
            else ""
        )
        lines += [f"Results depend on the batch: {result['depends_on_batch']}.{together}", ""]
    if "loss" in result:
        lines += [f"## {result['split']} split of {result['data']}", ""]
        rows = [
            [name.replace("_", " "), f"{_shown(result[name])} {UNITS.get(name, '')}".strip()]
            for name in HELDOUT
        ]
        if result["better_than_bigram_by"] is not None:
            rows.append(
                ["better than bigram by", f"{result['better_than_bigram_by']:.4f} nats per token"]
            )
        lines += [*_table(["what", "value"], rows), ""]
        for kind in ("by_source", "by_length"):
            label = "source" if kind == "by_source" else "tokens of the document"
            rows = [
                [name, *(group[column] for column in GROUP)] for name, group in result[kind].items()
            ]
            lines += [*_table([label, *(column.replace("_", " ") for column in GROUP)], rows), ""]
        if result["baselines"]:
            rows = [
                [name, *(score[column] for column in BASELINE)]
                for name, score in result["baselines"].items()
            ]
            lines += [
                *_table(["baseline", *(column.replace("_", " ") for column in BASELINE)], rows),
                "",
            ]
    if "tasks" in result:
        rows = [
            [task, name, value]
            for task, metrics in result["tasks"].items()
            for name, value in metrics.items()
            if value is not None
        ]
        lines += [
            "## Tasks (lm-evaluation-harness)",
            "",
            *_table(["task", "metric", "value"], rows),
            "",
        ]
    if "references" in result:
        lines += [
            "## Against references",
            "",
            *_table(["what", "value"], [list(item) for item in result["references"].items()]),
            "",
        ]
    if "code" in result:
        code = result["code"]
        rows = [[f"pass@{k}", value] for k, value in code["pass_at"].items()]
        rows += [
            [name.replace("_", " "), code[name]]
            for name in ("problems", "samples", "timed_out", "without_network")
        ]
        lines += ["## Code", "", *_table(["what", "value"], rows), ""]
    if "texts" in result:
        lines += [
            "## Texts",
            "",
            *_table(
                ["prompt", "text"], [[text["prompt"], text["text"]] for text in result["texts"]]
            ),
            "",
        ]
    return "\n".join(lines)


def numbers(result: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, float]]:
    """Every number of a nested result by its path, such as ``by_source/python/loss``."""
    for name, value in result.items():
        # Spaces and commas are no part of a tag: the harness names metrics "acc,none".
        path = f"{prefix}{str(name).removesuffix(',none').replace(',', '/').replace(' ', '_')}"
        if isinstance(value, Mapping):
            yield from numbers(value, f"{path}/")
        elif isinstance(value, int | float) and not isinstance(value, bool):
            yield path, float(value)


def write_markdown(result: Mapping[str, Any], path: Path) -> None:
    """Raises :class:`StorageError` where the file cannot be written."""
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
    """Every number as ``evaluation/<path>``, and every text, at ``step``.

    Args:
        forget_later: whether what the folder has of this step and later ones is no longer shown.

    Raises:
        StorageError: where the folder cannot be written to.
    """
    from torch.utils.tensorboard import SummaryWriter

    try:
        # TensorBoard reads files in the order of their names. Those of one second differ by a
        # number, which it compares as text: 10 is before 9.
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
