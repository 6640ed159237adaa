"""Errors of the package ``datasets`` as one sentence that says what to do."""

from __future__ import annotations

from data_pipeline.sources.files import one_line
from pretrain.core.errors import DataError

CHOOSE_SPLIT = "choose one with 'dataset_split' (--dataset-split)"
# What the package says, and what a user can do about it; the first that fits.
ADVICE = (
    (
        ("gated", "authenticated", "401 Client", "403 Client"),
        "accept its terms on its page and log in with 'hf auth login'",
    ),
    (
        ("OfflineModeIsEnabled", "offline mode"),
        (
            "HF_HUB_OFFLINE forbids the network, so fetch it first, or give the folder of a copy as"
            " 'dataset'"
        ),
    ),
    (
        ("Couldn't reach", "ConnectionError", "Connection"),
        "check the network, or give the folder of a copy as 'dataset'",
    ),
    (("BuilderConfig", "Config name is missing"), "choose one with 'config' (--dataset-config)"),
    (("Unknown split", "Bad split"), CHOOSE_SPLIT),
    (
        ("data file", "DataFilesNotFoundError", "EmptyDatasetError"),
        "check 'data_files', or name the folder of a copy that holds the files themselves",
    ),
    (("doesn't exist",), "check the name, or log in with 'hf auth login' where it is private"),
)


def library_error(name: str, error: Exception) -> DataError:
    """Return one sentence for an error of the package.

    It has no class for most cases, only texts.
    """
    cause = error.__cause__ or error
    text = f"{type(cause).__name__}: {one_line(str(cause))}"
    advice = next(
        (advice for signs, advice in ADVICE if any(sign in text for sign in signs)),
        "fetch it again, or check it with datasets.load_dataset",
    )
    return DataError(f"the data set '{name}' cannot be read ({text}): {advice}")
