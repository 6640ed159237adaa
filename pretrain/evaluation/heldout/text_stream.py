"""Text from tokens as they come: only whole characters, and no beginning of a stop string."""

from __future__ import annotations

from collections.abc import Callable, Sequence

REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
# A character has at most four bytes, so at most three of an unfinished one; some decoders replace
# each of them.
UNFINISHED_BYTES = 3


class TextStream:
    """What tokens add to a text, piece by piece.

    Args:
        decode: the text of token ids.
        stop: strings that end the text; they do not belong to it.

    Attributes:
        text: all pieces so far.
        stopped: whether a stop string came.
    """

    def __init__(self, decode: Callable[[list[int]], str], stop: Sequence[str] = ()) -> None:
        self.decode = decode
        self.stop = [string for string in stop if string]
        self.text = ""
        self.stopped = False
        self._ids: list[int] = []
        # Decoders look at the token before (some strip a leading space), so the last whole piece is
        # decoded once more with what follows it.
        self._context = self._whole = 0
        self._given, self._held = 0, ""

    def push(self, token: int) -> str:
        """The new piece, which may be empty."""
        self._ids.append(token)
        decoded = self.decode(self._ids[self._context :])
        tail = min(len(decoded) - len(decoded.rstrip(REPLACEMENT)), UNFINISHED_BYTES)
        stable = decoded[: len(decoded) - tail]
        new = stable[self._given :]
        self._given = max(self._given, len(stable))
        if not tail:
            self._context, self._whole = self._whole, len(self._ids)
            self._given = len(self.decode(self._ids[self._context :]))
        return self._release(new, is_last=False)

    def finish(self) -> str:
        """What was held back; no token follows."""
        return self._release(self.decode(self._ids[self._context :])[self._given :], is_last=True)

    def _release(self, new: str, is_last: bool) -> str:
        if self.stopped:
            return ""
        self._held += new
        found = [place for string in self.stop if (place := self._held.find(string)) >= 0]
        self.stopped = bool(found)
        end = min(found) if found else len(self._held) - (0 if is_last else self._possible_stop())
        piece = self._held[:end]
        self._held = self._held[end:]
        self.text += piece
        return piece

    def _possible_stop(self) -> int:
        """Length of the longest end of what is held that a stop string could begin with."""
        ends = (self._held[start:] for start in range(len(self._held)))
        return next(
            (len(end) for end in ends if any(string.startswith(end) for string in self.stop)), 0
        )
