"""The loss curve that a model was published with, to be drawn with that of a run."""

from __future__ import annotations

import csv
import io
import math
from pathlib import Path
from typing import Annotated, NamedTuple

from pydantic import Field

from pretrain.core.errors import ConfigError
from pretrain.core.section import Positive, Section
from pretrain.core.shipped import RECIPES

CURVES = RECIPES / "published"
COLUMNS = ("step", "train_loss", "validation_loss")
# A curve is drawn by eye from a few points; whoever has more than this has another file in mind.
MOST_BYTES = 10_000_000


class PublishedConfig(Section):
    """A published loss curve. It is only drawn; nothing is trained by it."""

    curve: str = Field(
        description=(
            "CSV with the columns step, train_loss and validation_loss (nats a token; a cell may "
            "be empty): a shipped name such as h64lm, or a path"
        )
    )
    source: Annotated[str, Field(pattern=r"^[^\W_].{0,59}$")] = Field(
        description="what legends call it"
    )
    tokens_per_step: Positive | None = Field(
        None,
        description=(
            "of the published training, to draw it over tokens; by default its points are drawn at "
            "this run's own tokens of as many steps"
        ),
    )


class PublishedPoint(NamedTuple):
    """A row of a curve; losses are in nats a token, None if the publication has none there."""

    step: int
    train_loss: float | None
    validation_loss: float | None


def published_path(name_or_path: str) -> Path:
    """Return a shipped curve's file, otherwise the user's."""
    shipped = CURVES / f"{name_or_path}.csv"
    return shipped if shipped.is_file() else Path(name_or_path)


def read_published(config: PublishedConfig) -> list[PublishedPoint]:
    """Read the curve of a recipe.

    Raises:
        ConfigError: if the file is missing, or is no such CSV.
    """
    path = published_path(config.curve)
    if not path.is_file():
        names = ", ".join(sorted(file.stem for file in CURVES.glob("*.csv")))
        raise ConfigError(
            f"published.curve: there is no file {path}: give a CSV, or a shipped one of {names}"
        )
    if path.stat().st_size > MOST_BYTES:
        raise ConfigError(
            f"published.curve: {path} has {path.stat().st_size:,} bytes, a curve at most "
            f"{MOST_BYTES:,}: thin it out"
        )
    try:
        rows = csv.reader(io.StringIO(path.read_bytes().decode("utf-8-sig"), newline=""))
        lines = [(rows.line_num, row) for row in rows if row]
    except (UnicodeDecodeError, csv.Error):
        raise ConfigError(
            f"published.curve: {path} is no CSV in UTF-8: give {','.join(COLUMNS)}"
        ) from None
    if not lines or tuple(name.strip() for name in lines[0][1]) != COLUMNS:
        raise ConfigError(
            f"published.curve: the first line of {path} must be {','.join(COLUMNS)}: correct it"
        )
    points: list[PublishedPoint] = []
    for line, row in lines[1:]:
        point = _point(row)
        if point is None or (points and point.step <= points[-1].step):
            raise ConfigError(
                f"published.curve: line {line} of {path} must hold a step above the one before it, "
                "and two losses, each a finite number or empty: correct it"
            )
        points.append(point)
    if not points:
        raise ConfigError(f"published.curve: {path} has no points: leave it out")
    return points


def _point(row: list[str]) -> PublishedPoint | None:
    if len(row) != len(COLUMNS) or not row[0].strip().isascii() or not row[0].strip().isdigit():
        return None
    try:
        losses = [float(cell) if cell.strip() else None for cell in row[1:]]
    except ValueError:
        return None
    # Twenty digits and more fit into no step.
    if len(row[0].strip()) > 18 or not all(loss is None or math.isfinite(loss) for loss in losses):
        return None
    return PublishedPoint(int(row[0]), *losses)
