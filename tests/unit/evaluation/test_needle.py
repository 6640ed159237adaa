"""Needles are scored like models whose recall is known: perfect, forgetful and blind ones."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence

import numpy as np
import pytest
import torch
from torch import Tensor

from data_pipeline.shards.token_stream import TokenStream
from data_pipeline.tokenizer.tokenizer import Tokenizer
from pretrain.core.errors import ConfigError, DataError, NonFiniteError
from pretrain.evaluation.generation.generate import generate
from pretrain.evaluation.generation.generators import NativeGenerator, TextGenerator
from pretrain.evaluation.generation.sampling import Sampling
from pretrain.evaluation.heldout.text import TokensInMemory
from pretrain.evaluation.needle.contexts import (
    Context,
    Haystack,
    encode_needle,
    make_haystack,
)
from pretrain.evaluation.needle.corpus import (
    END,
    FILLER_WORDS,
    Documents,
    documents,
    tokenizer_json,
)
from pretrain.evaluation.needle.forms import FORMS, PAIR_KEYS, needle_form
from pretrain.evaluation.needle.score import (
    NeedleOptions,
    Scores,
    score_contexts,
    score_haystack,
)
from tests.support.tiny_model import tiny_model

CPU = torch.device("cpu")
LENGTHS, DEPTHS = (32, 64, 128), (0.0, 0.5, 1.0)
SURE = 30.0  # a logit that leaves all other tokens a probability of e^-30


def words_tokenizer() -> Tokenizer:
    return Tokenizer(tokenizer_json().encode(), "the corpus' tokenizer")


class Oracle(NativeGenerator):
    """A "model" that is a function of the row of tokens so far: [S] -> logits [V]."""

    def __init__(self, logits_of: Callable[[Tensor], Tensor]) -> None:
        self.tokenizer = words_tokenizer()
        self.logits_of = logits_of
        self.longest = 0

    def start(self, max_tokens: int, padding: Sequence[int] = (0,)) -> Callable[[Tensor], Tensor]:
        rows: list[Tensor] = []
        self.longest = max(self.longest, max_tokens)

        def next_logits(added_BS: Tensor) -> Tensor:
            if rows:
                rows[:] = [torch.cat(pair) for pair in zip(rows, added_BS, strict=True)]
            else:
                rows[:] = [row[missing:] for row, missing in zip(added_BS, padding, strict=True)]
            return torch.stack([self.logits_of(row) for row in rows])

        return next_logits


def recall(within: int) -> Callable[[Tensor], Tensor]:
    """Continues with what followed the last token before, if that was at most so far back."""
    vocabulary = words_tokenizer().vocab_size

    def logits(row_S: Tensor) -> Tensor:
        earlier = (row_S[:-1] == row_S[-1]).nonzero().flatten()
        logits_V = torch.zeros(vocabulary)
        if len(earlier) and len(row_S) - 1 - int(earlier[-1]) <= within:
            logits_V[row_S[int(earlier[-1]) + 1]] = SURE
        return logits_V

    return logits


def filler_stream(tokens: int) -> TokenStream:
    """Filler words alone, in documents of 50."""
    tokenizer = words_tokenizer()
    source = random.Random(3)
    texts = [" ".join(source.choices(FILLER_WORDS, k=50)) for _ in range(tokens // 50 + 1)]
    ended = [np.append(ids, tokenizer.eod_id) for ids in tokenizer.encode(texts)]
    return TokensInMemory(ended, tokenizer.vocab_size)


def haystack_of(opened: TextGenerator, samples: int = 6) -> Haystack:
    around = frozenset({int(words_tokenizer().eod_id or 0)})
    form = needle_form("pairs")
    return make_haystack(opened, form, filler_stream(4000), around, max(LENGTHS), samples, seed=1)


def scores_of(logits_of: Callable[[Tensor], Tensor]) -> Scores:
    opened = Oracle(logits_of)
    return score_haystack(opened, haystack_of(opened), LENGTHS, DEPTHS, None, "oracle")


def test_a_model_of_perfect_recall_finds_every_needle_at_every_depth() -> None:
    scores = scores_of(recall(within=10**6))
    assert list(scores) == ["32", "64", "128"]
    for by_depth in scores.values():
        assert list(by_depth) == ["0", "0.5", "1"]
        for cell in by_depth.values():
            assert cell["contexts"] == 6 and cell["accuracy"] == 1.0
            assert cell["loss"] == pytest.approx(0.0, abs=1e-9)


def test_a_forgetful_model_finds_what_its_reach_holds_and_nothing_else() -> None:
    """The distance from the question to the needle decides, which length and depth give."""
    reach, tokens = 40, 4  # needle of two tokens, question, value
    scores = scores_of(recall(within=reach))
    for length in LENGTHS:
        for depth in DEPTHS:
            room = length - tokens
            distance = room - round(depth * room) + 2
            cell = scores[str(length)][f"{depth:g}"]
            assert cell["accuracy"] == float(distance <= reach), (length, depth, distance)
    found = [cell["accuracy"] for by_depth in scores.values() for cell in by_depth.values()]
    assert 0.0 in found and 1.0 in found


def test_a_blind_model_finds_nothing_and_its_loss_is_that_of_a_guess() -> None:
    vocabulary = words_tokenizer().vocab_size
    scores = scores_of(lambda _: torch.zeros(vocabulary))
    for by_depth in scores.values():
        for cell in by_depth.values():
            assert cell["accuracy"] == 0.0
            assert cell["loss"] == pytest.approx(math.log(vocabulary), rel=1e-6)


def test_logits_that_are_no_numbers_are_an_error() -> None:
    vocabulary = words_tokenizer().vocab_size
    with pytest.raises(NonFiniteError):
        scores_of(lambda _: torch.full((vocabulary,), torch.nan))


def test_a_context_has_its_length_its_needle_at_its_depth_and_no_other_value() -> None:
    opened = Oracle(recall(1))
    haystack = haystack_of(opened)
    question_ids = {tuple(needle.question) for needle in haystack.needles}
    assert len(haystack.needles) == 6 and len(question_ids) > 1
    for length in LENGTHS:
        for depth in DEPTHS:
            for needle, context in zip(
                haystack.needles, haystack.contexts(length, depth), strict=True
            ):
                assert len(context.prompt) + len(context.value) == length
                (key,) = needle.question
                assert context.prompt[-1] == key and context.prompt.count(key) == 2
                before = round(depth * (length - 4))
                assert context.prompt[before : before + 2] == [key, *context.value]
                assert opened.tokenizer.eod_id not in context.prompt
    # The same tokens in a second haystack, others with another seed.
    assert haystack_of(opened) == haystack


def test_the_filler_holds_no_other_needle_of_the_same_key() -> None:
    opened, form = Oracle(recall(1)), needle_form("pairs")
    tokenizer = opened.tokenizer
    crowded = " ".join(f"{key} v1" for key in PAIR_KEYS[:-1])
    stream = TokensInMemory(tokenizer.encode([crowded] * 8), tokenizer.vocab_size)
    haystack = make_haystack(opened, form, stream, frozenset(), 520, 3, seed=0)
    last = tokenizer.token_id(PAIR_KEYS[-1])
    assert [needle.question for needle in haystack.needles] == [[last]] * 3
    full = TokensInMemory(
        tokenizer.encode([crowded + f" {PAIR_KEYS[-1]} v1"] * 8), tokenizer.vocab_size
    )
    with pytest.raises(DataError, match="holds every key"):
        make_haystack(opened, form, full, frozenset(), 520, 1, seed=0)


def test_values_are_scored_as_greedy_texts_and_full_passes_do() -> None:
    """A real model with its cache, prompts and values of several lengths in one batch."""
    model = tiny_model().eval()
    opened = NativeGenerator(model, words_tokenizer(), CPU)
    source = random.Random(0)
    contexts, expected = [], []
    for number, length in enumerate((9, 17, 5, 12, 30)):
        prompt = [source.randrange(100) for _ in range(length)]
        greedy = generate(opened.start(64), prompt, Sampling(greedy=True), -1, range(4))
        # Of the greedy text itself, of a wrong first token, and of a wrong last one.
        value = list(greedy[: 2 + number % 2])
        if number >= 3:
            place = 0 if number == 3 else -1
            value[place] = (value[place] + 1) % 100
        contexts.append(Context(prompt, value))
        with torch.inference_mode():
            log_probs_SV = model.logits(torch.tensor([prompt + value]))[0].log_softmax(dim=-1)
        rows = range(length - 1, length - 1 + len(value))
        nats = -sum(float(log_probs_SV[row, token]) for row, token in zip(rows, value, strict=True))
        expected.append((number < 3, nats))
    for batch_size in (1, 2, 5):
        scored = list(score_contexts(opened, contexts, batch_size))
        assert [exact for exact, _ in scored] == [exact for exact, _ in expected]
        nats_C = [nats for _, nats in scored]
        assert nats_C == pytest.approx([nats for _, nats in expected], rel=1e-5)


def test_a_tokenizer_without_the_words_of_a_form_is_refused() -> None:
    """Unknown words look all alike: a model would "find" every value."""
    opened = Oracle(recall(1))
    with pytest.raises(ConfigError, match="cannot spell the needle 'The magic number of the"):
        encode_needle(opened, FORMS["magic-number"], "amber anchor", "12345")


@pytest.mark.parametrize("length", [1, 3])
def test_a_context_shorter_than_its_needle_is_refused(length: int) -> None:
    with pytest.raises(ConfigError, match=f"leave {length - 1} tokens .* takes 3: give longer"):
        haystack_of(Oracle(recall(1))).contexts(length, 0.5)


def test_a_split_shorter_than_the_longest_context_is_refused() -> None:
    opened = Oracle(recall(1))
    with pytest.raises(DataError, match="the split has 102 tokens, .* needs 101"):
        make_haystack(
            opened,
            needle_form("pairs"),
            filler_stream(60),
            frozenset({int(opened.tokenizer.eod_id or 0)}),
            101,
            1,
            seed=0,
        )


@pytest.mark.parametrize(
    "options,said",
    [
        ({"lengths": [256, 0]}, "--needle has 0"),
        ({"depths": [0.5, 1.5]}, "--depths has 1.5"),
        ({"depths": [math.nan]}, "--depths has nan"),
        ({"form": "pears"}, "--needle-form pears: there are magic-number, pairs"),
    ],
)
def test_options_that_mean_nothing_are_refused(options: dict[str, object], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        NeedleOptions(**options)  # type: ignore[arg-type]


def test_the_default_lengths_halve_the_positions() -> None:
    assert NeedleOptions().sorted_lengths(2048) == [256, 512, 1024, 2048]
    assert NeedleOptions([64, 8, 64]).sorted_lengths(2048) == [8, 64]


# --- the corpus -----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [Documents(256, max_keys=24), Documents(512), Documents(3)])
def test_documents_have_their_length_and_one_value_for_each_key(kind: Documents) -> None:
    tokenizer = words_tokenizer()
    texts = list(documents(kind, 20, seed=5))
    assert texts == list(documents(kind, 20, seed=5)) != list(documents(kind, 20, seed=6))
    for text, ids in zip(texts, tokenizer.encode(texts), strict=True):
        words = text.split(" ")
        # One token is the end of the document, which the data pipeline adds.
        assert len(ids) == len(words) == kind.tokens - 1
        assert tokenizer.decode(ids.tolist()) == text
        pairs = [(word, words[place + 1]) for place, word in enumerate(words) if word in PAIR_KEYS]
        values: dict[str, set[str]] = {}
        for key, value in pairs:
            assert value.startswith("v")
            values.setdefault(key, set()).add(value)
        assert all(len(found) == 1 for found in values.values())
        assert len(values) <= kind.max_keys
        # Most pairs repeat a key whose value was said before.
        assert kind.tokens < 100 or len(pairs) > 1.5 * len(values)
    assert tokenizer.token_id(END) == tokenizer.eod_id == 0
