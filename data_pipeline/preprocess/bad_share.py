"""Limits the loss of each source: a build that loses more stops and names the reason."""

from __future__ import annotations

from collections import Counter

from data_pipeline.preprocess.unit_record import UnitRecord
from data_pipeline.sources.interface import meaning_of_reasons
from pretrain.core.errors import DataError

# A text of nothing but white space is left out, and nothing is lost with it.
NO_LOSS = {"empty"}
# One record says little about a source of a few, unless it holds much.
ONE_RECORD_BYTES = 1 << 16
# With these the rest of a file is lost, which is as much as it holds and not one record.
REST_IS_LOST = {"damaged_compression", "damaged_file"}
ADVICE = {
    "invalid_utf8": "name the encoding of the text with --encoding, such as cp1252",
    "undecodable": "name another encoding with --encoding",
    "missing_field": "name the field of the text with --text-field",
    "not_a_string": "name the field of the text with --text-field",
    "bad_id": "name another field with --id-field",
    "field_count": "check the delimiter and --quoting of the source",
    "invalid_csv": "check --quoting, or convert the file",
    "damaged_compression": "fetch the file again",
    "damaged_file": "fetch the file again",
    "too_long": "raise data.max_record_bytes",
    "invalid_json": "check that the files are JSON",
}


class BadShares:
    """Counts the bad records and bytes of each source.

    Args:
        allowed: share of a source, from 0 to 1, of its records and of its bytes.
        sizes: bytes of each source that are read in all; 0 if they are not known, as those of a
            stream, of which only records are counted.
    """

    def __init__(self, allowed: float, sizes: dict[str, int]) -> None:
        self.allowed = allowed
        self.sizes = sizes
        self.records: Counter[str] = Counter()
        self.bytes: Counter[str] = Counter()
        self.reasons: dict[str, Counter[str]] = {name: Counter() for name in sizes}
        self.examples: dict[tuple[str, str], str] = {}

    def add(self, record: UnitRecord) -> None:
        """Counts a unit's record, as :meth:`Reader.record` makes it.

        Raises:
            DataError: as soon as the lost bytes exceed the allowed share of the whole source.
        """
        name = record.source
        self.records[name] += record.records
        self.bytes[name] += record.bad_bytes
        self.reasons[name].update(
            {reason: count for reason, count in record.bad.items() if reason not in NO_LOSS}
        )
        for reason, example in record.bad_examples.items():
            self.examples.setdefault((name, reason), example)
        self._check(name, self._share(name) > self.allowed)

    def check(self) -> None:
        """Check all sources once everything is read.

        Raises:
            DataError: for a source of which more is bad than allowed.
        """
        for name, reasons in self.reasons.items():
            self._check(
                name,
                max(reasons.total() / max(self.records[name], 1), self._share(name)) > self.allowed,
            )

    def _share(self, name: str) -> float:
        """Bytes that were lost, of all of the source."""
        size = self.sizes[name]
        return self.bytes[name] / size if size else 0.0

    def _check(self, name: str, is_more: bool) -> None:
        reasons = self.reasons[name]
        share = min(self._share(name), 1.0)
        is_small = self.bytes[name] < ONE_RECORD_BYTES and (
            share <= self.allowed or not reasons.keys() & REST_IS_LOST
        )
        is_one = reasons.total() == 1 and is_small and self.records[name] > 1 and self.allowed > 0
        if not is_more or is_one or not reasons:
            return
        reason, count = reasons.most_common(1)[0]
        example = self.examples.get((name, reason))
        # A plugin may leave records out for a reason that it has not described.
        meaning = meaning_of_reasons().get(reason, reason)
        what = f"{count:,}: {meaning}" + (f"; the first: {example}" if example else "")
        raise DataError(
            f"source '{name}': {reasons.total():,} of {self.records[name]:,} records are bad, with"
            f" {share:.1%} of its bytes; most often {reason} ({what}). --max-bad-share"
            f" {self.allowed:g} allows less: {ADVICE.get(reason, 'correct the input')}, or raise"
            " the share to leave the bad records out"
        )
