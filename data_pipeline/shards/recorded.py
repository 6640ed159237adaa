"""What data were built from, beside what a recipe says."""

from __future__ import annotations

from data_pipeline.config import DataConfig
from data_pipeline.shards.datasets import Datasets
from data_pipeline.shards.manifest import Manifest, canonical_sha256
from data_pipeline.tokenizer.config import TrainedTokenizer
from pretrain.core.errors import DataError


def data_warnings(data: DataConfig, datasets: Datasets) -> list[str]:
    """Return a sentence for each folder that was not built with the recipe's data section.

    Its sources are compared by name and kind, its tokenizer by what a manifest records. Training
    uses what is in the folder.
    """
    found = []
    for manifest in datasets.manifests.values():
        # A recipe that names folders does not say what they were built from.
        differences = [] if data.corpora else _sources(data, manifest)
        differences += _tokenizer(data, manifest)
        if differences:
            found.append(
                f"the data in {manifest.folder} were not built as the recipe says:"
                f" {'; '.join(differences)}; training uses what is in the folder"
            )
    return found


def held_out_sha256(data: DataConfig) -> str:
    """Return a checksum of what decides which documents of a source are held out."""
    fields = {"validation_share", "validation_documents", "split_by", "cleaning"}
    return canonical_sha256(
        data.model_dump(mode="json", include=fields | {"max_record_bytes"})
        | {
            "split_root": data.split_root is not None,
            "sources": {
                name: [source.kind, source.split, getattr(source, "id_field", None)]
                for name, source in data.named_sources.items()
            },
        }
    )


def check_streamed(data: DataConfig, datasets: Datasets) -> None:
    """Check that a stream leaves out what the folder's validation split holds.

    Training reads the sources by the recipe, so both must be of one recipe.

    Raises:
        DataError: if they are not.
    """
    manifest = datasets.first
    if manifest.held_out_sha256 not in (None, held_out_sha256(data)):
        raise DataError(
            f"the validation split in {manifest.folder} was held out by other settings than the"
            " stream's (sources, data.validation_share, split_by or cleaning), so that the stream"
            " would train on it: build the data again, or put the settings back"
        )
    if differences := _tokenizer(data, manifest):
        raise DataError(
            f"the validation split in {manifest.folder} was encoded otherwise than the stream:"
            f" {'; '.join(differences)}; build the data again, or put data.tokenizer back"
        )


def _sources(data: DataConfig, manifest: Manifest) -> list[str]:
    asked = {name: source.kind for name, source in data.named_sources.items()}
    recorded = {name: source.kind for name, source in manifest.sources.items()}
    if asked == recorded:
        return []
    return [f"they are of {_listed(recorded)}, not of {_listed(asked)}"]


def _listed(kinds: dict[str, str]) -> str:
    return ", ".join(f"the source '{name}' ({kind})" for name, kind in kinds.items())


def _tokenizer(data: DataConfig, manifest: Manifest) -> list[str]:
    asked, recorded = data.tokenizer, manifest.tokenizer
    found = []
    size = asked.vocab_size
    # Training on little text ends before a tokenizer has all the entries that were asked for.
    may_be_smaller = isinstance(asked, TrainedTokenizer)
    if size is not None and not (
        recorded.vocab_size == size or (may_be_smaller and recorded.vocab_size < size)
    ):
        found.append(f"their tokenizer has {recorded.vocab_size} entries, not {size}")
    for field in ("append_eod", "prepend_bos"):
        if getattr(asked, field) != getattr(recorded, field):
            found.append(f"their {field} is {str(getattr(recorded, field)).lower()}")
    if asked.parse_special_tokens != bool(recorded.parse_special_tokens):
        found.append(
            f"their special tokens were {'' if recorded.parse_special_tokens else 'not '}parsed"
        )
    return found
