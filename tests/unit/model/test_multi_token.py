"""The block that predicts the token after the next: its labels, its loss, what it may see, and that
it joins everything else.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch.nn import functional

from pretrain.checkpoint.weights import load_state_dict
from pretrain.model.attention.mask import AttentionMask
from pretrain.model.decoder import DecoderLM, TrainOutput
from pretrain.model.loss import IGNORED_LABEL
from pretrain.model.multi_token import shifted_by_one
from pretrain.optim.param_groups import parameter_role
from tests.support.tiny_checkpoint import write_model
from tests.support.tiny_model import KINDS, RECOMPUTATIONS, random_tokens, tiny_config, tiny_model

MULTI_TOKEN = "model.multi_token_prediction={loss_weight: 0.3}"
DENSE = ("model.moe=null", "model.layer_pattern.kind=all_dense", "model.intermediate_size=48")
NO_ROUTER_LOSS = ("model.moe.aux_loss_weight=0", "model.moe.z_loss_weight=0")
OTHER_PARTS = (
    "model.embedding_size=16",
    "model.tie_word_embeddings=true",
    "model.norm={kind: layer_norm}",
)
B, S, K = 2, 16, 2
NORMALIZER = float(B * S)
N = IGNORED_LABEL


def step(
    model: DecoderLM,
    labels_BS: torch.Tensor | None = None,
    documents_BS: torch.Tensor | None = None,
) -> TrainOutput:
    tokens = random_tokens(B, S + 1)
    return model(
        tokens[:, :-1], tokens[:, 1:] if labels_BS is None else labels_BS, NORMALIZER, documents_BS
    )


def hand_written_nll(
    model: DecoderLM,
    inputs_S: torch.Tensor,
    labels_S: torch.Tensor,
    documents_S: torch.Tensor | None,
) -> torch.Tensor:
    """Eq. 21 to 24 one position at a time, from the decoder's hidden states of one sequence.

    For each i whose next two tokens have labels.
    """
    ids = None if documents_S is None else documents_S[None]
    hidden_SD = model.hidden(inputs_S[None], ids)[0]
    next_S = torch.cat((inputs_S[1:], labels_S[-1:].clamp_min(0)))
    rows = [
        model.multi_token.projection(
            torch.cat(
                (model.multi_token.hidden_norm(hidden), model.multi_token.embedding_norm(embedded))
            )
        )
        for hidden, embedded in zip(hidden_SD, model.embedding(next_S[None])[0])
    ]
    block_SD = model.multi_token.block(
        torch.stack(rows)[None],
        model.position.terms(torch.arange(len(rows))),
        AttentionMask(document_ids_BS=ids),
    )[0]
    logits_SV = model.project(block_SD)[0]
    nll = torch.zeros(())
    for i in range(len(rows) - 1):
        if labels_S[i] != N and labels_S[i + 1] != N:
            nll = nll - logits_SV[i].log_softmax(0)[labels_S[i + 1]]
    return nll


def test_labels_shift_by_one_inside_documents() -> None:
    # Documents 5 6 7 | 8 9 | 1 and two of padding; each last token of a document has no label.
    inputs_BS, labels_BS = (
        torch.tensor([[5, 6, 7, 8, 9, 1, 0, 0]]),
        torch.tensor([[6, 7, N, 9, N, N, N, N]]),
    )
    next_BS, after_BS = shifted_by_one(inputs_BS, labels_BS)
    assert next_BS.tolist() == [[6, 7, 8, 9, 1, 0, 0, 0]]
    assert after_BS.tolist() == [[7, N, N, N, N, N, N, N]]


def test_the_last_token_knows_its_next_and_has_no_label() -> None:
    next_BS, after_BS = shifted_by_one(torch.tensor([[5, 6, 7]]), torch.tensor([[6, 7, 8]]))
    assert next_BS.tolist() == [[6, 7, 8]] and after_BS.tolist() == [[7, 8, N]]


@torch.no_grad()
@pytest.mark.parametrize("documents", [False, True])
@pytest.mark.parametrize(
    "overrides",
    [DENSE, NO_ROUTER_LOSS, (*DENSE, *OTHER_PARTS)],
    ids=["dense", "dropless", "other parts"],
)
def test_the_loss_is_that_of_the_equations(overrides: tuple[str, ...], documents: bool) -> None:
    model, tokens = tiny_model(MULTI_TOKEN, *overrides), random_tokens(B, S + 1)
    inputs_BS, labels_BS = tokens[:, :-1], tokens[:, 1:].clone()
    documents_BS = None
    if documents:
        documents_BS = (torch.arange(S) >= torch.tensor([[5], [9]])).long()
        labels_BS[0, 4] = labels_BS[1, 8] = N
    output = model(inputs_BS, labels_BS, NORMALIZER, documents_BS)
    expected = sum(
        hand_written_nll(
            model,
            inputs_BS[row],
            labels_BS[row],
            None if documents_BS is None else documents_BS[row],
        )
        for row in range(B)
    )
    torch.testing.assert_close(output.multi_token_nll, expected, rtol=1e-6, atol=0)
    torch.testing.assert_close(
        output.loss, (output.nll + 0.3 * expected) / NORMALIZER, rtol=1e-6, atol=0
    )
    wrong = hand_written_nll(model, inputs_BS[0], labels_BS[0].roll(-1), None) + hand_written_nll(
        model, inputs_BS[1], labels_BS[1].roll(-1), None
    )
    assert abs(float(wrong - expected)) > 1.0


def test_the_next_token_loss_is_the_same_bits_with_and_without_it() -> None:
    with_it, without = tiny_model(MULTI_TOKEN), tiny_model()
    assert torch.equal(step(with_it).nll, step(without).nll)
    assert step(without).multi_token_nll is None
    assert step(with_it).loss > step(without).loss


def test_outside_training_only_the_next_token_is_scored() -> None:
    model = tiny_model(MULTI_TOKEN)
    trained = step(model)
    evaluated = step(model.eval())
    assert evaluated.multi_token_nll is None and torch.equal(evaluated.nll, trained.nll)
    assert evaluated.router is not None and evaluated.router.counts_LE.shape[0] == 2


@pytest.mark.parametrize("kind", KINDS)
def test_its_router_is_one_more_layer(kind: str) -> None:
    model = tiny_model(MULTI_TOKEN, KINDS[kind])
    output = step(model)
    assert (
        output.router is not None
        and model.config.moe_layers == [0, 1]
        and model.config.routed_layers == [0, 1, 2]
    )
    assert output.router.counts_LE.sum(dim=1).tolist() == [B * S * K] * 3
    fractions_LE = output.router.counts_LE / (B * S)
    tokens = random_tokens(B, S + 1)
    again = model(tokens[:, :-1], tokens[:, 1:], NORMALIZER, fractions_LE=fractions_LE)
    torch.testing.assert_close(again.router.losses_LJ, output.router.losses_LJ)
    other = model(
        tokens[:, :-1], tokens[:, 1:], NORMALIZER, fractions_LE=fractions_LE + torch.eye(4)[:3]
    )
    assert ((other.router.losses_LJ[:, 0] - output.router.losses_LJ[:, 0]).abs() > 0.1).all()


def test_it_is_of_the_last_layer_s_kind() -> None:
    mixed = ("model.intermediate_size=48", "model.num_hidden_layers=3", MULTI_TOKEN)
    for pattern, moe in (("{kind: every_nth, n: 2}", False), ("{kind: first_k_dense, k: 2}", True)):
        config = tiny_config(*mixed, f"model.layer_pattern={pattern}")
        model = tiny_model(*mixed, f"model.layer_pattern={pattern}")
        assert (
            model.multi_token.block.is_moe
            == moe
            == (len(config.routed_layers) > len(config.moe_layers))
        )
        output = step(model)
        assert output.router is not None and output.router.counts_LE.shape[0] == len(
            config.routed_layers
        )
    assert tiny_config(*DENSE, MULTI_TOKEN).routed_layers == []


def test_gradients_of_its_loss_alone_reach_trunk_embedding_and_head() -> None:
    gradients = []
    for weight in (0.3, 1.3):  # the gradients' difference is that of the block's own loss
        model = tiny_model(
            f"model.multi_token_prediction={{loss_weight: {weight}}}", *NO_ROUTER_LOSS
        )
        step(model).loss.backward()
        gradients.append({name: parameter.grad for name, parameter in model.named_parameters()})
    assert any(name.startswith("multi_token.") for name in gradients[0])
    for name, gradient in gradients[1].items():
        assert (gradient - gradients[0][name]).abs().max() > 1e-6, name


def predictions(model: DecoderLM, tokens_S: torch.Tensor) -> torch.Tensor:
    """Logits [S - 1, V] of the tokens after the next at every place whose next token is known."""
    hidden_BSD = model.hidden(tokens_S[None, :-1])
    return model.draft_logits(
        hidden_BSD,
        tokens_S[None, 1:],
        model.new_draft_cache(1, len(tokens_S), "cpu", torch.float32),
    )[0]


@pytest.mark.parametrize("overrides", [(), (KINDS["deepspeed"],)], ids=["dropless", "deepspeed"])
@torch.no_grad()
def test_no_prediction_sees_beyond_the_next_token(overrides: tuple[str, ...]) -> None:
    model, tokens_S = tiny_model(MULTI_TOKEN, *overrides).eval(), random_tokens(1, S)[0]
    before = predictions(model, tokens_S)
    for changed in (3, S - 1):
        other_S = tokens_S.clone()
        other_S[changed] = (other_S[changed] + 1) % 100
        moved = (predictions(model, other_S) - before).abs().amax(dim=1) > 1e-4
        assert moved.tolist() == [place >= changed - 1 for place in range(S - 1)]


@pytest.mark.parametrize(
    "overrides",
    [(KINDS["dropless"],), (KINDS["deepspeed"],), DENSE],
    ids=["dropless", "deepspeed", "dense"],
)
def test_recomputed_it_gives_the_same_bits(overrides: tuple[str, ...]) -> None:
    runs = []
    for recompute in RECOMPUTATIONS:
        model = tiny_model(MULTI_TOKEN, *overrides, activation_checkpointing=recompute)
        output = step(model)
        output.loss.backward()
        runs.append(
            (output, {name: parameter.grad for name, parameter in model.named_parameters()})
        )
    kept, kept_gradients = runs[0]
    for recomputed, gradients in runs[1:]:
        assert torch.equal(kept.loss, recomputed.loss) and torch.equal(
            kept.multi_token_nll, recomputed.multi_token_nll
        )
        for name, gradient in gradients.items():
            assert torch.equal(gradient, kept_gradients[name]), name


@pytest.mark.parametrize("kind", KINDS)
def test_its_weights_are_saved_and_read_back(kind: str, tmp_path: Path) -> None:
    model, other = (
        tiny_model(MULTI_TOKEN, KINDS[kind]),
        tiny_model(MULTI_TOKEN, KINDS[kind], seed=2),
    )
    write_model(tmp_path, model)
    weights = load_state_dict(tmp_path)
    own = [name for name in weights if name.startswith("multi_token.")]
    assert len(own) >= 14 and weights.keys() == model.state_dict().keys()
    other.load_state_dict(weights)
    assert torch.equal(step(other).loss, step(model).loss)


def test_both_kinds_of_layer_start_with_the_same_block() -> None:
    losses = [step(tiny_model(MULTI_TOKEN, KINDS[kind])).multi_token_nll for kind in KINDS]
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-6, atol=0)


def test_its_parameters_have_the_roles_of_their_kinds() -> None:
    roles = {
        name: parameter_role(name, parameter, tiny_config(MULTI_TOKEN))
        for name, parameter in tiny_model(MULTI_TOKEN).named_parameters()
        if "multi_token" in name
    }
    assert roles["multi_token.projection.weight"] == "matrix"
    assert (
        roles["multi_token.hidden_norm.weight"]
        == roles["multi_token.embedding_norm.weight"]
        == "vector"
    )
    assert roles["multi_token.block.feed_forward.router.gate.weight"] == "router"


POSITIONS = {kind: (f"model.position={{kind: {kind}}}",) for kind in ("alibi", "learned", "none")}


@pytest.mark.parametrize(
    "overrides", [(), OTHER_PARTS, *POSITIONS.values()], ids=["plain", "other parts", *POSITIONS]
)
@torch.no_grad()
def test_with_its_cache_it_predicts_the_same(overrides: tuple[str, ...]) -> None:
    model, tokens_S = tiny_model(MULTI_TOKEN, *overrides).eval(), random_tokens(1, S)[0]
    whole = predictions(model, tokens_S)
    cache, draft_cache = (
        model.new_cache(1, S, "cpu", torch.float32),
        model.new_draft_cache(1, S, "cpu", torch.float32),
    )
    parts = []
    for start, end in ((0, 6), (6, 8), (8, 9), (9, S - 1)):
        hidden_BSD = model.hidden(tokens_S[None, start:end], cache=cache)
        parts.append(
            model.draft_logits(hidden_BSD, tokens_S[None, start + 1 : end + 1], draft_cache)[0]
        )
    torch.testing.assert_close(torch.cat(parts), whole, rtol=1e-4, atol=1e-4)
    assert (
        functional.kl_div(
            whole.log_softmax(-1),
            model.logits(tokens_S[None, 1:])[0].log_softmax(-1),
            log_target=True,
            reduction="batchmean",
        )
        > 0.01
    )
