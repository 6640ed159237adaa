"""What happens to a document between its source and the tokenizer: it is mended, judged, and compared with others."""

from __future__ import annotations

from data_pipeline.cleaning.cleaner import Cleaner
from data_pipeline.cleaning.stage import REASONS, Cleaned

__all__ = ["REASONS", "Cleaned", "Cleaner"]
