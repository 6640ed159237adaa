from __future__ import annotations

import pytest
import torch
from torch import Tensor

from pretrain.config.load import load_recipe
from pretrain.core.errors import ConfigError
from pretrain.evaluation.generation.generate import generate, native_next_logits
from pretrain.evaluation.generation.sampling import Sampling
from pretrain.model.decoder import DecoderLM

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def model() -> DecoderLM:
    """A model that is sharp enough for greedy choices to be clear."""
    torch.manual_seed(0)
    decoder = DecoderLM(load_recipe("debug", ["model.vocab_size=100"]).model)
    with torch.no_grad():
        for parameter in decoder.parameters():
            parameter.normal_(0, 0.3) if parameter.dim() > 1 else parameter.fill_(1.0)
    return decoder.eval()


def full_forward_logits(model: DecoderLM):
    seen: list[int] = []

    @torch.inference_mode()
    def next_logits(added_BS: Tensor) -> Tensor:
        seen.extend(added_BS[0].tolist())
        return model.logits(torch.tensor([seen]))[:, -1]

    return next_logits


def test_greedy_decoding_with_the_cache_equals_greedy_decoding_by_full_forward_passes(
    model: DecoderLM,
) -> None:
    prompt, greedy = [3, 1, 4, 1, 5], Sampling(greedy=True)
    cached = generate(
        native_next_logits(model, 45, CPU), prompt, greedy, eod_id=-1, steps=range(40)
    )
    assert cached == generate(
        full_forward_logits(model), prompt, greedy, eod_id=-1, steps=range(40)
    )
    assert len(set(cached)) > 3


def test_the_cache_comparison_notices_a_cache_that_forgets(model: DecoderLM) -> None:
    """The same comparison, with a model that sees only the newest token at every step."""

    @torch.inference_mode()
    def forgetful(added_BS: Tensor) -> Tensor:
        return model.logits(added_BS[:, -1:])[:, -1]

    prompt, greedy = [3, 1, 4, 1, 5], Sampling(greedy=True)
    assert generate(forgetful, prompt, greedy, -1, range(40)) != generate(
        full_forward_logits(model), prompt, greedy, -1, range(40)
    )


def test_the_same_seed_writes_the_same_text_and_another_seed_another(model: DecoderLM) -> None:
    def text(seed: int) -> list[int]:
        return generate(
            native_next_logits(model, 21, CPU),
            [7],
            Sampling(temperature=1.5, seed=seed),
            -1,
            range(20),
        )

    assert text(1) == text(1)
    assert text(1) != text(2)


def test_padding_of_the_vocabulary_is_never_written(model: DecoderLM) -> None:
    assert model.config.padded_vocab_size > 100
    hot = Sampling(temperature=1000.0)
    assert max(generate(native_next_logits(model, 201, CPU), [7], hot, -1, range(200))) < 100


def test_generation_stops_behind_the_end_of_a_document() -> None:
    def counting(added_BS: Tensor) -> Tensor:
        return torch.nn.functional.one_hot(added_BS[:, -1] + 1, 10).float()

    assert generate(counting, [2], Sampling(greedy=True), eod_id=5, steps=range(100)) == [3, 4, 5]


def test_more_tokens_than_positions_are_refused(model: DecoderLM) -> None:
    with pytest.raises(ConfigError, match="256 positions"):
        native_next_logits(model, 257, CPU)


def test_an_empty_prompt_is_refused(model: DecoderLM) -> None:
    with pytest.raises(ConfigError, match="no tokens"):
        generate(native_next_logits(model, 8, CPU), [], Sampling(), 0, range(4))
