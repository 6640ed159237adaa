"""Keeps credentials out of everything that a run writes.

Recipes and ds_configs that hold one are refused, and texts are redacted.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from pretrain.core.errors import ConfigError

NAME = re.compile(
    r"(^|[_-])(api_?key|secret(_key)?|password|passwd|credentials?|(access|private|kaggle)_key"
    r"|(auth|access|api)_token)$|^token$",
    re.I,
)
# Keys as their issuers document them: W&B, Hugging Face, OpenAI and Anthropic, GitHub, GitLab, AWS,
# Slack, Google, PyPI, Kaggle; JSON web tokens. Inside a URL: a password (unlike a port, it may
# contain a slash), a token in its place, and the signature of a query.
VALUE = re.compile(
    r"\b(wandb_v1_\w{20,}|hf_[A-Za-z0-9]{30,}|sk-(proj|ant|svcacct|admin)-[\w-]{20,}"
    r"|sk-[A-Za-z0-9]{40,}|gh[pousr]_[A-Za-z0-9]{36,}"
    r"|github_pat_\w{40,}|glpat-[\w-]{20,}|A[KS]IA[A-Z0-9]{16}|xox[abeprs]-[\w-]{10,}"
    r"|AIza[\w-]{35}|pypi-[\w-]{40,}|KGAT_\w{20,}|eyJ[\w-]{10,}\.eyJ[\w-]{10,}\.[\w-]+)\b"
    r"|(?<=://)([^/\s:@]*:(?!\d{1,5}/)[^\s@]+|[\w.~%-]{20,})(?=@)"
    r"|(?<=[?&])(?i:sig|signature|x-(amz|goog)-(signature|credential|security-token)"
    r"|((access|auth|api)_?)?(token|key)|password|secret)=[^&#\s]+"
)
# W&B's older keys are 40 hexadecimal digits, Comet's 25 letters and digits. Outside of these
# sections such a text may be a name or a checksum.
BARE_KEY = re.compile(r"(?=.*[0-9])(?=.*[A-Za-z])[A-Za-z0-9]{25,}")
TRACKER_SECTIONS = ("trackers.", "wandb.", "comet.")
REDACTED = "[redacted]"


def redact(text: str) -> str:
    """The text with credentials replaced by ``[redacted]``."""
    return VALUE.sub(REDACTED, text)


def refuse_credentials(content: Any, origin: str) -> None:
    """Refuse a nested mapping with a text that looks like a credential.

    Raises:
        ConfigError: with the credential's path, never its value.
    """
    for path, name, value in _texts(content, ""):
        # Bare keys count only below a tracker's section: elsewhere they may be checksums.
        in_tracker = path.startswith(TRACKER_SECTIONS) and BARE_KEY.fullmatch(value)
        if value and (NAME.search(name) or VALUE.search(value) or in_tracker):
            raise ConfigError(
                f"{origin}: '{path}' looks like a credential, which would be copied into the "
                "run's folder: take it out and set it in the environment "
                "(WANDB_API_KEY, COMET_API_KEY, MLFLOW_TRACKING_TOKEN, HF_TOKEN, KAGGLE_KEY)"
            )


def _texts(content: Any, path: str, name: str = "") -> Iterator[tuple[str, str, str]]:
    """(dotted path, last key, text) of every text in nested mappings and lists."""
    if isinstance(content, dict):
        for key, value in content.items():
            yield from _texts(value, f"{path}.{key}" if path else str(key), str(key))
    elif isinstance(content, list):
        for number, value in enumerate(content):
            yield from _texts(value, f"{path}.{number}", name)
    elif isinstance(content, str):
        yield path, name, content
