"""A study: texts of one or two models, in blind sheets for raters, and the key to them.

``raters/`` is for the raters; ``key.json`` is not. Sheets name the study by the SHA-256 of the key,
so that a key that was changed afterwards does not open them.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import random
import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from pretrain.checkpoint.layout import MANIFEST, read_state, resolve_checkpoint
from pretrain.core.errors import ConfigError, DataError
from pretrain.core.files import appearing_folder, file_sha256
from pretrain.core.saved_types import first_fault
from pretrain.evaluation.generation.generators import open_generator
from pretrain.evaluation.generation.sampling import Sampling
from pretrain.evaluation.generation.writing import Writer
from pretrain.evaluation.heldout.references import read_jsonl
from pretrain.evaluation.human.form import form
from pretrain.export.hf_files import is_hf_folder

KEY = "key.json"
RATERS = "raters"
PAIRS, RATINGS = "pairs", "ratings"
SIDES = ("left", "right")
TIE = "tie"
SCALE = (1, 5)
CRITERIA = ("fluency", "coherence", "relevance")
QUESTIONS = {
    PAIRS: "Which continuation of the text is better?",
    RATINGS: "How good is this continuation of the text?",
}
# Columns of a sheet that are no criteria.
RESERVED = ("study", "sheet", "item", "rater", "choice", "comment", "prompt", *SIDES, "text")
LARGEST_KEY_BYTES = 500_000_000


class _Frozen(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)


class RatedModel(_Frozen):
    """A model of a study; ``manifest`` is the SHA-256 of a checkpoint's manifest."""

    checkpoint: str
    step: int | None
    manifest: str | None


class Item(_Frozen):
    """A prompt, and its continuation by each model, in the order of the models."""

    prompt: str
    texts: list[str]


class Key(_Frozen):
    """What the raters do not see.

    Attributes:
        salt: random, so that nobody can guess a key and find it by its hash.
        identical: prompts that both models continued alike; they are in no sheet.
        items: by their number in sheets.
        sheets: for each sheet, its items in their order, each with the model on the left (0 in a
            study of one model).
    """

    version: Literal[1]
    salt: str
    seed: int
    mode: Literal["pairs", "ratings"]
    question: str
    criteria: list[str]
    models: list[RatedModel] = Field(min_length=1, max_length=2)
    identical: int = Field(ge=0)
    items: dict[str, Item] = Field(min_length=1)
    sheets: dict[str, dict[str, Literal[0, 1]]] = Field(min_length=1)

    @model_validator(mode="after")
    def _fits_together(self) -> Key:
        count = len(self.models)
        if count != (2 if self.mode == PAIRS else 1):
            raise ValueError(f"{self.mode} of {count} models")
        if any(len(item.texts) != count for item in self.items.values()):
            raise ValueError("an item without a text of each model")
        if any(not item.keys() <= self.items.keys() for item in self.sheets.values()):
            raise ValueError("a sheet with an unknown item")
        return self


@dataclass(frozen=True)
class SheetOptions:
    """What a study is made of.

    Attributes:
        output: folder of the study.
        prompts: beginnings of texts.
        against: the model to compare with; None for ratings of one model.
        criteria: of ratings.
        question: to the raters; a default by the kind of study if it is None.
        raters: sheets with an order of their own.
        seed: of the order, and of the sides.
    """

    output: Path
    prompts: Sequence[str]
    against: Path | None = None
    criteria: Sequence[str] = CRITERIA
    question: str | None = None
    raters: int = 2
    seed: int = 0

    def __post_init__(self) -> None:
        criteria = [criterion.strip().lower() for criterion in self.criteria]
        if wrong := [name for name in criteria if not name or name in RESERVED]:
            raise ConfigError(
                f"--human-criteria has '{wrong[0]}', which names another column of a sheet: choose"
                " another name"
            )
        if len(set(criteria)) < len(criteria):
            raise ConfigError("--human-criteria names a criterion twice: leave one out")


def read_prompts(path: Path) -> list[str]:
    """The prompts of a JSONL file with a "prompt" a line, such as one of ``--references``.

    Raises:
        DataError: if it cannot be read, or a line has none.
    """
    prompts = []
    for number, row in enumerate(read_jsonl(path), start=1):
        prompt = row.get("prompt")
        if not isinstance(prompt, str):
            raise DataError(f'{path}, object {number} has no text "prompt": correct it')
        try:
            prompt.encode()
        except UnicodeEncodeError:
            # JSON can name half of a character, which no file can hold.
            raise DataError(
                f"{path}, object {number} has half of a surrogate pair: correct its \\u escape"
            ) from None
        prompts.append(prompt)
    return prompts


def make_study(
    checkpoint: Path,
    options: SheetOptions,
    device: torch.device,
    sampling: Sampling,
    *,
    max_new_tokens: int,
    stop: Sequence[str],
    batch_size: int,
) -> Key:
    """Lets the models continue the prompts, and writes the sheets and their key.

    Raises:
        ConfigError: if the folder is there, there are no prompts, or both models are one.
        DataError: if the models continued every prompt alike.
    """
    if options.output.exists():
        raise ConfigError(
            f"{options.output} is there, and raters may be using its sheets: choose another"
            " --human-sheet folder"
        )
    if not options.prompts:
        raise ConfigError(
            "a human evaluation continues prompts: give --human-prompts JSONL or --prompt TEXT"
        )
    paths = [checkpoint, *([options.against] if options.against is not None else [])]
    models = [_rated(path) for path in paths]
    if len(models) == 2 and models[0] == models[1]:
        raise ConfigError(
            f"--human-against is {models[1].checkpoint} like --checkpoint: compare two models"
        )
    # One model after the other: two large ones may not fit beside each other.
    written = [
        [
            text.text
            for text in Writer(open_generator(path, device), sampling, max_new_tokens, stop).write(
                list(options.prompts), batch_size
            )
        ]
        for path in paths
    ]
    items = [
        Item(prompt=prompt, texts=list(texts))
        for prompt, *texts in zip(options.prompts, *written, strict=True)
    ]
    key = make_key(items, models, options)
    write_study(key, options.output)
    return key


def _rated(path: Path) -> RatedModel:
    if is_hf_folder(path):
        return RatedModel(checkpoint=str(path), step=None, manifest=None)
    folder = resolve_checkpoint(path)
    step = read_state(folder)["step"]
    return RatedModel(checkpoint=str(folder), step=step, manifest=file_sha256(folder / MANIFEST))


def make_key(items: Sequence[Item], models: Sequence[RatedModel], options: SheetOptions) -> Key:
    """The key of a study: which items there are, and in which order and place raters see them.

    In each sheet each model is on the left in half of the items.

    Raises:
        DataError: if the models continued every prompt alike.
    """
    mode: Literal["pairs", "ratings"] = "pairs" if len(models) == 2 else "ratings"
    different = [item for item in items if len(set(item.texts)) == len(models)]
    if not different:
        raise DataError(
            "both models continued every prompt alike, so there is nothing to compare: give more"
            " prompts, or draw with --temperature"
        )
    numbered = {str(number): item for number, item in enumerate(different, start=1)}
    sheets: dict[str, dict[str, Literal[0, 1]]] = {}
    for rater in range(1, options.raters + 1):
        # A text as seed: random hashes it, so that neighbouring seeds have nothing in common.
        order = random.Random(f"{options.seed}, sheet {rater}")
        names = list(numbered)
        order.shuffle(names)
        lefts: list[Literal[0, 1]] = [0] * len(names)
        if mode == PAIRS:
            first = order.randrange(2)
            lefts = [1 if (place + first) % 2 else 0 for place in range(len(names))]
            order.shuffle(lefts)
        sheets[f"rater_{rater}"] = dict(zip(names, lefts, strict=True))
    return Key(
        version=1,
        salt=secrets.token_hex(16),
        seed=options.seed,
        mode=mode,
        question=options.question or QUESTIONS[mode],
        criteria=[name.strip().lower() for name in options.criteria] if mode == RATINGS else [],
        models=list(models),
        identical=len(items) - len(different),
        items=numbered,
        sheets=sheets,
    )


def key_bytes(key: Key) -> bytes:
    """The content of ``key.json``."""
    return (json.dumps(key.model_dump(mode="json"), indent=1) + "\n").encode()


def study_name(content: bytes) -> str:
    """What sheets call the study whose key has this content."""
    return f"sha256:{hashlib.sha256(content).hexdigest()}"


def write_study(key: Key, output: Path) -> None:
    """Writes the key, and a form and a CSV for each rater; all of it appears at once."""
    content = key_bytes(key)
    study = study_name(content)
    with appearing_folder(output) as folder:
        (folder / KEY).write_bytes(content)
        (folder / RATERS).mkdir()
        for sheet in key.sheets:
            path = folder / RATERS / sheet
            path.with_suffix(".html").write_text(_form(key, study, sheet), encoding="utf-8")
            path.with_suffix(".csv").write_text(_csv(key, study, sheet), encoding="utf-8")


def shown_texts(key: Key, item: str, left: Literal[0, 1]) -> list[str]:
    """The texts of an item from left to right."""
    texts = key.items[item].texts
    return texts[::-1] if left else texts


def _form(key: Key, study: str, sheet: str) -> str:
    items = [
        {"item": item, "prompt": key.items[item].prompt, "texts": shown_texts(key, item, left)}
        for item, left in key.sheets[sheet].items()
    ]
    return form(
        {
            "study": study,
            "sheet": sheet,
            "mode": key.mode,
            "question": key.question,
            "criteria": key.criteria,
            "scale": list(SCALE),
            "items": items,
        }
    )


def _csv(key: Key, study: str, sheet: str) -> str:
    memory = io.StringIO(newline="")
    writer = csv.writer(memory)
    rated = ["choice"] if key.mode == PAIRS else key.criteria
    shown = list(SIDES) if key.mode == PAIRS else ["text"]
    writer.writerow(["study", "sheet", "item", "rater", *rated, "comment", "prompt", *shown])
    for item, left in key.sheets[sheet].items():
        texts = [key.items[item].prompt, *shown_texts(key, item, left)]
        blank = [""] * (len(rated) + 2)
        writer.writerow([study, sheet, item, *blank, *map(_without_formula, texts)])
    return memory.getvalue()


def _without_formula(text: str) -> str:
    """A text that no spreadsheet computes: those compute what begins with one of these."""
    return f"'{text}" if text.startswith(("=", "+", "-", "@", "\t", "\r")) else text


def read_key(path: Path) -> tuple[Key, str]:
    """A study's key, and the name of the study.

    Raises:
        DataError: if it is missing or damaged.
    """
    try:
        if path.stat().st_size > LARGEST_KEY_BYTES:
            raise DataError(f"{path} is larger than any key: give the study's {KEY}")
        content = path.read_bytes()
        return Key.model_validate_json(content), study_name(content)
    except OSError as error:
        raise DataError(
            f"{path} cannot be read: {error.strerror}; give the study's {KEY}"
        ) from None
    except ValidationError as error:
        raise DataError(
            f"{path} is no key of a study ({first_fault(error)}): give the {KEY} that"
            " --human-sheet wrote"
        ) from None
