"""A checkpoint of this project as a model of lm-evaluation-harness.

It returns the same values as the harness's own class does for the model's export. Importing lm_eval
takes long: this file is imported only if tasks are run.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from tqdm import tqdm

from pretrain.core.errors import ConfigError
from pretrain.evaluation.generation.generators import NativeGenerator
from pretrain.evaluation.generation.sampling import Sampling
from pretrain.evaluation.generation.writing import Writer

# The texts themselves, the context's tokens, and those of the continuation.
Request = tuple[tuple[str, str] | None, list[int], list[int]]
MAX_NEW_TOKENS = 256


class NativeHarnessModel(TemplateLM):
    """Scores continuations and writes texts with the KV cache.

    Args:
        batch_size: requests at once.
    """

    def __init__(self, opened: NativeGenerator, batch_size: int) -> None:
        super().__init__()
        self.opened = opened
        self.batch_size = batch_size
        self.max_length = opened.max_positions

    @property
    def eot_token_id(self) -> int:
        """The token that ends a document."""
        return self.opened.eod_id

    @property
    def prefix_token_id(self) -> int:
        """What a text without context begins with: what stood before documents in training."""
        tokenizer = self.opened.tokenizer
        return cast(int, tokenizer.bos_id) if tokenizer.prepend_bos else self.opened.eod_id

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **_: Any
    ) -> list[int]:
        """Token ids, after the token that began documents in training, if there was one.

        Without it if ``add_special_tokens`` is false.
        """
        starts_document = self.opened.tokenizer.prepend_bos and add_special_tokens is not False
        return [self.prefix_token_id] * starts_document + self.opened.encode(string)

    def loglikelihood_rolling(
        self, requests: Sequence[Instance], disable_tqdm: bool = False
    ) -> list[float]:
        """log p of whole texts in disjoint windows; the first starts with a prefix token."""
        windows: list[Request] = []
        owners: list[int] = []
        for number, request in enumerate(requests):
            rolling = get_rolling_token_windows(
                self.tok_encode(request.args[0]),
                self.prefix_token_id,
                self.max_length,
                context_len=1,
            )
            parts = [make_disjoint_window(window) for window in rolling]
            windows += [(None, *part) for part in parts]
            owners += [number] * len(parts)
        totals = [0.0] * len(requests)
        for owner, (log_prob, _) in zip(
            owners, self._loglikelihood_tokens(windows, disable_tqdm=disable_tqdm), strict=True
        ):
            totals[owner] += log_prob
        return totals

    @torch.inference_mode()
    def _loglikelihood_tokens(
        self, requests: list[Request], disable_tqdm: bool = False, **_: Any
    ) -> list[tuple[float, bool]]:
        """log p of each continuation, and whether each of its tokens was the likeliest.

        What is too long loses tokens at its left.
        """
        scores: list[tuple[float, bool]] = [(0.0, False)] * len(requests)
        # Longest first: texts of a batch are about equally long, and if memory is short, the first
        # batch shows it.
        longest_first = sorted(
            range(len(requests)), key=lambda number: -len(requests[number][1] + requests[number][2])
        )
        bar = tqdm(
            total=len(requests), desc="log-likelihoods", unit="request", disable=disable_tqdm
        )
        for first in range(0, len(requests), self.batch_size):
            chosen = longest_first[first : first + self.batch_size]
            inputs = [
                (requests[number][1] + requests[number][2])[-(self.max_length + 1) :][:-1]
                for number in chosen
            ]
            # Padded at the right: with causal attention no earlier token sees it.
            longest = max(map(len, inputs))
            ids_BS = torch.tensor(
                [ids + [0] * (longest - len(ids)) for ids in inputs], device=self.opened.device
            )
            logits_BSV = self.opened.model.logits(ids_BS)
            for number, ids, logits_SV in zip(chosen, inputs, logits_BSV, strict=True):
                # Logits at the token before the continuation predict its first one: the inputs lack
                # the last token, so that the slice ends with the inputs.
                continuation_C = torch.tensor(requests[number][2], device=self.opened.device)
                logits_CV = logits_SV[len(ids) - len(continuation_C) : len(ids)]
                log_probs_C1 = logits_CV.log_softmax(dim=-1).gather(1, continuation_C[:, None])
                scores[number] = (
                    float(log_probs_C1.sum()),
                    bool((logits_CV.argmax(dim=-1) == continuation_C).all()),
                )
            bar.update(len(chosen))
        bar.close()
        return scores

    def generate_until(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[str]:
        """Continuations of contexts; requests with the same settings are written together."""
        texts = [""] * len(requests)
        settings: dict[str, list[int]] = {}
        for number, request in enumerate(requests):
            settings.setdefault(repr(sorted(request.args[1].items())), []).append(number)
        bar = tqdm(total=len(requests), desc="texts", unit="request", disable=disable_tqdm)
        for numbers in settings.values():
            options = normalize_gen_kwargs(requests[numbers[0]].args[1], MAX_NEW_TOKENS)
            writer = self._writer(dict(options))
            encoded = {
                number: self._context(requests[number].args[0], writer.max_new_tokens)
                for number in numbers
            }
            by_length = sorted(numbers, key=lambda number: -len(encoded[number]))
            for first in range(0, len(by_length), self.batch_size):
                chosen = by_length[first : first + self.batch_size]
                for number, text in zip(
                    chosen,
                    writer.write_batch([encoded[number] for number in chosen], first),
                    strict=True,
                ):
                    texts[number] = text.text
                bar.update(len(chosen))
        bar.close()
        return texts

    def _writer(self, options: Mapping[str, Any]) -> Writer:
        """A writer with the sampling that a task asks for."""
        max_new_tokens = int(options["max_gen_toks"])
        if max_new_tokens >= self.max_length:
            raise ConfigError(
                f"a task asks for {max_new_tokens} new tokens (max_gen_toks), the model has"
                f" {self.max_length} positions: lower it"
            )
        # Tasks write 0, or leave a field out, to mean "off".
        sampled = bool(options.get("do_sample"))
        sampling = Sampling(
            temperature=(options.get("temperature") or 1.0) if sampled else 1.0,
            top_k=options.get("top_k") or None,
            top_p=options.get("top_p") or None,
            min_p=options.get("min_p"),
            repetition_penalty=options.get("repetition_penalty") or 1.0,
            greedy=not sampled,
        )
        return Writer(
            self.opened,
            sampling,
            max_new_tokens,
            handle_stop_sequences(options.get("until"), eos=None),
        )

    def _context(self, text: str, max_new_tokens: int) -> list[int]:
        ids = self.tok_encode(text)[-(self.max_length - max_new_tokens) :]
        return ids or [self.prefix_token_id]
