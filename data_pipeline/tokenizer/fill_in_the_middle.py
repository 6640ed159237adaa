"""Fill in the middle (Bavarian et al. 2022).

The paper is "Efficient Training of Language Models to Fill in the Middle".
"""

from __future__ import annotations

import random
from collections.abc import Callable

from data_pipeline.cleaning.config import FillInTheMiddle
from data_pipeline.tokenizer.tokenizer import Tokenizer
from pretrain.core.errors import ConfigError, DataError

MIN_CHARACTERS = 3


def open_transform(
    config: FillInTheMiddle | None, source: str, tokenizer: Tokenizer
) -> FillInTheMiddleTransform | None:
    """Return the transform of a source's documents; None if they stay as they are.

    Raises:
        ConfigError: if the parts of a document, which are encoded as texts of their own, would have
            other blanks than the document.
        DataError: for a tokenizer without one of the three sentinels.
    """
    if config is None or not (config.sources is None or source in config.sources):
        return None
    if (change := _change_of_blanks(tokenizer)) is not None:
        raise ConfigError(
            f"data.fill_in_the_middle encodes the parts of a document as texts of their own, and"
            f" {tokenizer.origin} {change}, so that they would not join to the document: set"
            " data.tokenizer.dummy_prefix=false and data.tokenizer.normalization=identity if its"
            " kind is train_sentencepiece, or take another tokenizer"
        )
    return FillInTheMiddleTransform(config, tokenizer.token_id)


def _change_of_blanks(tokenizer: Tokenizer) -> str | None:
    """Return what happens to blanks at the ends of each text, in words; None if nothing does."""
    segmented = tokenizer.reference.segmented
    if len(segmented("a")) > 1:
        return "adds a blank to each text"
    # Where blanks within a text are cuts and no part of tokens, none is lost at its ends.
    if len(segmented(" a ")) < len(" a ") == len(segmented("a a")):
        return "removes blanks at the ends of each text"
    return None


class FillInTheMiddleTransform:
    """Cuts documents at two random characters and puts the middle part last (section 3).

    Args:
        token_id: the id of a special token, None for one that the tokenizer lacks.

    Raises:
        DataError: for a tokenizer without one of the three sentinels.
    """

    def __init__(self, config: FillInTheMiddle, token_id: Callable[[str], int | None]) -> None:
        self.config = config
        names = (config.prefix_token, config.middle_token, config.suffix_token)
        ids = [found for found in map(token_id, names) if found is not None]
        if len(ids) < len(names):
            missing = ", ".join(f"'{name}'" for name in names if token_id(name) is None)
            raise DataError(
                f"the tokenizer has no token {missing} for data.fill_in_the_middle: "
                "add it to data.tokenizer.reserved_tokens, or name the tokens that it has"
            )
        self.prefix_id, self.middle_id, self.suffix_id = ids

    def split(self, text: str, digest: int, seed: int) -> list[str | int] | None:
        """The pieces of text, some perhaps empty, and the token ids between them.

        None if the document stays as it is.

        A pure function of its arguments. Both cuts are uniform over the places between characters,
        the text's ends among them (section 3). Texts of less than three characters stay.

        Args:
            digest: a hash of the document.
        """
        # Only random() is the same in every version of Python.
        draw = random.Random(digest ^ seed).random
        is_chosen = draw() < self.config.rate
        is_spm = draw() < self.config.spm_rate
        if not is_chosen or len(text) < MIN_CHARACTERS:
            return None
        start, stop = sorted(int(draw() * (len(text) + 1)) for _ in range(2))
        prefix = text[:start]
        middle = text[start:stop]
        suffix = text[stop:]
        if is_spm:
            # Their variant 2, which keeps prefix and middle together, so that training on PSM helps
            # SPM (section 3, appendix D).
            return [self.prefix_id, self.suffix_id, suffix, self.middle_id, prefix + middle]
        return [self.prefix_id, prefix, self.suffix_id, suffix, self.middle_id, middle]
