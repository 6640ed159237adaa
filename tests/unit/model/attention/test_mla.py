"""Multi-head latent attention: transformers' results, and one result in every form.

The tests that name llm720 guard against mistakes that were measured in it.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.nn import functional
from transformers import DeepseekV3Config
from transformers.models.deepseek_v3.modeling_deepseek_v3 import (
    DeepseekV3Attention,
    DeepseekV3RotaryEmbedding,
)

from pretrain.model.attention.kernels import sdpa
from pretrain.model.attention.mask import AttentionMask
from pretrain.model.attention.mla import MultiHeadLatentAttention
from pretrain.model.attention.scores import Scores
from pretrain.model.decoder import DecoderLM
from tests.support.tiny_mla import (
    OPTIONS,
    POSITIONS,
    SIZES,
    YARN,
    B,
    C,
    D,
    H,
    N,
    R,
    S,
    build,
    decode,
    difference,
    layer_of,
)
from tests.support.tiny_model import random_tensor, random_tokens

# --- transformers ---------------------------------------------------------------------------------

THEIRS = {
    "q_a_norm": "q_a_layernorm",
    "kv_a_proj": "kv_a_proj_with_mqa",
    "kv_a_norm": "kv_a_layernorm",
}


def rows_interleaved(name: str, weight: torch.Tensor) -> torch.Tensor:
    """The rotated rows of a projection in DeepSeek's own order, in which the two numbers of a pair
    are neighbours.
    """
    if name.startswith(("q_b_proj", "q_proj")):
        heads = weight.view(N, H + R, *weight.shape[1:])
        turned = heads[:, H:].unflatten(1, (2, R // 2)).transpose(1, 2).flatten(1, 2)
        return torch.cat((heads[:, :H], turned), dim=1).reshape(weight.shape)
    if name.startswith("kv_a_proj"):
        return torch.cat(
            (weight[:C], weight[C:].unflatten(0, (2, R // 2)).transpose(0, 1).flatten(0, 1))
        )
    return weight


def transformers_output(
    ours: MultiHeadLatentAttention, x_BSD: torch.Tensor, yarn: dict[str, float], interleaved: bool
) -> torch.Tensor:
    """What transformers' attention makes of the same weights."""
    bias, rope = (
        ours.config.bias == "all",
        {"rope_theta": 10000.0, "rope_type": "yarn" if yarn else "default"} | yarn,
    )
    sizes = {name: getattr(ours.config, name) for name in SIZES}
    config = DeepseekV3Config(
        hidden_size=D, num_key_value_heads=N, **sizes, attention_bias=bias,
        rope_interleave=interleaved, rope_parameters=rope,
        max_position_embeddings=640 if yarn else 64, attn_implementation="eager",
    )  # fmt: skip
    theirs = DeepseekV3Attention(config, 0).eval()
    weights = {}
    for name, weight in ours.state_dict().items():
        module, _, kind = name.partition(".")
        weights[f"{THEIRS.get(module, module)}.{kind}"] = (
            rows_interleaved(name, weight) if interleaved else weight
        )
    theirs.load_state_dict(weights)
    mask = torch.full((x_BSD.shape[1],) * 2, float("-inf")).triu(1)[None, None]
    tables = DeepseekV3RotaryEmbedding(config)(x_BSD, torch.arange(x_BSD.shape[1])[None])
    output: torch.Tensor = theirs(x_BSD, tables, mask)[0]
    return output


@pytest.mark.parametrize("options", ["", "q_lora_rank: null", "bias: all", "v_head_dim: 12"])
@pytest.mark.parametrize("scaling", [None, (), (1.0, 1.0), (0.707, 0.707), (1.0, 0.5)])
@torch.no_grad()
def test_it_computes_what_transformers_deepseek_v3_computes(
    options: str, scaling: tuple[float, float] | tuple[()] | None
) -> None:
    """Without YaRN, with its own scale, and with DeepSeek's: (mscale, mscale_all_dim)."""
    yarn = {} if scaling is None else YARN | dict(zip(("mscale", "mscale_all_dim"), scaling))
    position = (
        "{kind: rope}"
        if scaling is None
        else "{kind: yarn, " + ", ".join(f"{name}: {value}" for name, value in yarn.items()) + "}"
    )
    model, x_BSD = (
        build(options, "rope", f"model.position={position}"),
        random_tensor(B, S, D).detach(),
    )
    ours, terms = layer_of(model), model.position.terms(torch.arange(S))
    expected = transformers_output(ours, x_BSD, yarn, interleaved=False)
    assert (
        difference(ours(x_BSD, terms, AttentionMask()), expected)
        < 1e-5
        < 0.1
        < expected.abs().max()
    )
    assert (
        difference(transformers_output(ours, x_BSD, yarn, interleaved=True), expected) < 1e-5
    )  # its own order of rows
    if scaling == (1.0, 1.0):
        assert terms.score_factor == pytest.approx((0.1 * math.log(40) + 1) ** 2)
        assert (
            difference(ours(x_BSD, terms._replace(score_factor=1.0), AttentionMask()), expected)
            > 1e-3
        )


@torch.no_grad()
def test_the_latents_have_an_rms_norm_where_llm720_has_a_layer_norm(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, x_BSD = build(), random_tensor(B, S, D).detach()
    ours, terms = layer_of(model), model.position.terms(torch.arange(S))
    expected = transformers_output(ours, x_BSD, {}, interleaved=False)
    assert difference(ours(x_BSD, terms, AttentionMask()), expected) < 1e-5
    monkeypatch.setattr(
        type(ours.kv_a_norm),
        "forward",
        lambda self, x: functional.layer_norm(x, self.weight.shape, self.weight, None, self.eps),
    )
    assert difference(ours(x_BSD, terms, AttentionMask()), expected) > 1e-2


# --- one result in every form ---------------------------------------------------------------------


def count_absorbed(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The queries of each call of the absorbed form."""
    calls: list[int] = []
    absorbed = MultiHeadLatentAttention._absorbed

    def counted(
        self: MultiHeadLatentAttention, q: torch.Tensor, latents: torch.Tensor, scores: Scores
    ) -> torch.Tensor:
        calls.append(q.shape[2])
        return absorbed(self, q, latents, scores)

    monkeypatch.setattr(MultiHeadLatentAttention, "_absorbed", counted)
    return calls


@pytest.mark.parametrize("position", POSITIONS)
@pytest.mark.parametrize("options", OPTIONS)
@torch.no_grad()
def test_absorbed_and_plain_decoding_equal_the_full_forward_pass(
    monkeypatch: pytest.MonkeyPatch, options: str, position: str
) -> None:
    input_ids_BS, calls = random_tokens(B, S), count_absorbed(monkeypatch)
    for form in ("absorbed", "plain"):
        model = build(OPTIONS[options], position, decode=form)
        expected = model.logits(input_ids_BS)
        for parts in ([1] * S, [5, 1, 1, 6, 3]):
            calls.clear()
            torch.testing.assert_close(
                decode(model, input_ids_BS, parts), expected, atol=1e-4, rtol=1e-4
            )
            assert (1 in calls) == (form == "absorbed")


@torch.no_grad()
def test_prompts_and_chunks_may_be_absorbed_as_well(monkeypatch: pytest.MonkeyPatch) -> None:
    """The choice is one of speed alone."""
    monkeypatch.setattr(MultiHeadLatentAttention, "_absorbing_is_cheaper", lambda self, S, U: True)
    input_ids_BS, calls = random_tokens(B, S), count_absorbed(monkeypatch)
    for options in OPTIONS.values():
        model = build(options, "rope_alibi")
        torch.testing.assert_close(
            decode(model, input_ids_BS, [7, 6, 3]), model.logits(input_ids_BS), atol=1e-4, rtol=1e-4
        )
    assert set(calls) == {7, 6, 3}


@pytest.mark.parametrize("kernel", ["reference", "flex"])
@pytest.mark.parametrize("options", ["plain", "window"])
@torch.no_grad()
def test_other_kernels_compute_the_same(kernel: str, options: str) -> None:
    input_ids_BS = random_tokens(B, S)
    expected = build(OPTIONS[options], "rope_alibi").logits(input_ids_BS)
    model = build(OPTIONS[options], "rope_alibi", f"model.attention.kernel={kernel}")
    torch.testing.assert_close(model.logits(input_ids_BS), expected, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(
        decode(model, input_ids_BS, [9, 5, 1, 1]), expected, atol=1e-4, rtol=1e-4
    )


@pytest.mark.parametrize("options", OPTIONS)
def test_training_through_sdpa_equals_training_through_the_definition(options: str) -> None:
    gradients = []
    for kernel in ("sdpa", "reference"):
        model = build(OPTIONS[options], "yarn", f"model.attention.kernel={kernel}")
        document_ids_BS = (torch.arange(S) >= 11).long().expand(B, S)
        model(
            random_tokens(B, S), random_tokens(B, S, seed=1), float(B * S), document_ids_BS
        ).loss.backward()
        gradients.append({name: parameter.grad for name, parameter in model.named_parameters()})
    for name, gradient in gradients[1].items():
        assert gradient is not None and gradient.abs().max() > 0, name
        torch.testing.assert_close(gradients[0][name], gradient, atol=2e-5, rtol=1e-3, msg=name)


@pytest.mark.parametrize("position", POSITIONS)
@torch.no_grad()
def test_packed_documents_equal_separate_ones(position: str) -> None:
    model, input_ids_BS, lengths = (
        build(OPTIONS["window"], position),
        random_tokens(B, S),
        [6, 1, 9],
    )
    document_ids_BS = torch.repeat_interleave(torch.arange(3), torch.tensor(lengths)).expand(B, S)
    position_ids_BS = torch.cat([torch.arange(length) for length in lengths]).expand(B, S)
    separate = torch.cat([model.logits(part) for part in input_ids_BS.split(lengths, dim=1)], dim=1)
    torch.testing.assert_close(
        model.logits(input_ids_BS, document_ids_BS, position_ids_BS=position_ids_BS),
        separate,
        atol=1e-5,
        rtol=1e-5,
    )
    assert difference(model.logits(input_ids_BS, position_ids_BS=position_ids_BS), separate) > 1e-3


@torch.no_grad()
def test_all_heads_share_one_turned_key() -> None:
    """Only the R elements behind the latent know where a key stands: a latent is the same at every
    place.
    """
    model, x_BSD = build(), random_tensor(1, 1, D).detach()
    ours = layer_of(model)
    first, later = (
        ours._latents(x_BSD, model.position.terms(torch.tensor([place])))[0, 0, 0]
        for place in (0, 5)
    )
    assert torch.equal(first[:C], later[:C]) and first.shape == (C + R,)
    assert difference(first[C:], later[C:]) > 1e-2
    assert first[C:].norm() == pytest.approx(later[C:].norm().item(), rel=1e-5)


# --- llm720's mistakes ----------------------------------------------------------------------------


@pytest.fixture
def decoded() -> Callable[[], float]:
    """How far decoding token by token is from the full forward pass."""
    model, input_ids_BS = build(), random_tokens(B, S)
    expected = model.logits(input_ids_BS).detach()
    return lambda: difference(decode(model, input_ids_BS, [4] + [1] * (S - 4)), expected)


def test_decoding_has_the_scale_of_training_where_llm720_takes_the_width_of_the_latent(
    monkeypatch: pytest.MonkeyPatch, decoded: Callable[[], float]
) -> None:
    """It multiplies with (kv_lora_rank + rope)^-0.5, the width of the absorbed queries, instead of
    (nope + rope)^-0.5.
    """
    assert decoded() < 1e-4
    absorbed = MultiHeadLatentAttention._absorbed

    def llm720(
        self: MultiHeadLatentAttention, q: torch.Tensor, latents: torch.Tensor, scores: Scores
    ) -> torch.Tensor:
        return absorbed(self, q, latents, replace(scores, scale=(C + R) ** -0.5))

    monkeypatch.setattr(MultiHeadLatentAttention, "_absorbed", llm720)
    assert decoded() > 1e-2


def test_a_new_token_sees_the_whole_cache_where_llm720s_sees_its_first_key(
    monkeypatch: pytest.MonkeyPatch, decoded: Callable[[], float]
) -> None:
    """It asks for a causal mask with a single query, which is counted from the beginning of the
    cache.
    """
    assert decoded() < 1e-4
    attend = sdpa.functional.scaled_dot_product_attention

    def llm720(
        q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, is_causal: bool, **others: object
    ) -> torch.Tensor:
        single = k.shape[1] == 1  # the absorbed form: heads stand as queries of one key head
        return (
            attend(q, k[:, :, :1], v[:, :, :1], **others)
            if single
            else attend(q, k, v, is_causal=is_causal, **others)
        )

    monkeypatch.setattr(sdpa.functional, "scaled_dot_product_attention", llm720)
    assert decoded() > 1e-2


def train_a_step(model: DecoderLM) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    model(random_tokens(B, S), random_tokens(B, S, seed=1), float(B * S)).loss.backward()
    optimizer.step()


def test_decoding_after_a_training_step_has_its_weights_where_llm720_keeps_the_old_ones(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It keeps W_UK and W_UV of its first decoding for ever."""
    input_ids_BS, parts, model = random_tokens(B, S), [4] + [1] * (S - 4), build()
    old = {
        id(layer_of(model, layer)): copy.deepcopy(layer_of(model, layer).kv_b_proj)
        for layer in range(2)
    }
    before = decode(model, input_ids_BS, parts)
    train_a_step(model)
    expected = model.logits(input_ids_BS).detach()
    assert difference(expected, before) > 1e-2
    torch.testing.assert_close(decode(model, input_ids_BS, parts), expected, atol=1e-4, rtol=1e-4)
    absorbed = MultiHeadLatentAttention._absorbed

    def llm720(
        self: MultiHeadLatentAttention, q: torch.Tensor, latents: torch.Tensor, scores: Scores
    ) -> torch.Tensor:
        current: nn.Module = self.kv_b_proj
        self.kv_b_proj = old[id(self)]
        answer = absorbed(self, q, latents, scores)
        self.kv_b_proj = current
        return answer

    monkeypatch.setattr(MultiHeadLatentAttention, "_absorbed", llm720)
    assert difference(decode(model, input_ids_BS, parts), expected) > 1e-3
