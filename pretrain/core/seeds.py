"""Seeds of random streams that have a name: what one draws does not depend on the others."""

from __future__ import annotations

import hashlib


def derived_seed(name: str) -> int:
    """A seed of 63 bits, as many as ``torch.manual_seed`` takes; the same in every process."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "little") >> 1
