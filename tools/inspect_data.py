#!/usr/bin/env python
# PYTHON_ARGCOMPLETE_OK
"""Shows built data: tables by source, documents as text, lengths and duplicates."""

from __future__ import annotations

import argparse
import random
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from pretrain.core import startup  # not found? Run `pip install -e .` in the checkout.

startup.prepare()  # before the slow imports

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from data_pipeline.shards.inspection import (
    Duplicates,
    LengthStatistics,
    documents,
    find_duplicates,
    length_statistics,
)
from data_pipeline.shards.manifest import Manifest, load_manifest
from data_pipeline.tokenizer.tokenizer import load_tokenizer
from pretrain.core.cli import add_json_option, command_parser, write_json
from pretrain.core.errors import run_command
from pretrain.core.figures import save_figure
from pretrain.core.progress import Stage

EXAMPLES = """\
  python tools/inspect_data.py data/quickstart
  python tools/inspect_data.py data/quickstart --split validation --document 0 --document 7
  python tools/inspect_data.py data/corpus --sample 5 --duplicates --histogram lengths.png"""
BAR_CHARACTERS = 50


def parse_arguments() -> argparse.Namespace:
    """Return the command's options."""
    parser = command_parser(__doc__ or "", EXAMPLES)
    parser.add_argument("data", help="a data folder, or the prefix of shards")
    parser.add_argument("--split", default="train", choices=["train", "validation"])
    parser.add_argument(
        "--document",
        type=int,
        action="append",
        default=[],
        metavar="N",
        help="show this document; may be repeated",
    )
    parser.add_argument(
        "--sample",
        type=int,
        default=2,
        metavar="N",
        help="show this many documents, chosen at random (default: 2)",
    )
    parser.add_argument("--seed", type=int, default=0, help="of the random choice")
    parser.add_argument(
        "--characters",
        type=int,
        default=600,
        metavar="N",
        help="of each document that are shown (default: 600)",
    )
    parser.add_argument(
        "--duplicates",
        action="store_true",
        help="read every document and count those that repeat an earlier one",
    )
    parser.add_argument(
        "--histogram", type=Path, metavar="PNG", help="also draw the lengths into a picture"
    )
    add_json_option(parser)
    return parser.parse_args()


def print_sources(console: Console, manifest: Manifest) -> None:
    """Print a table of the sources."""
    table = Table(
        "source",
        "kind",
        "records",
        "documents",
        "tokens",
        "text bytes",
        "tokens a document",
        "share",
        "not in the shards",
    )
    for name, source in manifest.sources.items():
        losses = [
            f"{count:,} {reason}"
            for counts in (source.bad, source.left_out, source.dropped)
            for reason, count in counts.items()
        ]
        per_document = f"{source.tokens / source.documents:,.0f}" if source.documents else "-"
        sizes = [
            f"{value:,}"
            for value in (source.records, source.documents, source.tokens, source.utf8_bytes)
        ]
        table.add_row(
            name, source.kind, *sizes, per_document, f"{source.share:.1%}", ", ".join(losses) or "-"
        )
    console.print(table)
    table = Table("split", "documents", "tokens", "text bytes", "shards")
    for name, split in manifest.splits.items():
        table.add_row(
            name,
            f"{split.documents:,}",
            f"{split.tokens:,}",
            f"{split.utf8_bytes:,}",
            f"{len(split.shards):,}",
        )
    console.print(table)


def print_lengths(console: Console, lengths: LengthStatistics) -> None:
    """Print percentiles of the documents' lengths."""
    percentiles = ", ".join(f"{share}% {length:,}" for share, length in lengths.percentiles.items())
    console.print(
        f"document lengths in tokens: mean {lengths.mean:,.1f}, longest {lengths.longest:,};"
        f" percentiles {percentiles}",
        highlight=False,
    )
    most = max(lengths.counts, default=0)
    for low, high, count in zip(lengths.edges[:-1], lengths.edges[1:], lengths.counts, strict=True):
        if count:
            bar = "█" * max(1, round(BAR_CHARACTERS * count / most))
            console.print(f"{low + 1:>12,} - {high:<12,} {bar} {count:,}", highlight=False)


def draw_lengths(lengths: LengthStatistics, title: str, path: Path) -> None:
    """Draw a histogram of the documents' lengths."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 4.5))
    axes.bar([f"{high:,}" for high in lengths.edges[1:]], lengths.counts)
    axes.set(title=title, xlabel="tokens a document, up to", ylabel="documents")
    axes.tick_params(axis="x", rotation=60)
    figure.tight_layout()
    save_figure(figure, path, option="--histogram")


def print_duplicates(console: Console, found: Duplicates) -> None:
    """Print the duplicates that were found."""
    share = found.repeated / found.documents if found.documents else 0.0
    console.print(
        f"{found.repeated:,} of {found.documents:,} documents ({share:.2%},"
        f" {found.repeated_tokens:,} tokens) repeat an earlier one"
    )
    for number, copies in found.most:
        console.print(f"  document {number:,} is there {copies:,} times", highlight=False)


def main() -> None:
    """Run the command."""
    arguments = parse_arguments()
    manifest = load_manifest(arguments.data)
    tokenizer = load_tokenizer(manifest.tokenizer_path)
    lengths = length_statistics(manifest, arguments.split)
    numbers = arguments.document or sorted(
        random.Random(arguments.seed).sample(
            range(lengths.documents), min(arguments.sample, lengths.documents)
        )
    )
    shown: list[dict[str, Any]] = [
        {
            "number": found.number,
            "source": found.source,
            "tokens": len(found.tokens),
            "text": tokenizer.decode(found.tokens.tolist()),
        }
        for found in documents(manifest, arguments.split, numbers)
    ]
    duplicates = None
    if arguments.duplicates:
        with Stage("comparing", True, manifest.splits[arguments.split].tokens, "token") as stage:
            duplicates = find_duplicates(manifest, arguments.split, 5, stage.advance)
    if arguments.histogram:
        draw_lengths(lengths, f"{arguments.data}, {arguments.split}", arguments.histogram)
    result: dict[str, Any] = {
        "data": arguments.data,
        "split": arguments.split,
        "manifest": manifest.model_dump(mode="json"),
        "documents": shown,
    }
    result |= {"lengths": asdict(lengths), "duplicates": asdict(duplicates) if duplicates else None}
    write_json(result, arguments.json_path)
    if arguments.json_path == "-":
        return
    console = Console()
    print_sources(console, manifest)
    print_lengths(console, lengths)
    if duplicates:
        print_duplicates(console, duplicates)
    for row in shown:
        console.rule(
            f"{arguments.split} document {row['number']:,} of {row['source']}, {row['tokens']:,}"
            " tokens"
        )
        console.print(escape(row["text"][: arguments.characters]), highlight=False)
        if len(row["text"]) > arguments.characters:
            console.print(
                f"... {len(row['text']) - arguments.characters:,} more characters", style="dim"
            )


command = partial(run_command, main)  # moe-inspect-data

if __name__ == "__main__":
    command()
