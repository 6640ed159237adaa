#!/usr/bin/env python
"""Draw the documentation's pictures and the pages that are made of code.

``quickstart_loss.svg`` shows a real run: its points are in ``quickstart_run.json``, which
``--run runs/quickstart`` takes from the files of a finished quickstart. ``flow.svg`` shows the way
from a corpus to an export. ``../deepspeed_workarounds.md`` repeats the heads of the files in
``pretrain/engine/workarounds/``, ``../combinations.md`` asks the rules about recipes and
ds_configs. Without ``--run`` all are made of files in this checkout.
"""

from __future__ import annotations

import argparse
import ast
import json
import re
import textwrap
from dataclasses import asdict, dataclass
from pathlib import Path
from xml.sax.saxutils import escape

FIGURES = Path(__file__).resolve().parent
ROOT = FIGURES.parents[1]
RUN_POINTS = FIGURES / "quickstart_run.json"
LOSS_PICTURE = FIGURES / "quickstart_loss.svg"
FLOW_PICTURE = FIGURES / "flow.svg"
WORKAROUNDS = ROOT / "pretrain" / "engine" / "workarounds"
WORKAROUNDS_PAGE = ROOT / "docs" / "deepspeed_workarounds.md"
COMBINATIONS_PAGE = ROOT / "docs" / "combinations.md"
PAGE_WIDTH = 160
ENTRIES = ("Fact", "Versions", "Upstream", "Effect", "Test")

PAGE_HEAD = """\
# What the engine works around in DeepSpeed

Each fact has one file in [`pretrain/engine/workarounds/`](../pretrain/engine/workarounds). If the
named test shows that DeepSpeed has changed, the file can go. This page repeats the heads of those
files: change them, then run `python docs/figures/make_figures.py`.
"""
PAGE_TAIL = """\
## Handled where they occur
| fact | file |
|---|---|
| AutoEP's router multiplies in the model's precision and has no balancing losses | `pretrain/model/moe/dropless.py` |
| the native layer's `l_aux` has another scale for each k | `pretrain/model/moe/deepspeed_native.py` |
| DeepSpeed's Muon takes the gradient norm and clips after orthogonalising | `pretrain/optim/muon.py` |
| monitors raise inside the engine, and count samples instead of steps | `pretrain/engine/monitor.py` |
| universal checkpoints leave out buffers; at ZeRO 3 all parameters get one tensor as their step | `pretrain/checkpoint/universal.py` |
"""


# --- the curve ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class RunPoints:
    """What the curve shows of a run; losses are in nats per token.

    Attributes:
        training: tokens and the mean loss since the record before.
        validation: tokens and the loss on the sample that all validations share.
        validation_loss: of the whole validation split, after the run.
    """

    recipe: str
    train_tokens: int
    parameters_total: int
    parameters_active: int
    validation_loss: float
    bigram_loss: float
    training: list[tuple[int, float]]
    validation: list[tuple[int, float]]


def read_run(run: Path) -> RunPoints:
    """The points of a finished quickstart, from the run's own files."""
    lines = (run / "metrics.jsonl").read_text("utf-8").splitlines()
    records = [json.loads(line) for line in lines]
    summary = json.loads((run / "summary.json").read_text("utf-8"))
    validations = [record for record in records if record["kind"] == "validation"]
    # The end of a run also reads the whole split, which does not compare with the samples.
    sampled = [record for record in validations if record["targets"] == validations[0]["targets"]]
    return RunPoints(
        recipe=summary["recipe"],
        train_tokens=summary["train_tokens"],
        parameters_total=summary["parameters_total"],
        parameters_active=summary["parameters_active"],
        validation_loss=summary["validation_loss"],
        bigram_loss=summary["bigram_loss"],
        training=[(r["tokens"], round(r["loss"], 4)) for r in records if r["kind"] == "train"],
        validation=[(r["tokens"], round(r["validation_loss"], 4)) for r in sampled],
    )


def stored_points() -> RunPoints:
    """The points that the checkout has."""
    return RunPoints(**json.loads(RUN_POINTS.read_text("utf-8")))


def draw_loss(points: RunPoints, path: Path) -> None:
    """Draw loss over tokens, with the bigram model that the trained one has to beat."""
    import matplotlib

    matplotlib.use("svg")
    # Text as text and fixed ids: the same points give the same file.
    matplotlib.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "quickstart"})
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7.2, 3.4))
    axes.plot(*_curve(points.training), color="#7aa6d8", linewidth=1.2, label="training")
    axes.plot(
        *_curve(points.validation),
        color="#c0392b",
        marker="o",
        linewidth=1.8,
        label="validation, a sample",
    )
    axes.plot(
        points.train_tokens / 1000,
        points.validation_loss,
        color="#c0392b",
        marker="*",
        markersize=12,
        linestyle="",
        label=f"validation, all of it: {points.validation_loss:.2f}",
    )
    axes.axhline(
        points.bigram_loss,
        color="#555555",
        linestyle="--",
        linewidth=1.2,
        label=f"Kneser-Ney bigram, {points.bigram_loss:.2f}",
    )
    axes.set_xlabel("thousand tokens")
    axes.set_ylabel("loss, nats a token")
    axes.set_ylim(bottom=3.5)
    axes.grid(alpha=0.25)
    axes.legend(frameon=False)
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})
    pyplot.close(figure)


def _curve(points: list[tuple[int, float]]) -> tuple[list[float], list[float]]:
    """Thousands of tokens, and losses."""
    return [tokens / 1000 for tokens, _ in points], [loss for _, loss in points]


# --- the flow -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Box:
    """One step of the main job: what it is, what it makes, and the command that does it."""

    title: str
    lines: tuple[str, ...]
    command: str


FLOW = (
    Box("corpus", ("text, JSON, Parquet,", "CSV, code, HF data sets"), "your files"),
    Box("shards", ("clean, deduplicate, split,", "tokenize to .bin/.idx"), "preprocess_data.py"),
    Box("training", ("data and expert parallel,", "ZeRO 0-3, phases, guards"), "pretrain.py"),
    Box("checkpoint", ("atomic, verified, resumes", "bit for bit, safetensors"), "inspect, merge"),
    Box("evaluation, export", ("held-out loss, tasks, text;", "HF, GGUF"), "evaluate, convert"),
)
BOX_WIDTH, BOX_HEIGHT, GAP, MARGIN = 176, 92, 26, 8


def flow_svg() -> str:
    """The boxes of :data:`FLOW` from left to right, with arrows between them."""
    width = 2 * MARGIN + len(FLOW) * BOX_WIDTH + (len(FLOW) - 1) * GAP
    height = 2 * MARGIN + BOX_HEIGHT
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" '
        f'width="{width}" height="{height}" font-family="sans-serif" text-anchor="middle">',
        '<rect width="100%" height="100%" fill="#ffffff"/>',
    ]
    for number, box in enumerate(FLOW):
        left = MARGIN + number * (BOX_WIDTH + GAP)
        centre = left + BOX_WIDTH / 2
        parts.append(
            f'<rect x="{left}" y="{MARGIN}" width="{BOX_WIDTH}" height="{BOX_HEIGHT}" rx="8" '
            'fill="#eef4fb" stroke="#2c5f93"/>'
        )
        parts.append(_text(centre, 30, box.title, 'font-size="15" font-weight="bold"'))
        for row, line in enumerate(box.lines):
            parts.append(_text(centre, 51 + 16 * row, line, 'font-size="12"'))
        parts.append(
            _text(centre, 90, box.command, 'font-size="12" font-family="monospace" fill="#2c5f93"')
        )
        if number:
            middle, tip = MARGIN + BOX_HEIGHT / 2, left - 3
            parts.append(
                f'<path d="M{left - GAP + 2} {middle} H{tip - 6}" stroke="#2c5f93" '
                'stroke-width="2" fill="none"/>'
            )
            parts.append(f'<path d="M{tip} {middle} l-9 -5 v10 z" fill="#2c5f93"/>')
    return "\n".join([*parts, "</svg>", ""])


def _text(x: float, y: float, text: str, attributes: str) -> str:
    return f'<text x="{x:g}" y="{y:g}" {attributes}>{escape(text)}</text>'


# --- the page of facts about DeepSpeed ------------------------------------------------------------


def workarounds_page() -> str:
    """The page with one section for each file, of the entries in its docstring."""
    sections = []
    for path in sorted(WORKAROUNDS.glob("*.py")):
        if path.name == "__init__.py":
            continue
        docstring = ast.get_docstring(ast.parse(path.read_text("utf-8"))) or ""
        title, *_ = docstring.splitlines()
        entries = _entries(docstring)
        link = f"../pretrain/engine/workarounds/{path.name}"
        seen = f"DeepSpeed {entries['Versions']}; upstream issue: {entries['Upstream']}."
        lines = [f"## {title.rstrip('.')}", f"[`{path.name}`]({link}), {seen}"]
        for name in ("Fact", "Effect", "Test"):
            entry = entries[name]
            # A test's name has no place to break at, and shows as code.
            entry = re.sub(r"(tests/\S+\.py(?:::\w+)?)", r"`\1`", entry)
            lines += textwrap.wrap(
                f"* **{name}.** {entry[0].upper()}{entry[1:]}",
                PAGE_WIDTH,
                subsequent_indent="  ",
                break_long_words=False,
            )
        sections.append("\n".join(lines))
    return "\n".join([PAGE_HEAD, *sections, "", PAGE_TAIL])


def _entries(docstring: str) -> dict[str, str]:
    """The text after each ``Name:`` at the start of a line, joined to one line."""
    names = "|".join(ENTRIES)
    pattern = rf"^({names}):(.*?)(?=^(?:{names}):|\Z)"
    found = re.findall(pattern, docstring, re.MULTILINE | re.DOTALL)
    return {name: " ".join(text.replace("``", "`").split()) for name, text in found}


def combinations_page() -> str:
    """The page of what goes together."""
    # Imports DeepSpeed, which takes seconds.
    from combinations_page import page

    return page()


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument(
        "--run", type=Path, metavar="RUN", help="a finished quickstart, to take new points from"
    )
    options = parser.parse_args()
    if options.run is not None:
        points = json.dumps(asdict(read_run(options.run)))
        RUN_POINTS.write_text(points + "\n", encoding="utf-8")
    FLOW_PICTURE.write_text(flow_svg(), encoding="utf-8")
    WORKAROUNDS_PAGE.write_text(workarounds_page(), encoding="utf-8")
    COMBINATIONS_PAGE.write_text(combinations_page(), encoding="utf-8")
    draw_loss(stored_points(), LOSS_PICTURE)


if __name__ == "__main__":
    main()
