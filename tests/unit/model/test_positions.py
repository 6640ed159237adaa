"""Each kind of position encoding is its paper's formula, and numerically what transformers computes
where it has the kind.
"""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from transformers import LlamaConfig
from transformers.modeling_rope_utils import _compute_llama3_parameters, _compute_yarn_parameters
from transformers.models.bloom.modeling_bloom import build_alibi_tensor
from transformers.models.deepseek_v3.modeling_deepseek_v3 import yarn_apply_mscale

from pretrain.core.errors import ConfigError
from pretrain.model.attention.kernels.reference import reference_attention
from pretrain.model.attention.kernels.sdpa import sdpa_attention
from pretrain.model.attention.mask import AttentionMask
from pretrain.model.attention.scores import Scores
from pretrain.model.init import initialize
from pretrain.model.positions.alibi import alibi_slopes
from pretrain.model.positions.config import Llama3, Yarn
from pretrain.model.positions.learned import LearnedPosition
from pretrain.model.positions.llama3 import Llama3Position, llama3_frequencies
from pretrain.model.positions.rope import apply_rope, inverse_frequencies, rope_tables
from pretrain.model.positions.yarn import YarnPosition, yarn_frequencies
from pretrain.optim.param_groups import parameter_role
from tests.support.tiny_model import random_tensor, tiny_config, tiny_model

CPU = torch.device("cpu")
H = 8
YARN = "model.position={kind: yarn, factor: 4, original_max_position_embeddings: 32}"


def rope(
    positions: torch.Tensor, rotary_dim: int, theta: float
) -> tuple[torch.Tensor, torch.Tensor]:
    return rope_tables(positions, inverse_frequencies(rotary_dim, theta, CPU))


# --- rope -----------------------------------------------------------------------------------------


def test_rope_turns_each_pair_by_position_times_frequency() -> None:
    theta, positions = 100.0, torch.tensor([0, 3])
    x = random_tensor(1, 1, 2, 4).detach()
    turned = apply_rope(x, rope(positions, 4, theta))
    torch.testing.assert_close(turned[0, 0, 0], x[0, 0, 0])
    for pair, frequency in enumerate((1.0, theta**-0.5)):
        complex_x = complex(x[0, 0, 1, pair], x[0, 0, 1, pair + 2])
        expected = complex_x * complex(math.cos(3 * frequency), math.sin(3 * frequency))
        assert complex(turned[0, 0, 1, pair], turned[0, 0, 1, pair + 2]) == pytest.approx(
            expected, rel=1e-5
        )


def test_rope_makes_scores_depend_on_distance_only() -> None:
    q, k = random_tensor(1, 1, 1, H, seed=1).detach(), random_tensor(1, 1, 1, H, seed=2).detach()

    def score(query: int, key: int) -> float:
        turned_q = apply_rope(q, rope(torch.tensor([query]), H, 10000.0))
        return float((turned_q * apply_rope(k, rope(torch.tensor([key]), H, 10000.0))).sum())

    assert score(5, 2) == pytest.approx(score(105, 102), abs=1e-4)
    assert abs(score(5, 2) - score(5, 3)) > 1e-3


def test_rope_takes_a_place_of_its_own_for_each_token_of_each_sequence() -> None:
    x, positions = random_tensor(2, 3, 4, H).detach(), torch.tensor([[0, 1, 2, 3], [0, 1, 0, 1]])
    together = apply_rope(x, rope(positions, H, 100.0))
    for row in range(2):
        torch.testing.assert_close(
            together[row : row + 1], apply_rope(x[row : row + 1], rope(positions[row], H, 100.0))
        )
    assert (
        together[1, :, 2] - apply_rope(x, rope(torch.arange(4), H, 100.0))[1, :, 2]
    ).abs().max() > 1e-2


# --- llama3 ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rotary_dim", "factor", "low", "high", "original", "theta"),
    [
        (128, 8.0, 1.0, 4.0, 8192, 500000.0),
        (64, 32.0, 1.0, 4.0, 8192, 500000.0),
        (8, 2.0, 0.5, 9.0, 64, 100.0),
    ],
)
def test_llama3_equals_transformers(
    rotary_dim: int, factor: float, low: float, high: float, original: int, theta: float
) -> None:
    fields = {
        "factor": factor,
        "low_freq_factor": low,
        "high_freq_factor": high,
        "rope_theta": theta,
    }
    fields["original_max_position_embeddings"] = original
    parameters = {"rope_type": "llama3", **fields}
    sizes = {"hidden_size": rotary_dim, "num_attention_heads": 1, "head_dim": rotary_dim}
    expected, growth = _compute_llama3_parameters(
        LlamaConfig(**sizes, rope_parameters=parameters), CPU
    )
    ours = llama3_frequencies(Llama3(kind="llama3", **fields), rotary_dim, CPU)
    torch.testing.assert_close(ours, expected, rtol=1e-6, atol=0.0)
    plain = inverse_frequencies(rotary_dim, theta, CPU)
    assert growth == 1.0 and ours[0] == plain[0] and ours[-1] < 0.9 * plain[-1]
    between = (ours > plain / factor * 1.01) & (ours < plain * 0.99)
    assert between.any(), "no pair is between the two ends: the blend is not compared"


def test_llama3_turns_by_its_own_frequencies_and_leaves_scores_alone() -> None:
    position = Llama3Position(
        tiny_config(
            "model.position={kind: llama3, factor: 4, original_max_position_embeddings: 32}"
        )
    )
    terms = position.terms(torch.arange(3))
    expected = rope_tables(torch.arange(3), llama3_frequencies(position.config, H, CPU))
    assert (
        terms.rope is not None
        and all(map(torch.equal, terms.rope, expected))
        and terms.score_factor == 1.0
    )


def test_a_blend_without_a_width_is_refused() -> None:
    with pytest.raises(ConfigError, match="high_freq_factor"):
        tiny_config(
            "model.position={kind: llama3, factor: 4, original_max_position_embeddings: 32,"
            " low_freq_factor: 4}"
        )


# --- yarn -----------------------------------------------------------------------------------------


def transformers_yarn(config: Yarn, rotary_dim: int) -> tuple[torch.Tensor, float]:
    parameters = {"rope_type": "yarn", "rope_theta": config.rope_theta} | {
        name: getattr(config, name)
        for name in (
            "factor",
            "original_max_position_embeddings",
            "beta_fast",
            "beta_slow",
            "attention_factor",
            "truncate",
        )
    }
    longest = int(config.factor * config.original_max_position_embeddings)
    llama = LlamaConfig(
        hidden_size=rotary_dim,
        num_attention_heads=1,
        head_dim=rotary_dim,
        max_position_embeddings=longest,
        rope_parameters=parameters,
    )
    return _compute_yarn_parameters(llama, CPU)


@pytest.mark.parametrize("truncate", [True, False])
@pytest.mark.parametrize(
    ("rotary_dim", "factor", "original", "theta"),
    [
        (64, 4.0, 4096, 10000.0),
        (128, 32.0, 4096, 150000.0),
        (8, 2.5, 64, 500.0),
        (64, 1.0, 2048, 1e6),
    ],
)
@pytest.mark.parametrize("betas", [(32.0, 1.0), (16.0, 2.0)])
def test_yarn_equals_transformers(
    rotary_dim: int,
    factor: float,
    original: int,
    theta: float,
    betas: tuple[float, float],
    truncate: bool,
) -> None:
    config = Yarn(
        kind="yarn", factor=factor, original_max_position_embeddings=original, rope_theta=theta,
        truncate=truncate,
        beta_fast=betas[0], beta_slow=betas[1],
    )  # fmt: skip
    expected, _ = transformers_yarn(config, rotary_dim)
    torch.testing.assert_close(
        yarn_frequencies(config, rotary_dim, CPU), expected, rtol=1e-6, atol=0.0
    )


def test_yarn_is_told_apart_from_plain_interpolation_and_from_the_other_rounding() -> None:
    config = Yarn(kind="yarn", factor=4.0, original_max_position_embeddings=4096)
    plain, stretched = inverse_frequencies(64, 10000.0, CPU), yarn_frequencies(config, 64, CPU)
    assert (
        stretched[0] == plain[0] and stretched[-1] == plain[-1] / 4
    )  # fast pairs are kept, slow ones interpolated
    assert ((stretched < plain * 0.999) & (stretched > plain / 3.999)).any()  # and some are between
    other = yarn_frequencies(config.model_copy(update={"truncate": False}), 64, CPU)
    assert (other / stretched - 1).abs().max() > 1e-2


@pytest.mark.parametrize("given", [None, 1.0, 1.5])
def test_yarn_scales_queries_and_keys_by_the_attention_factor(given: float | None) -> None:
    position = YarnPosition(
        tiny_config(YARN[:-1] + (f", attention_factor: {given}}}" if given else "}"))
    )
    _, factor = transformers_yarn(position.config, H)
    assert factor == pytest.approx(given or 0.1 * math.log(4) + 1)
    tables = position.terms(torch.arange(3)).rope
    assert tables is not None
    torch.testing.assert_close(
        tables[0].square() + tables[1].square(), torch.full((3, H // 2), factor**2)
    )


@pytest.mark.parametrize(("mscale", "of_all"), [(1.0, 1.0), (0.707, 0.707), (1.0, 0.5)])
def test_yarns_two_scales_are_those_of_transformers_deepseek(mscale: float, of_all: float) -> None:
    """Tables grow by the ratio of the two growths, all scores by the square of the second."""
    position = YarnPosition(
        tiny_config(YARN[:-1] + f", mscale: {mscale}, mscale_all_dim: {of_all}}}")
    )
    growth = 0.1 * of_all * math.log(4) + 1
    terms = position.terms(torch.arange(3))
    assert terms.rope is not None and terms.score_factor == pytest.approx(growth**2)
    assert terms.rope[0][0, 0] == pytest.approx((0.1 * mscale * math.log(4) + 1) / growth)
    scaled = {"rope_type": "yarn", "factor": 4.0, "mscale": mscale, "mscale_all_dim": of_all}
    assert terms.score_factor == pytest.approx(yarn_apply_mscale(scaled, 1.0))
    plain = YarnPosition(tiny_config(YARN)).terms(torch.arange(3))
    assert plain.score_factor == 1.0


@torch.no_grad()
def test_every_kind_of_attention_has_yarns_factor_of_all_scores() -> None:
    tokens = torch.arange(12)[None]
    plain, grown = (
        tiny_model(YARN[:-1] + f", {scale}}}")
        for scale in ("attention_factor: 1", "mscale: 1, mscale_all_dim: 1")
    )
    factor = (0.1 * math.log(4) + 1) ** 2
    for block in plain.layers:
        block.attention.q_norm.weight *= factor
    torch.testing.assert_close(plain.logits(tokens), grown.logits(tokens), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("given", "part"),
    [
        ("mscale: 1", "go together"),
        ("mscale: 1, mscale_all_dim: 1, attention_factor: 1", "leave one out"),
    ],
)
def test_yarns_scale_is_said_once(given: str, part: str) -> None:
    with pytest.raises(ConfigError, match=part):
        tiny_config(YARN[:-1] + f", {given}}}")


# --- alibi ----------------------------------------------------------------------------------------


def test_slopes_of_a_power_of_two_are_a_geometric_series() -> None:
    assert alibi_slopes(8, CPU).tolist() == [2.0**-power for power in range(1, 9)]
    assert alibi_slopes(1, CPU).tolist() == [2.0**-8]


@pytest.mark.parametrize("num_heads", [1, 2, 3, 6, 8, 12, 14, 16, 20, 24, 25, 64, 71])
def test_slopes_of_any_number_of_heads_equal_blooms(num_heads: int) -> None:
    bias = build_alibi_tensor(torch.ones(1, 2), num_heads, torch.float32)[
        :, 0
    ]  # slope * key position: what is left after each row's constant
    torch.testing.assert_close(
        alibi_slopes(num_heads, CPU), bias[:, 1] - bias[:, 0], rtol=1e-5, atol=0.0
    )


def test_twelve_heads_have_eight_slopes_and_then_every_second_of_sixteen_where_h64lm_has_one_series() -> (
    None
):
    slopes = alibi_slopes(12, CPU)
    torch.testing.assert_close(
        slopes, 2.0 ** -torch.tensor([1.0, 2, 3, 4, 5, 6, 7, 8, 0.5, 1.5, 2.5, 3.5])
    )
    h64lm = 2.0 ** (-8 / 12 * torch.arange(1, 13))
    assert (slopes - h64lm).abs().max() > 0.1


@pytest.mark.parametrize("kernel", [reference_attention, sdpa_attention])
@torch.no_grad()
def test_alibi_prefers_the_near_where_h64lm_with_its_inverted_sign_prefers_the_far(
    kernel: object,
) -> None:
    """All keys alike: weights then show the bias alone.

    H64LM adds -slope * (key - query), which rewards a key 5 back by 5 slopes.
    """
    assert callable(kernel)
    size, slopes = 6, alibi_slopes(2, CPU)
    q, k, values = (
        torch.ones(1, 2, size, size),
        torch.ones(1, 2, size, size),
        torch.eye(size).expand(1, 2, size, size),
    )
    weights = kernel(q, k, values, Scores(AttentionMask(), 1.0, slopes_N=slopes))[0]
    inverted = kernel(q, k, values, Scores(AttentionMask(), 1.0, slopes_N=-slopes))[0]
    for head, query in itertools.product(range(2), range(1, size)):
        row = weights[head, query, : query + 1]
        assert (row.diff() > 0).all()  # a later key, which is nearer, has more
        torch.testing.assert_close(row.log().diff(), slopes[head].expand(query))  # a slope a token
        assert (inverted[head, query, : query + 1].diff() < 0).all()


# --- learned --------------------------------------------------------------------------------------


def test_learned_positions_are_added_at_each_tokens_place() -> None:
    position = LearnedPosition(tiny_config("model.position.kind=learned"))
    assert position.weight.shape == (256, 32)
    torch.nn.init.normal_(position.weight)
    x, places = random_tensor(2, 3, 32).detach(), torch.tensor([[0, 1, 0], [5, 6, 7]])
    torch.testing.assert_close(position.add(x, torch.arange(4, 7)), x + position.weight[4:7])
    torch.testing.assert_close(
        position.add(x, places),
        torch.stack([x[row] + position.weight[places[row]] for row in range(2)]),
    )


def test_learned_positions_start_normal_are_trained_and_are_embeddings_to_the_optimizer() -> None:
    model = tiny_model("model.position.kind=learned", "model.initializer_range=0.02")
    initialize(model, 3)
    weight = model.position.weight
    assert weight.std().item() == pytest.approx(0.02, rel=0.05) and abs(weight.mean().item()) < 1e-3
    assert [name for name, parameter in model.named_parameters() if parameter is weight] == [
        "position.weight"
    ]
    assert parameter_role("position.weight", weight, model.config) == "embedding"
    ids = torch.arange(6)[None]
    model(ids, ids, 6.0).loss.backward()
    assert (weight.grad[:6].abs().amax(dim=1) > 0).all() and not weight.grad[6:].any()


@pytest.mark.parametrize("kind", ["rope", "alibi", "rope_alibi", "none"])
def test_the_other_kinds_have_no_weights_and_add_nothing(kind: str) -> None:
    position = tiny_model(f"model.position.kind={kind}").position
    x = random_tensor(1, 2, 32).detach()
    assert list(position.parameters()) == [] and torch.equal(position.add(x, torch.arange(2)), x)
    terms = position.terms(torch.arange(2))
    assert (terms.rope is not None) == ("rope" in kind) and (terms.slopes_N is not None) == (
        "alibi" in kind
    )
