"""The table that tools/preprocess_data.py prints at its end."""

from __future__ import annotations

from data_pipeline.preprocess.coordinator import BuildResult
from data_pipeline.preprocess.import_shards import ImportResult
from data_pipeline.preprocess.manifest_writer import BAD_RECORDS, DROPPED_DOCUMENTS
from data_pipeline.shards.manifest import Manifest, TokenizerEntry
from data_pipeline.sources.interface import meaning_of_notes


def print_result(
    result: BuildResult, packing: dict[str, float] | None, seconds: float, command: str
) -> None:
    """Print what a build has made.

    Args:
        packing: shares of padding and of cut documents; None if samples are not planned.
        seconds: that the build took.
        command: that trains on the data.
    """
    _print_splits(result.manifest)
    _print_sources(result.manifest)
    _print_tokenizer(result)
    read = sum(source.utf8_bytes for source in result.manifest.sources.values())
    speed = f"built in {seconds:.1f} s, {read / seconds / 1e6:.1f} MB of text/s"
    print(
        f"data        {result.output.path}"
        f" ({'reused: it was built before' if result.reused else speed})"
    )
    if packing:
        print(
            f"packing     {packing['padding_share']:.4%} of the tokens are padding,"
            f" {packing['truncated_share']:.1%} of the documents are cut"
        )
    reports = [
        path
        for name in (BAD_RECORDS, DROPPED_DOCUMENTS)
        if (path := result.output.folder / result.output.name(name)).exists()
    ]
    if reports:
        print(f"reports     {', '.join(map(str, reports))}")
    print(f"\nnext: {command}")


def _print_splits(manifest: Manifest) -> None:
    print(f"{'split':<12}{'documents':>12}{'tokens':>18}{'text bytes':>18}{'shards':>8}")
    for side, split in manifest.splits.items():
        print(
            f"{side:<12}{split.documents:>12,}{split.tokens:>18,}{split.utf8_bytes:>18,}"
            f"{len(split.shards):>8}"
        )


def _print_sources(manifest: Manifest) -> None:
    print(
        f"\n{'source':<12}{'records':>12}{'documents':>12}{'share':>8}  what is not in the shards"
    )
    meanings = meaning_of_notes()
    for name, source in manifest.sources.items():
        losses = [
            f"{count:,} {reason}"
            for counts in (source.bad, source.left_out, source.dropped)
            for reason, count in counts.items()
        ]
        print(
            f"{name:<12}{source.records:>12,}{source.documents:>12,}{source.share:>8.1%} "
            f" {', '.join(losses) or '-'}"
        )
        for note, count in source.notes.items():
            print(f"{'':<12}look at     {count:,} {note}: {meanings.get(note, note)}")


def _print_tokenizer(result: BuildResult) -> None:
    tokenizer = result.manifest.tokenizer
    print(
        f"\nvocabulary  {tokenizer.vocab_size:,} entries, end of document is"
        f" {'no token' if tokenizer.eod_id is None else tokenizer.eod_id}"
        + (f"; encoded with {result.engine}" if result.engine else "")
    )
    if isinstance(result, ImportResult) and result.how is not None:
        how = ", ".join(f"{count:,} {what}" for what, count in result.how.items())
        print(
            f"imported    {how}; the largest token id is {result.largest_id:,}; documents"
            f" {_ends(tokenizer)}"
        )


def _ends(tokenizer: TokenizerEntry) -> str:
    """Return which tokens begin and end the documents, as the import has found it."""
    begin = f"begin with the token {tokenizer.bos_id} and " if tokenizer.prepend_bos else ""
    if tokenizer.eod_id is None:
        return f"{begin}end with no token"
    return (
        f"{begin}{'end' if tokenizer.append_eod else 'do not all end'} with the token"
        f" {tokenizer.eod_id}"
    )
