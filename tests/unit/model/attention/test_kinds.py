"""What every kind of attention with every kind of position encoding must keep: causality, reach,
documents, and equality with its cache.

The tests that name a published model guard against a mistake that was measured in it.
"""

from __future__ import annotations

import pytest
import torch

from pretrain.model.attention.gqa import GroupedQueryAttention
from pretrain.model.attention.kernels import sdpa
from pretrain.model.attention.mask import AttentionMask
from pretrain.model.attention.scores import Scores
from pretrain.model.config import Recomputation
from pretrain.model.decoder import DecoderLM
from pretrain.model.positions.interface import PositionTerms
from tests.support.tiny_model import random_tensor, random_tokens, tiny_model

B, S, N, LAYERS, WINDOW = 2, 16, 4, 2, 4
DENSE = ("model.moe=null", "model.layer_pattern.kind=all_dense", "model.intermediate_size=24")
ATTENTION = {
    "gqa": "",
    "mha": "num_key_value_heads: 4",
    "mqa": "num_key_value_heads: 1",
    "biases": "bias: qkv, qk_norm: head",
    "all_biases": "bias: all, sinks: true",
    "qk_norm_full": "qk_norm: full",
    "window": f"sliding_window: {WINDOW}",
    "window_sinks": f"sliding_window: {WINDOW}, sinks: true",
    "every_second_full": f"sliding_window: {WINDOW}, full_attention_every: 2",
}
POSITIONS = {
    "rope": "{kind: rope}",
    "yarn": "{kind: yarn, factor: 4, original_max_position_embeddings: 8}",
    "alibi": "{kind: alibi}",
    "rope_alibi": "{kind: rope_alibi}",
    "learned": "{kind: learned}",
    "none": "{kind: none}",
}
FULL = [name for name in ATTENTION if "window" not in name]


def build(
    attention: str, position: str, *overrides: str, activation_checkpointing: Recomputation = "none"
) -> DecoderLM:
    """A dense model whose biases and sinks are not zero, so that they show."""
    section = {"num_attention_heads": str(N), "num_key_value_heads": "2", "head_dim": "8"}
    section |= dict(item.split(": ") for item in ATTENTION[attention].split(", ") if item)
    given = (
        "model.attention={kind: gqa, "
        + ", ".join(f"{name}: {value}" for name, value in section.items())
        + "}"
    )
    model = tiny_model(
        *DENSE,
        given,
        f"model.position={POSITIONS[position]}",
        *overrides,
        activation_checkpointing=activation_checkpointing,
    )
    for index, (name, parameter) in enumerate(model.named_parameters()):
        if name.endswith((".bias", ".sinks")):
            parameter.data = random_tensor(*parameter.shape, seed=index).detach()
    return model.eval()


def decode(model: DecoderLM, input_ids_BS: torch.Tensor, parts: list[int]) -> torch.Tensor:
    """Logits of all tokens, some at a time, through the cache."""
    cache = model.new_cache(input_ids_BS.shape[0], input_ids_BS.shape[1], "cpu", torch.float32)
    return torch.cat(
        [model.logits(part, cache=cache) for part in input_ids_BS.split(parts, dim=1)], dim=1
    )


def difference(one: torch.Tensor, other: torch.Tensor) -> float:
    return float((one - other).abs().max())


pairs = pytest.mark.parametrize(
    ("attention", "position"),
    [(attention, position) for attention in ATTENTION for position in POSITIONS],
)
kinds_of_position = pytest.mark.parametrize("position", POSITIONS)

# --- generation -----------------------------------------------------------------------------------


@pairs
@torch.no_grad()
def test_cached_decoding_equals_the_full_forward_pass(attention: str, position: str) -> None:
    """H64LM's one-token step differs from its full pass by 29.6."""
    model, input_ids_BS = build(attention, position), random_tokens(B, S)
    expected = model.logits(input_ids_BS)
    for parts in ([1] * S, [5, 1, 1, 6, 3]):
        torch.testing.assert_close(
            decode(model, input_ids_BS, parts), expected, atol=1e-4, rtol=1e-4
        )


@pytest.mark.parametrize("kernel", ["reference", "flex"])
@torch.no_grad()
def test_other_kernels_decode_the_same(kernel: str) -> None:
    input_ids_BS = random_tokens(B, S)
    expected = build("window_sinks", "rope_alibi").logits(input_ids_BS)
    model = build("window_sinks", "rope_alibi", f"model.attention.kernel={kernel}")
    torch.testing.assert_close(decode(model, input_ids_BS, [15, 1]), expected, atol=1e-4, rtol=1e-4)


@kinds_of_position
@torch.no_grad()
def test_positions_advance_while_decoding_where_h64lm_gives_each_new_token_position_0(
    position: str,
) -> None:
    model, input_ids_BS = build("gqa", position), random_tokens(B, S)
    expected, cache = model.logits(input_ids_BS), model.new_cache(B, S, "cpu", torch.float32)
    steps = [
        model.logits(token, cache=cache, position_ids_BS=torch.zeros(B, 1, dtype=torch.int64))
        for token in input_ids_BS.split(1, dim=1)
    ]
    found = difference(torch.cat(steps, dim=1), expected)
    # ALiBi counts the keys before a query and NoPE nothing: neither reads a position id.
    assert found < 1e-4 if position in ("alibi", "none") else found > 1e-2


@pytest.mark.parametrize("parts", [[8, 8], [8] + [1] * 8])
@torch.no_grad()
def test_a_new_token_sees_the_whole_cache_where_h64lms_mask_leaves_it_the_first_key(
    monkeypatch: pytest.MonkeyPatch, parts: list[int]
) -> None:
    """The mask of a new token must be counted from the end of the cache, not from its beginning."""
    model, input_ids_BS = build("gqa", "rope"), random_tokens(B, S)
    expected = model.logits(input_ids_BS)
    assert difference(decode(model, input_ids_BS, parts), expected) < 1e-4
    from_the_beginning = sdpa.functional.scaled_dot_product_attention
    monkeypatch.setattr(
        sdpa.functional,
        "scaled_dot_product_attention",
        lambda *tensors, attn_mask, is_causal, **others: from_the_beginning(
            *tensors, is_causal=True, **others
        ),
    )
    assert difference(decode(model, input_ids_BS, parts), expected) > 1e-2


@pytest.mark.parametrize(("attention", "num_heads"), [("mha", 4), ("gqa", 2), ("mqa", 1)])
def test_the_cache_holds_key_heads_once_where_h64lm_repeats_them_for_every_query_head(
    attention: str, num_heads: int
) -> None:
    model = build(attention, "rope")
    for layer in model.new_cache(B, S, "cpu", torch.float32).layers:
        assert layer.keys.shape == layer.values.shape == (B, num_heads, S, 8)
    assert model.config.attention.cached_per_token == 2 * num_heads * 8


# --- causality and reach --------------------------------------------------------------------------


@pairs
@torch.no_grad()
def test_no_logit_sees_a_later_token_where_h64lms_do_without_a_padding_mask(
    attention: str, position: str
) -> None:
    """In H64LM the first token's logits change by 8.9 with the last token."""
    model, input_ids_BS = build(attention, position), random_tokens(B, S)
    changed = input_ids_BS.clone()
    changed[:, -1] = (changed[:, -1] + 1) % 100
    for document_ids_BS in (None, torch.zeros(B, S, dtype=torch.int64)):
        before, after = (
            model.logits(input_ids_BS, document_ids_BS),
            model.logits(changed, document_ids_BS),
        )
        assert difference(before[:, :-1], after[:, :-1]) <= 1e-6
        assert difference(before[:, -1], after[:, -1]) > 1e-3


def seen_by_the_last_token(model: DecoderLM) -> torch.Tensor:
    """How much the last token's logits depend on each token's embedding, [S]."""
    kept: list[torch.Tensor] = []

    def keep(module: torch.nn.Module, args: object, x_BSD: torch.Tensor) -> None:
        x_BSD.retain_grad()
        kept.append(x_BSD)

    handle = model.embedding.register_forward_hook(keep)
    (
        model.logits(random_tokens(1, S))[0, -1] * random_tensor(100, seed=7).detach()
    ).sum().backward()
    handle.remove()
    gradient = kept[0].grad
    assert gradient is not None
    return gradient[0].abs().amax(dim=1)


@kinds_of_position
@pytest.mark.parametrize("attention", FULL)
def test_the_last_token_sees_the_whole_context(attention: str, position: str) -> None:
    assert (seen_by_the_last_token(build(attention, position)) > 1e-7).all()


@kinds_of_position
@pytest.mark.parametrize("attention", ["window", "window_sinks"])
def test_windows_reach_as_far_as_all_layers_together_and_no_further(
    attention: str, position: str
) -> None:
    reach = LAYERS * (WINDOW - 1)
    seen = seen_by_the_last_token(build(attention, position))
    assert (seen[S - 1 - reach :] > 1e-7).all() and not seen[: S - 1 - reach].any()
    assert (
        seen_by_the_last_token(build("every_second_full", position)) > 1e-7
    ).all()  # a full layer sees past every window


def seen_by_heads(attention: GroupedQueryAttention) -> torch.Tensor:
    """How much each head of the last token depends on each token's input, [N, S]."""
    x_BSD = (
        (0.3 * random_tensor(1, S, 32, seed=3)).detach().requires_grad_()
    )  # small: no weight of the softmax vanishes
    kept: list[torch.Tensor] = []
    handle = attention.o_proj.register_forward_pre_hook(lambda module, args: kept.append(args[0]))
    attention(x_BSD, PositionTerms(), AttentionMask())
    handle.remove()
    heads = kept[0][0, -1].view(N, -1).sum(dim=1)
    return torch.stack(
        [
            torch.autograd.grad(head, x_BSD, retain_graph=True)[0][0].abs().amax(dim=1)
            for head in heads
        ]
    )


def test_every_head_of_the_last_token_sees_the_first_where_moe_fast_gpts_see_a_block(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """MoE-fast-GPT (Dellano) views [B, S, N * H] as [B, N, S, H] without a transpose: head n then
    holds the n-th block of the tokens.
    """
    attention = build("mha", "none").layers[0].attention
    assert isinstance(attention, GroupedQueryAttention)
    assert (seen_by_heads(attention) > 1e-7).all()

    def wrong_view(self: GroupedQueryAttention, x_BSX: torch.Tensor, norm: object) -> torch.Tensor:
        return x_BSX.view(x_BSX.shape[0], -1, x_BSX.shape[1], self.config.head_dim)

    monkeypatch.setattr(GroupedQueryAttention, "_heads", wrong_view)
    assert ((seen_by_heads(attention) > 1e-7).sum(dim=1) == S // N).all()


@kinds_of_position
@torch.no_grad()
def test_a_sequence_does_not_depend_on_its_row_of_the_batch(position: str) -> None:
    """Project 828's first run rotated heads by their place in the flattened batch."""
    model, input_ids_BS = build("gqa", position), random_tokens(3, S)
    together = model.logits(input_ids_BS)
    for row in range(3):
        torch.testing.assert_close(
            together[row : row + 1], model.logits(input_ids_BS[row : row + 1]), atol=1e-5, rtol=1e-5
        )


# --- documents ------------------------------------------------------------------------------------


@pytest.mark.parametrize("attention", ["gqa", "window_sinks"])
@kinds_of_position
@torch.no_grad()
def test_packed_documents_equal_separate_ones(attention: str, position: str) -> None:
    model, input_ids_BS, lengths = build(attention, position), random_tokens(B, S), [6, 1, 9]
    document_ids_BS = torch.repeat_interleave(torch.arange(3), torch.tensor(lengths)).expand(B, S)
    position_ids_BS = torch.cat([torch.arange(length) for length in lengths]).expand(B, S)
    separate = torch.cat([model.logits(part) for part in input_ids_BS.split(lengths, dim=1)], dim=1)
    torch.testing.assert_close(
        model.logits(input_ids_BS, document_ids_BS, position_ids_BS=position_ids_BS),
        separate,
        atol=1e-5,
        rtol=1e-5,
    )
    assert (
        difference(model.logits(input_ids_BS, position_ids_BS=position_ids_BS), separate) > 1e-3
    )  # without the mask
    without_reset = difference(model.logits(input_ids_BS, document_ids_BS), separate)
    assert (
        without_reset > 1e-3 if position == "learned" else without_reset < 1e-4
    )  # the other kinds know distances only


# --- training -------------------------------------------------------------------------------------


def loss_and_gradients(model: DecoderLM) -> dict[str, torch.Tensor]:
    document_ids_BS = (torch.arange(S) >= 11).long().expand(B, S)
    output = model(random_tokens(B, S), random_tokens(B, S, seed=1), float(B * S), document_ids_BS)
    output.loss.backward()
    return {"loss": output.loss.detach()} | {
        name: parameter.grad
        for name, parameter in model.named_parameters()
        if parameter.grad is not None
    }


@pytest.mark.parametrize(
    "attention", ["window", "window_sinks", "every_second_full", "all_biases", "qk_norm_full"]
)
@pytest.mark.parametrize("position", ["rope", "rope_alibi", "learned"])
def test_training_through_sdpa_equals_training_through_the_definition(
    attention: str, position: str
) -> None:
    expected = loss_and_gradients(build(attention, position, "model.attention.kernel=reference"))
    found = loss_and_gradients(build(attention, position))
    recomputed = loss_and_gradients(build(attention, position, activation_checkpointing="full"))
    assert found.keys() == expected.keys() == recomputed.keys() and len(expected) > 20
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, atol=2e-5, rtol=1e-3, msg=name)
        assert torch.equal(recomputed[name], found[name]), name


def test_a_window_off_by_one_shows_in_training() -> None:
    right = loss_and_gradients(build("window", "rope"))
    wrong = loss_and_gradients(
        build("window", "rope", f"model.attention.sliding_window={WINDOW + 1}")
    )
    assert difference(right["loss"], wrong["loss"]) > 1e-3


def test_every_bias_norm_and_sink_is_trained() -> None:
    for attention, names in {
        "all_biases": ("q_proj.bias", "o_proj.bias", "sinks"),
        "biases": ("q_norm.weight", "k_norm.weight", "v_proj.bias"),
    }.items():
        gradients = loss_and_gradients(build(attention, "rope"))
        for name in names:
            assert gradients[f"layers.1.attention.{name}"].abs().max() > 0, name
    assert "layers.0.attention.o_proj.bias" not in dict(build("biases", "rope").named_parameters())


@pytest.mark.parametrize("attention", ["gqa", "window_sinks"])
@torch.no_grad()
def test_attention_weights_are_dropped_in_training_only(attention: str) -> None:
    input_ids_BS = random_tokens(B, S)
    plain, dropping = (
        build(attention, "rope"),
        build(attention, "rope", "model.dropout.attention=0.3"),
    )
    assert torch.equal(dropping.logits(input_ids_BS), plain.logits(input_ids_BS))
    dropping.train()
    torch.manual_seed(0)
    first, second = dropping.logits(input_ids_BS), dropping.logits(input_ids_BS)
    assert difference(first, second) > 1e-3 and difference(first, plain.logits(input_ids_BS)) > 1e-3


def test_layers_with_the_same_window_share_one_mask(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[int | None] = []

    def counted(scores: Scores, *others: object) -> torch.Tensor:
        made.append(scores.window)
        return mask(scores, *others)

    mask = sdpa._mask
    monkeypatch.setattr(sdpa, "_mask", counted)
    build("window_sinks", "rope_alibi", "model.num_hidden_layers=6").logits(random_tokens(B, S))
    assert made == [WINDOW]
    build("every_second_full", "rope_alibi", "model.num_hidden_layers=6").logits(
        random_tokens(B, S)
    )
    assert made == [WINDOW, WINDOW, None]
