"""Continues prompts, several at once, and shows a text while it is written."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal

from tqdm import tqdm

from pretrain.evaluation.generation.generate import check_length, continue_prompts, right_aligned
from pretrain.evaluation.generation.generators import TextGenerator
from pretrain.evaluation.generation.sampling import Sampling
from pretrain.evaluation.generation.speculative import DraftCounts, speculate
from pretrain.evaluation.heldout.text_stream import TextStream

Show = Callable[[str], None]


@dataclass
class Continuation:
    """The continuation of a prompt.

    ``text`` is without the stop string or the end-of-document token, which ``new_tokens`` counts.
    """

    text: str = ""
    new_tokens: int = 0
    ended: Literal["end of document", "stop string", "max_new_tokens"] = "max_new_tokens"


@dataclass
class Speed:
    """Tokens and seconds.

    Prefill is for prompts with the first new token of each text, decode for all further new tokens.
    """

    prefill_tokens: int = 0
    prefill_seconds: float = 0.0
    decode_tokens: int = 0
    decode_seconds: float = 0.0

    @property
    def prefill_tokens_per_second(self) -> float:
        """Speed on prompts; 0 if nothing was measured."""
        return self.prefill_tokens / self.prefill_seconds if self.prefill_seconds else 0.0

    @property
    def decode_tokens_per_second(self) -> float:
        """Speed of new tokens; 0 if nothing was measured."""
        return self.decode_tokens / self.decode_seconds if self.decode_seconds else 0.0


@dataclass
class Writer:
    """Writes texts with one model; ``speed`` and ``drafts`` add up over all of them."""

    generator: TextGenerator
    sampling: Sampling
    max_new_tokens: int
    stop: Sequence[str] = ()
    speed: Speed = field(default_factory=Speed)
    drafts: DraftCounts = field(default_factory=DraftCounts)

    def prompt_ids(self, prompt: str) -> list[int]:
        """An empty prompt starts a new document."""
        return self.generator.encode(prompt) or [self.generator.eod_id]

    def write(
        self, prompts: Sequence[str], batch_size: int, progress: bool = True
    ) -> list[Continuation]:
        """A continuation of each prompt, ``batch_size`` at once; text i draws with seed + i.

        Texts do not depend on the batches that they are written in.

        Raises:
            ConfigError: if a prompt and its continuation are longer than the model's longest
                sequence.
        """
        # Checked before the first text is written, which may take long.
        encoded = [self.prompt_ids(prompt) for prompt in prompts]
        check_length(max(map(len, encoded)) + self.max_new_tokens, self.generator.max_positions)
        written: list[Continuation] = []
        with tqdm(total=len(prompts), desc="generating", unit="text", disable=not progress) as bar:
            for first in range(0, len(encoded), batch_size):
                written += self.write_batch(encoded[first : first + batch_size], first)
                bar.update(len(written) - first)
        return written

    def write_batch(
        self, prompts: Sequence[list[int]], first_seed: int = 0, show: Show = lambda _: None
    ) -> list[Continuation]:
        """Texts behind encoded prompts; ``show`` gets each new piece of the first."""
        _, padding = right_aligned(prompts)
        next_logits = self.generator.start(max(map(len, prompts)) + self.max_new_tokens, padding)
        # By the index of the text over all batches, not within this one.
        seeded = Sampling(**(vars(self.sampling) | {"seed": self.sampling.seed + first_seed}))
        return self._consume(continue_prompts(next_logits, prompts, seeded), prompts, show)

    def write_drafted(self, prompt: list[int], show: Show = lambda _: None) -> Continuation:
        """One text by speculative decoding: the same distribution, in fewer passes.

        Raises:
            ConfigError: if the model has nothing that drafts.
        """
        model = self.generator.start_drafting(len(prompt) + self.max_new_tokens)
        steps = ([token] for token in speculate(model, prompt, self.sampling, self.drafts))
        return self._consume(steps, [prompt], show)[0]

    def _consume(
        self, steps: Iterator[list[int]], prompts: Sequence[list[int]], show: Show
    ) -> list[Continuation]:
        """Takes a token of each text a step, until all texts have ended."""
        streams = [TextStream(self.generator.decode, self.stop) for _ in prompts]
        texts = [Continuation() for _ in prompts]
        open_texts = set(range(len(prompts)))
        started = time.perf_counter()
        for step in range(self.max_new_tokens):
            tokens = next(steps)
            if step == 0:
                self.speed.prefill_tokens += sum(map(len, prompts))
                self.speed.prefill_seconds += time.perf_counter() - started
                started = time.perf_counter()
            else:
                # Texts that have ended are still computed, but their tokens are thrown away.
                self.speed.decode_tokens += len(open_texts)
            for row in sorted(open_texts):
                texts[row].new_tokens += 1
                # A chat model may have several tokens that end a text.
                if tokens[row] in self.generator.end_ids:
                    texts[row].ended = "end of document"
                    open_texts.discard(row)
                    continue
                piece = streams[row].push(tokens[row])
                if row == 0:
                    show(piece)
                if streams[row].stopped:
                    texts[row].ended = "stop string"
                    open_texts.discard(row)
            if not open_texts:
                break
        self.speed.decode_seconds += time.perf_counter() - started
        for row, stream in enumerate(streams):
            # What was held back because it could have been the beginning of a stop string.
            piece = stream.finish()
            if row == 0:
                show(piece)
            texts[row].text = stream.text
        return texts
