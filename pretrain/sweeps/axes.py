"""What is varied: axes over any field of a recipe, and the points they span.

An axis is written in one of three ways, in an axes file or as ``--axis NAME=...``:

    model.moe.top_k: [1, 2, 4]                       values of one field
    optimizer.learning_rate: log:1e-4:1e-2:5         a range; 5 values of it in a grid, any value
        for a search
    experts: {few: {model.moe.num_experts: 8}, ...}  named values, each a set of fields
"""

from __future__ import annotations

import hashlib
import itertools
import json
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pretrain.config.load import parse_yaml
from pretrain.core.errors import ConfigError
from pretrain.core.shipped import RECIPES

AXES_FOLDER = RECIPES / "axes"
RANGES = ("log", "linear", "int")
RANGE_FORM = "LOW:HIGH or LOW:HIGH:COUNT behind log:, linear: or int:"
LONGEST_NAME = 100
BASE = "base"


@dataclass(frozen=True)
class Choice:
    """One value of an axis.

    Attributes:
        label: how it is called in names and tables.
        overrides: ``field=value`` settings of a recipe.
        number: the value, if it is a number.
    """

    label: str
    overrides: tuple[str, ...]
    number: float | None = None


@dataclass(frozen=True)
class Axis:
    """A recipe field that is varied, or a named set of fields.

    Attributes:
        options: the values; of a range, those that a grid tries, and none if it has no count.
        scale: ``log``, ``linear`` or ``int`` for a range, None for an axis of listed values.
        low, high: of a range, both included.
    """

    name: str
    options: tuple[Choice, ...]
    scale: str | None = None
    low: float = 0.0
    high: float = 0.0

    def covers(self, other: Axis) -> bool:
        """Whether every value that ``other`` can have is also one of this axis."""
        if self.scale is None or other.scale is None:
            return self.scale == other.scale and set(other.options) <= set(self.options)
        return self.scale == other.scale and self.low <= other.low and other.high <= self.high

    def at(self, value: float) -> Choice:
        """A value of the range, rounded to four significant digits."""
        # Rounded before it is used, so that the value in names and tables is the exact one.
        exact: float | int = round(value) if self.scale == "int" else float(f"{value:.4g}")
        return Choice(_label(exact), (f"{self.name}={json.dumps(exact)}",), float(exact))


@dataclass(frozen=True)
class Point:
    """One set of values to try with one seed.

    Attributes:
        values: the label of each axis that is varied, by the axis's name.
        overrides: what sets them, in order, the seed last.
        run: the name of the point whose run gives this one's result: an earlier point, if both
            have the same recipe, or this one.
        measured_on: what its validation loss depends on besides the model, such as the tokenizer;
            losses compare only if all of it is equal.
    """

    name: str
    values: dict[str, str]
    overrides: list[str]
    seed: int | None = None
    run: str = ""
    numbers: dict[str, float] = field(default_factory=dict)
    measured_on: dict[str, str] = field(default_factory=dict)

    @property
    def group(self) -> str:
        """The point's name without its seed."""
        return self.name if self.seed is None else self.name.removesuffix(f",seed={self.seed}")


def read_axes_file(name_or_path: str) -> tuple[str | None, dict[str, object]]:
    """The base recipe, if any, and the specifications of the axes in a file.

    Args:
        name_or_path: a shipped file by its name, or a path.

    Raises:
        ConfigError: if there is no such file, or it holds no axes.
    """
    shipped = AXES_FOLDER / f"{name_or_path}.yaml"
    path = shipped if shipped.is_file() else Path(name_or_path)
    if not path.is_file():
        names = ", ".join(sorted(file.stem for file in AXES_FOLDER.glob("*.yaml")))
        raise ConfigError(
            f"there is no axes file '{name_or_path}', neither in {AXES_FOLDER} nor as a file:"
            f" shipped ones are {names}"
        )
    try:
        content = parse_yaml(path.read_text(encoding="utf-8"), str(path))
    except UnicodeDecodeError:
        raise ConfigError(f"{path} is not UTF-8 text: give a YAML file of axes") from None
    if (
        not isinstance(content, dict)
        or not isinstance(content.get("axes"), dict)
        or not content["axes"]
    ):
        raise ConfigError(
            f"{path} holds no axes: write 'axes:' and an axis a line, as {AXES_FOLDER}/moe.yaml"
            " does"
        )
    if unknown := sorted(content.keys() - {"base", "axes"}):
        raise ConfigError(
            f"{path}: unknown field '{unknown[0]}': an axes file has 'base' and 'axes'"
        )
    base = content.get("base")
    if base is not None and not isinstance(base, str):
        raise ConfigError(f"{path}: 'base' is the name or the path of one recipe (got {base!r})")
    # The path of a base is relative to the file, not to the working folder.
    nearby = path.parent / base if base else None
    return (str(nearby) if nearby is not None and nearby.is_file() else base), content["axes"]


def parse_axis_option(text: str) -> tuple[str, object]:
    """The name and the specification in ``NAME=SPEC``, which is read as YAML."""
    name, separator, spec = text.partition("=")
    if not separator or not name.strip() or not spec.strip():
        raise ConfigError(
            f"--axis {text}: write it as --axis section.field=log:LOW:HIGH or --axis"
            " section.field=[A,B,C]"
        )
    return name.strip(), parse_yaml(spec, f"--axis {text}")


def parse_axis(name: str, spec: object) -> Axis:
    """The axis of a specification from a file or from the command line.

    Raises:
        ConfigError: if it has none of the three forms.
    """
    name = str(name)  # YAML may have read a number
    if isinstance(spec, str):
        return _parse_range(name, spec)
    if isinstance(spec, list) and spec:
        listed = [
            Choice(_label(value), (_override(name, value),), _number(value)) for value in spec
        ]
        return Axis(name, _distinct(name, listed))
    if (
        isinstance(spec, dict)
        and spec
        and all(isinstance(fields, dict) and fields for fields in spec.values())
    ):
        choices = [
            Choice(_label(label), tuple(_override(key, value) for key, value in fields.items()))
            for label, fields in spec.items()
        ]
        return Axis(name, _distinct(name, choices))
    raise ConfigError(
        f"axis {name}: {spec!r} is no list of values, no range and no mapping of names to fields:"
        " see `--help`"
    )


def _parse_range(name: str, text: str) -> Axis:
    scale, *parts = text.split(":")
    try:
        low, high = float(parts[0]), float(parts[1])
        count = int(parts[2]) if len(parts) == 3 else None
    except (ValueError, IndexError):
        raise ConfigError(
            f"axis {name}: '{text}' is no range: write {RANGE_FORM}, or values as a list [A,B,C]"
        ) from None
    if scale not in RANGES or len(parts) > 3:
        raise ConfigError(f"axis {name}: '{text}' is no range: write {RANGE_FORM}")
    if not low < high or (scale == "log" and low <= 0) or (count is not None and count < 2):
        raise ConfigError(
            f"axis {name}: '{text}': LOW must be below HIGH, above 0 for log, and COUNT at least 2"
        )
    axis = Axis(name, (), scale, low, high)
    shares = [index / (count - 1) for index in range(count)] if count else []
    values = [
        low * (high / low) ** share if scale == "log" else low + (high - low) * share
        for share in shares
    ]
    # By label: neighbours of an integer range may round to the same value.
    options = {choice.label: choice for choice in map(axis.at, values)}
    return Axis(name, tuple(options.values()), scale, low, high)


def _override(name: str, value: Any) -> str:
    return f"{name}={json.dumps(value)}"


def _label(value: Any) -> str:
    if isinstance(value, str):
        return value
    return f"{value:g}" if isinstance(value, float) else json.dumps(value)


def _number(value: Any) -> float | None:
    # bool is a subclass of int, and True is no number to plot.
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else None


def _distinct(name: str, choices: Sequence[Choice]) -> tuple[Choice, ...]:
    twice = [
        label for label, count in Counter(choice.label for choice in choices).items() if count > 1
    ]
    if twice:
        raise ConfigError(f"axis {name}: the value {twice[0]} is there twice: leave one out")
    return tuple(choices)


def short_names(axes: Sequence[str]) -> dict[str, str]:
    """The last part of each dotted name, or more parts if several axes would be called alike."""
    for parts in range(1, 9):
        names = {axis: ".".join(axis.split(".")[-parts:]) for axis in axes}
        if len(set(names.values())) == len(axes):
            break
    return names


def point_of(choices: dict[str, Choice], names: dict[str, str], prefix: str = "") -> Point:
    """The point that has these values.

    Args:
        names: short names of the axes.
        prefix: the point's name, if it is not made of its values.
    """
    name = (
        prefix
        or ",".join(f"{names[axis]}={choice.label}" for axis, choice in choices.items())
        or BASE
    )
    numbers = {axis: choice.number for axis, choice in choices.items() if choice.number is not None}
    overrides = [override for choice in choices.values() for override in choice.overrides]
    safe = file_name(name)
    return Point(
        safe,
        {axis: choice.label for axis, choice in choices.items()},
        overrides,
        run=safe,
        numbers=numbers,
    )


def file_name(name: str) -> str:
    """A name like ``name`` that a folder can have."""
    safe = re.sub(r"[^A-Za-z0-9._=,+-]+", "_", name)
    if len(safe) > LONGEST_NAME or safe.startswith("."):
        # The hash keeps names apart that begin alike.
        digest = hashlib.sha256(name.encode()).hexdigest()[:8]
        safe = f"{safe[: LONGEST_NAME - 9].lstrip('.')}-{digest}"
    return safe


def grid(axes: Sequence[Axis]) -> list[Point]:
    """Every combination of values."""
    names = short_names([axis.name for axis in axes])
    return [
        point_of(dict(zip([axis.name for axis in axes], chosen, strict=True)), names)
        for chosen in itertools.product(*(_listed(axis) for axis in axes))
    ]


def one_at_a_time(axes: Sequence[Axis]) -> list[Point]:
    """The base recipe, then each value of each axis alone."""
    names = short_names([axis.name for axis in axes])
    return [
        point_of({}, names),
        *(point_of({axis.name: choice}, names) for axis in axes for choice in _listed(axis)),
    ]


def _listed(axis: Axis) -> tuple[Choice, ...]:
    if not axis.options:
        raise ConfigError(
            f"axis {axis.name}: a grid needs the number of values of a range: write"
            f" {axis.scale}:{axis.low:g}:{axis.high:g}:COUNT"
        )
    return axis.options


def with_seeds(points: Sequence[Point], seeds: Sequence[int]) -> list[Point]:
    """Each point with each seed; the points themselves if there are no seeds."""
    if not seeds:
        return list(points)
    if len(set(seeds)) < len(seeds):
        raise ConfigError(
            f"--seeds {' '.join(map(str, seeds))}: a seed is there twice; leave one out"
        )
    return [
        Point(
            f"{point.name},seed={seed}",
            point.values,
            [*point.overrides, f"seed={seed}"],
            seed,
            f"{point.name},seed={seed}",
            point.numbers,
        )
        for point in points
        for seed in seeds
    ]


def without_equal_names(points: Sequence[Point]) -> list[Point]:
    """The points, with a number behind names that became equal as names of folders."""
    seen: Counter[str] = Counter()
    result = []
    for point in points:
        seen[point.name] += 1
        if seen[point.name] > 1:
            name = f"{point.name}-{seen[point.name]}"
            point = Point(name, point.values, point.overrides, point.seed, name, point.numbers)
        result.append(point)
    return result
