"""Multi-head latent attention: transformers' numbers, one answer in every form, and the cache that it is for.

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
from torch.utils.flop_counter import FlopCounterMode
from transformers import DeepseekV3Config
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3Attention, DeepseekV3RotaryEmbedding

from pretrain.config.attention_schema import MultiHeadLatentAttention as LatentConfig
from pretrain.config.errors import ConfigError
from pretrain.config.load import load_recipe
from pretrain.evaluation.generation import Sampling, generate, native_next_logits
from pretrain.evaluation.speculative import NativeDrafting, generate_with_drafts
from pretrain.export.targets import choose_target
from pretrain.model.attention import sdpa
from pretrain.model.attention.mask import AttentionMask
from pretrain.model.attention.mla import MultiHeadLatentAttention
from pretrain.model.attention.scores import Scores
from pretrain.model.decoder import DecoderLM
from pretrain.model.sizes import activation_bytes, cache_bytes, model_size
from tests.model.tiny_model import random_tensor, random_tokens, tiny_config, tiny_model

B, S, D, N = 2, 16, 32, 4
Q, C, R, H, V = 16, 12, 4, 8, 6  # ranks of the latents, then the numbers of a head: turned, not turned, of a value
SIZES = {"num_attention_heads": N, "q_lora_rank": Q, "kv_lora_rank": C, "qk_rope_head_dim": R, "qk_nope_head_dim": H, "v_head_dim": V}
DENSE = ("model.moe=null", "model.layer_pattern.kind=all_dense", "model.intermediate_size=24")
YARN = {"factor": 40.0, "original_max_position_embeddings": 16, "beta_fast": 32.0, "beta_slow": 1.0}
POSITIONS = {
    "rope": "{kind: rope}",
    "yarn": "{kind: yarn, factor: 40, original_max_position_embeddings: 16, mscale: 0.7, mscale_all_dim: 1.0}",
    "alibi": "{kind: alibi}",
    "rope_alibi": "{kind: rope_alibi}",
    "learned": "{kind: learned}",
    "none": "{kind: none}",
}
OPTIONS = {
    "plain": "",
    "no_query_latent": "q_lora_rank: null",
    "biases": "bias: all, sinks: true",
    "wide_values": "v_head_dim: 14",
    "window": "sliding_window: 5, full_attention_every: 2, sinks: true",
}


def latent(options: str = "", decode: str = "absorbed") -> str:
    """The override that chooses this attention."""
    fields = {name: str(value) for name, value in SIZES.items()} | {"decode": decode}
    fields |= dict(item.split(": ") for item in options.split(", ") if item)
    return "model.attention={kind: mla, " + ", ".join(f"{name}: {value}" for name, value in fields.items()) + "}"


def build(options: str = "", position: str = "rope", *overrides: str, decode: str = "absorbed") -> DecoderLM:
    """A dense model whose biases and sinks are not zero, and whose norms are not one, so that they show."""
    model = tiny_model(*DENSE, latent(options, decode), f"model.position={POSITIONS[position]}", *overrides)
    for index, (name, parameter) in enumerate(model.named_parameters()):
        if name.endswith((".bias", ".sinks")):
            parameter.data = random_tensor(*parameter.shape, seed=index).detach()
        if name.endswith("a_norm.weight"):
            parameter.data = 1 + 0.3 * random_tensor(*parameter.shape, seed=index).detach()
    return model.eval()


def layer_of(model: DecoderLM, layer: int = 0) -> MultiHeadLatentAttention:
    attention = model.layers[layer].attention
    assert isinstance(attention, MultiHeadLatentAttention)
    return attention


@torch.no_grad()
def decode(model: DecoderLM, input_ids_BS: torch.Tensor, parts: list[int]) -> torch.Tensor:
    """Logits of all tokens, some at a time, through the cache."""
    cache = model.new_cache(input_ids_BS.shape[0], input_ids_BS.shape[1], "cpu", torch.float32)
    return torch.cat([model.logits(part, cache=cache) for part in input_ids_BS.split(parts, dim=1)], dim=1)


def difference(one: torch.Tensor, other: torch.Tensor) -> float:
    return float((one - other).abs().max())


# --- transformers ----------------------------------------------------------------------------------------------------------------

THEIRS = {"q_a_norm": "q_a_layernorm", "kv_a_proj": "kv_a_proj_with_mqa", "kv_a_norm": "kv_a_layernorm"}


def rows_interleaved(name: str, weight: torch.Tensor) -> torch.Tensor:
    """The turned rows of a projection in DeepSeek's own order, in which the two numbers of a pair are neighbours."""
    if name.startswith(("q_b_proj", "q_proj")):
        heads = weight.view(N, H + R, *weight.shape[1:])
        turned = heads[:, H:].unflatten(1, (2, R // 2)).transpose(1, 2).flatten(1, 2)
        return torch.cat((heads[:, :H], turned), dim=1).reshape(weight.shape)
    if name.startswith("kv_a_proj"):
        return torch.cat((weight[:C], weight[C:].unflatten(0, (2, R // 2)).transpose(0, 1).flatten(0, 1)))
    return weight


def transformers_output(ours: MultiHeadLatentAttention, x_BSD: torch.Tensor, yarn: dict[str, float], interleaved: bool) -> torch.Tensor:
    """What transformers' attention makes of the same weights."""
    bias, rope = ours.config.bias == "all", {"rope_theta": 10000.0, "rope_type": "yarn" if yarn else "default"} | yarn
    sizes = {name: getattr(ours.config, name) for name in SIZES}
    config = DeepseekV3Config(
        hidden_size=D, num_key_value_heads=N, **sizes, attention_bias=bias, rope_interleave=interleaved, rope_parameters=rope,
        max_position_embeddings=640 if yarn else 64, attn_implementation="eager",
    )  # fmt: skip
    theirs = DeepseekV3Attention(config, 0).eval()
    weights = {}
    for name, weight in ours.state_dict().items():
        module, _, kind = name.partition(".")
        weights[f"{THEIRS.get(module, module)}.{kind}"] = rows_interleaved(name, weight) if interleaved else weight
    theirs.load_state_dict(weights)
    mask = torch.full((x_BSD.shape[1],) * 2, float("-inf")).triu(1)[None, None]
    tables = DeepseekV3RotaryEmbedding(config)(x_BSD, torch.arange(x_BSD.shape[1])[None])
    output: torch.Tensor = theirs(x_BSD, tables, mask)[0]
    return output


@pytest.mark.parametrize("options", ["", "q_lora_rank: null", "bias: all", "v_head_dim: 12"])
@pytest.mark.parametrize("scaling", [None, (), (1.0, 1.0), (0.707, 0.707), (1.0, 0.5)])
@torch.no_grad()
def test_it_computes_what_transformers_deepseek_v3_computes(options: str, scaling: tuple[float, float] | tuple[()] | None) -> None:
    """Without YaRN, with its own scale, and with DeepSeek's: (mscale, mscale_all_dim)."""
    yarn = {} if scaling is None else YARN | dict(zip(("mscale", "mscale_all_dim"), scaling))
    position = "{kind: rope}" if scaling is None else "{kind: yarn, " + ", ".join(f"{name}: {value}" for name, value in yarn.items()) + "}"
    model, x_BSD = build(options, "rope", f"model.position={position}"), random_tensor(B, S, D).detach()
    ours, terms = layer_of(model), model.position.terms(torch.arange(S))
    expected = transformers_output(ours, x_BSD, yarn, interleaved=False)
    assert difference(ours(x_BSD, terms, AttentionMask()), expected) < 1e-5 < 0.1 < expected.abs().max()
    assert difference(transformers_output(ours, x_BSD, yarn, interleaved=True), expected) < 1e-5  # its own order of rows
    if scaling == (1.0, 1.0):
        assert terms.score_factor == pytest.approx((0.1 * math.log(40) + 1) ** 2)
        assert difference(ours(x_BSD, terms._replace(score_factor=1.0), AttentionMask()), expected) > 1e-3


@torch.no_grad()
def test_the_latents_have_an_rms_norm_where_llm720_has_a_layer_norm(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x_BSD = build(), random_tensor(B, S, D).detach()
    ours, terms = layer_of(model), model.position.terms(torch.arange(S))
    expected = transformers_output(ours, x_BSD, {}, interleaved=False)
    assert difference(ours(x_BSD, terms, AttentionMask()), expected) < 1e-5
    monkeypatch.setattr(type(ours.kv_a_norm), "forward", lambda self, x: functional.layer_norm(x, self.weight.shape, self.weight, None, self.eps))
    assert difference(ours(x_BSD, terms, AttentionMask()), expected) > 1e-2


# --- one answer in every form ------------------------------------------------------------------------------------------------------


def count_absorbed(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The queries of each call of the absorbed form."""
    calls: list[int] = []
    absorbed = MultiHeadLatentAttention._absorbed

    def counted(self: MultiHeadLatentAttention, q: torch.Tensor, latents: torch.Tensor, scores: Scores) -> torch.Tensor:
        calls.append(q.shape[2])
        return absorbed(self, q, latents, scores)

    monkeypatch.setattr(MultiHeadLatentAttention, "_absorbed", counted)
    return calls


@pytest.mark.parametrize("position", POSITIONS)
@pytest.mark.parametrize("options", OPTIONS)
@torch.no_grad()
def test_absorbed_and_plain_decoding_equal_the_full_forward_pass(monkeypatch: pytest.MonkeyPatch, options: str, position: str) -> None:
    input_ids_BS, calls = random_tokens(B, S), count_absorbed(monkeypatch)
    for form in ("absorbed", "plain"):
        model = build(OPTIONS[options], position, decode=form)
        expected = model.logits(input_ids_BS)
        for parts in ([1] * S, [5, 1, 1, 6, 3]):
            calls.clear()
            torch.testing.assert_close(decode(model, input_ids_BS, parts), expected, atol=1e-4, rtol=1e-4)
            assert (1 in calls) == (form == "absorbed")


@torch.no_grad()
def test_prompts_and_chunks_may_be_absorbed_as_well(monkeypatch: pytest.MonkeyPatch) -> None:
    """The choice is one of speed alone."""
    monkeypatch.setattr(MultiHeadLatentAttention, "_absorbing_is_cheaper", lambda self, S, U: True)
    input_ids_BS, calls = random_tokens(B, S), count_absorbed(monkeypatch)
    for options in OPTIONS.values():
        model = build(options, "rope_alibi")
        torch.testing.assert_close(decode(model, input_ids_BS, [7, 6, 3]), model.logits(input_ids_BS), atol=1e-4, rtol=1e-4)
    assert set(calls) == {7, 6, 3}


@pytest.mark.parametrize("kernel", ["reference", "flex"])
@pytest.mark.parametrize("options", ["plain", "window"])
@torch.no_grad()
def test_other_kernels_compute_the_same(kernel: str, options: str) -> None:
    input_ids_BS = random_tokens(B, S)
    expected = build(OPTIONS[options], "rope_alibi").logits(input_ids_BS)
    model = build(OPTIONS[options], "rope_alibi", f"model.attention.kernel={kernel}")
    torch.testing.assert_close(model.logits(input_ids_BS), expected, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(decode(model, input_ids_BS, [9, 5, 1, 1]), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("options", OPTIONS)
def test_training_through_sdpa_equals_training_through_the_definition(options: str) -> None:
    gradients = []
    for kernel in ("sdpa", "reference"):
        model = build(OPTIONS[options], "yarn", f"model.attention.kernel={kernel}")
        document_ids_BS = (torch.arange(S) >= 11).long().expand(B, S)
        model(random_tokens(B, S), random_tokens(B, S, seed=1), float(B * S), document_ids_BS).loss.backward()
        gradients.append({name: parameter.grad for name, parameter in model.named_parameters()})
    for name, gradient in gradients[1].items():
        assert gradient is not None and gradient.abs().max() > 0, name
        torch.testing.assert_close(gradients[0][name], gradient, atol=2e-5, rtol=1e-3, msg=name)


@pytest.mark.parametrize("position", POSITIONS)
@torch.no_grad()
def test_packed_documents_equal_separate_ones(position: str) -> None:
    model, input_ids_BS, lengths = build(OPTIONS["window"], position), random_tokens(B, S), [6, 1, 9]
    document_ids_BS = torch.repeat_interleave(torch.arange(3), torch.tensor(lengths)).expand(B, S)
    position_ids_BS = torch.cat([torch.arange(length) for length in lengths]).expand(B, S)
    separate = torch.cat([model.logits(part) for part in input_ids_BS.split(lengths, dim=1)], dim=1)
    torch.testing.assert_close(model.logits(input_ids_BS, document_ids_BS, position_ids_BS=position_ids_BS), separate, atol=1e-5, rtol=1e-5)
    assert difference(model.logits(input_ids_BS, position_ids_BS=position_ids_BS), separate) > 1e-3


@torch.no_grad()
def test_all_heads_share_one_turned_key() -> None:
    """Only the R numbers behind the latent know where a key stands: a latent is the same at every place."""
    model, x_BSD = build(), random_tensor(1, 1, D).detach()
    ours = layer_of(model)
    first, later = (ours._latents(x_BSD, model.position.terms(torch.tensor([place])))[0, 0, 0] for place in (0, 5))
    assert torch.equal(first[:C], later[:C]) and first.shape == (C + R,)
    assert difference(first[C:], later[C:]) > 1e-2
    assert first[C:].norm() == pytest.approx(later[C:].norm().item(), rel=1e-5)


# --- llm720's mistakes -------------------------------------------------------------------------------------------------------------


@pytest.fixture
def decoded() -> Callable[[], float]:
    """How far decoding token by token is from the full forward pass."""
    model, input_ids_BS = build(), random_tokens(B, S)
    expected = model.logits(input_ids_BS).detach()
    return lambda: difference(decode(model, input_ids_BS, [4] + [1] * (S - 4)), expected)


def test_decoding_has_the_scale_of_training_where_llm720_takes_the_width_of_the_latent(
    monkeypatch: pytest.MonkeyPatch, decoded: Callable[[], float]
) -> None:
    """It multiplies with (kv_lora_rank + rope)^-0.5, the width of the absorbed queries, instead of (nope + rope)^-0.5."""
    assert decoded() < 1e-4
    absorbed = MultiHeadLatentAttention._absorbed

    def llm720(self: MultiHeadLatentAttention, q: torch.Tensor, latents: torch.Tensor, scores: Scores) -> torch.Tensor:
        return absorbed(self, q, latents, replace(scores, scale=(C + R) ** -0.5))

    monkeypatch.setattr(MultiHeadLatentAttention, "_absorbed", llm720)
    assert decoded() > 1e-2


def test_a_new_token_sees_the_whole_cache_where_llm720s_sees_its_first_key(monkeypatch: pytest.MonkeyPatch, decoded: Callable[[], float]) -> None:
    """It asks for a causal mask with a single query, which is counted from the beginning of the cache."""
    assert decoded() < 1e-4
    attend = sdpa.functional.scaled_dot_product_attention

    def llm720(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, is_causal: bool, **others: object) -> torch.Tensor:
        single = k.shape[1] == 1  # the absorbed form: heads stand as queries of one key head
        return attend(q, k[:, :, :1], v[:, :, :1], **others) if single else attend(q, k, v, is_causal=is_causal, **others)

    monkeypatch.setattr(sdpa.functional, "scaled_dot_product_attention", llm720)
    assert decoded() > 1e-2


def train_a_step(model: DecoderLM) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    model(random_tokens(B, S), random_tokens(B, S, seed=1), float(B * S)).loss.backward()
    optimizer.step()


def test_decoding_after_a_training_step_has_its_weights_where_llm720_keeps_the_old_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    """It keeps W_UK and W_UV of its first decoding for ever."""
    input_ids_BS, parts, model = random_tokens(B, S), [4] + [1] * (S - 4), build()
    old = {id(layer_of(model, layer)): copy.deepcopy(layer_of(model, layer).kv_b_proj) for layer in range(2)}
    before = decode(model, input_ids_BS, parts)
    train_a_step(model)
    expected = model.logits(input_ids_BS).detach()
    assert difference(expected, before) > 1e-2
    torch.testing.assert_close(decode(model, input_ids_BS, parts), expected, atol=1e-4, rtol=1e-4)
    absorbed = MultiHeadLatentAttention._absorbed

    def llm720(self: MultiHeadLatentAttention, q: torch.Tensor, latents: torch.Tensor, scores: Scores) -> torch.Tensor:
        current: nn.Module = self.kv_b_proj
        self.kv_b_proj = old[id(self)]
        answer = absorbed(self, q, latents, scores)
        self.kv_b_proj = current  # type: ignore[assignment]
        return answer

    monkeypatch.setattr(MultiHeadLatentAttention, "_absorbed", llm720)
    assert difference(decode(model, input_ids_BS, parts), expected) > 1e-3


# --- what it costs -----------------------------------------------------------------------------------------------------------------


def products(attention: MultiHeadLatentAttention, S: int, offset: int, form: str) -> int:
    """FLOPs of the matrix products of one form, as they are run, on the meta device."""
    q = torch.empty(1, N, S, H + R, device="meta")
    latents = torch.empty(1, 1, offset + S, C + R, device="meta")
    with FlopCounterMode(display=False) as counter:
        getattr(attention, form)(q, latents, Scores(AttentionMask(offset), 1.0))
    return int(counter.get_total_flops())


def test_the_form_that_multiplies_less_is_chosen() -> None:
    with torch.device("meta"):
        attention = DecoderLM(tiny_config(*DENSE, latent(), "model.attention.kernel=reference")).layers[0].attention
    assert isinstance(attention, MultiHeadLatentAttention)
    attention.kernel = build("kernel: reference").layers[0].attention.kernel  # on the meta device every kernel is sdpa
    chosen = set()
    for tokens, offset in ((1, 0), (1, 1), (1, 30), (3, 5), (8, 100), (9, 1), (40, 0), (40, 8), (40, 400)):
        absorbed, plain = (products(attention, tokens, offset, form) for form in ("_absorbed", "_plain"))
        assert attention._absorbing_is_cheaper(tokens, offset + tokens) == (absorbed < plain), (tokens, offset)
        chosen.add(absorbed < plain)
    assert chosen == {True, False}


def test_deepseek_v3_absorbs_steps_and_short_chunks() -> None:
    recipe = load_recipe("deepseek_v3", ["model.num_hidden_layers=4"])
    with torch.device("meta"):
        attention = DecoderLM(recipe.model, ep_size=256).layers[0].attention
    assert isinstance(attention, MultiHeadLatentAttention)
    cheaper = attention._absorbing_is_cheaper
    assert cheaper(1, 2) and cheaper(2, 4096) and cheaper(128, 4096)
    assert not cheaper(1, 1) and not cheaper(4096, 4096) and not cheaper(256, 4096)


def measured_cache(model: DecoderLM, tokens: int, dtype: torch.dtype) -> int:
    """Bytes of all tensors of a cache."""
    layers = model.new_cache(1, tokens, "cpu", dtype).layers
    return sum(tensor.numel() * tensor.element_size() for layer in layers for tensor in vars(layer).values())


def test_the_cache_keeps_a_latent_and_a_key_a_token_where_grouped_queries_keep_all_key_heads() -> None:
    ours, grouped = (
        build(),
        tiny_model(*DENSE, f"model.attention={{kind: gqa, num_attention_heads: {N}, num_key_value_heads: {N}, head_dim: {H + R}}}"),
    )
    for model, numbers in ((ours, C + R), (grouped, 2 * N * (H + R))):
        assert measured_cache(model, 50, torch.bfloat16) == cache_bytes(model.config, 50, 2) == 2 * 50 * numbers * 2
        assert model.config.attention.cached_per_token == numbers
    cache = ours.new_cache(B, S, "cpu", torch.float32)
    with torch.no_grad():
        ours.logits(random_tokens(B, 5), cache=cache)
    assert [layer.latents[:, :, :5].any().item() and not layer.latents[:, :, 5:].any() for layer in cache.layers] == [True, True]


def test_deepseek_v3_caches_70_kb_a_token_and_its_heads_would_be_57_times_as_much() -> None:
    model = load_recipe("deepseek_v3").model
    assert cache_bytes(model, 1, 2) == 61 * (512 + 64) * 2 == 70_272
    all_heads = model.attention.score_dim + model.attention.value_dim
    assert round(all_heads / model.attention.cached_per_token) == 71
    assert round(2 * model.attention.value_dim / model.attention.cached_per_token) == 57  # multi-head attention with heads of 128


@pytest.mark.parametrize("options", ["", "q_lora_rank: null", "bias: all, sinks: true"])
def test_parameters_and_flops_by_hand(options: str) -> None:
    size = model_size(tiny_config(*DENSE, latent(options)), S)
    queries = D * N * (H + R) if "null" in options else D * Q + Q * N * (H + R)
    matrices = queries + D * (C + R) + C * N * (H + V) + N * V * D
    vectors = C + (0 if "null" in options else Q) + (Q + C + R + D + N if "bias" in options else 0)
    assert size.components["attention"] == 2 * (matrices + vectors)
    scores_and_values = N * (H + R + V) * (1 + S) / 2
    assert size.flops_per_token == 6 * (2 * (matrices + 3 * D * 24 + scores_and_values) + 100 * D)


def test_training_keeps_keys_and_values_of_all_heads() -> None:
    """What is cached is small, what is trained is not."""
    train = load_recipe("debug").train
    wide, narrow = (activation_bytes(tiny_config(*DENSE, latent(f"qk_nope_head_dim: {size}")), train, "fp32") for size in (16, 8))
    tokens, layers, width = train.micro_batch_size * train.sequence_length, 2, 4
    assert wide - narrow == layers * tokens * width * 2 * 2 * N * 8  # queries and keys, each before and after its rotation


# --- the rest of the project -------------------------------------------------------------------------------------------------------


def test_weights_start_with_the_spread_the_recipe_says() -> None:
    attention = layer_of(tiny_model(*DENSE, latent("kv_lora_rank: 96"), "model.initializer_range=0.02", "model.hidden_size=256"))
    for name, parameter in attention.named_parameters():
        if "norm" in name:
            assert torch.equal(parameter, torch.ones_like(parameter))
        else:
            expected = 0.02 / math.sqrt(2 * 2) if name == "o_proj.weight" else 0.02
            assert parameter.std().item() == pytest.approx(expected, rel=0.06), name


def test_drafts_of_multi_token_prediction_change_no_greedy_token() -> None:
    model = tiny_model(*DENSE, latent(), "model.multi_token_prediction={}", "model.initializer_range=0.1").eval()
    prompt, greedy = random_tokens(1, 9)[0].tolist(), Sampling(greedy=True)
    plain = generate(native_next_logits(model, 50, torch.device("cpu")), prompt, greedy, -1, range(40))
    drafted, counts = generate_with_drafts(NativeDrafting(model, 50, torch.device("cpu")), prompt, greedy, -1, range(40))
    assert drafted == plain and counts.drafted > 0 and len(set(plain)) > 3


@pytest.mark.parametrize(
    ("overrides", "part"),
    [
        (["model.attention.kernel=flash"], "kernel=flash cannot compute values_of_another_width: use reference or sdpa or flex"),
        (
            ["model.attention.kernel=flash", "model.attention.v_head_dim=12", "model.attention.kv_lora_rank=256"],
            "cannot compute heads_wider_than_256",
        ),
        (["model.attention.qk_rope_head_dim=3"], "model.attention.qk_rope_head_dim (3) must be even"),
        (["model.attention.qk_norm=full"], "unknown field 'model.attention.qk_norm'"),
        (["model.attention.kv_lora_rank=null"], "'model.attention.kv_lora_rank'"),
    ],
)
def test_what_it_cannot_be_is_refused(overrides: list[str], part: str) -> None:
    load_recipe("debug", [latent(), "train.precision=bf16"])
    with pytest.raises(ConfigError) as caught:
        load_recipe("debug", [latent(), "train.precision=bf16", *overrides])
    assert part in str(caught.value)


def test_flash_takes_values_as_wide_as_keys_where_they_are_not_absorbed() -> None:
    wide = ["train.precision=bf16", "model.attention.kernel=flash", f"model.attention.v_head_dim={H + R}"]
    assert isinstance(load_recipe("debug", [latent(), *wide]).model.attention, LatentConfig)
    load_recipe("debug", [latent(), *wide, "model.attention.kv_lora_rank=512", "model.attention.decode=plain"])


def test_an_export_without_it_is_refused() -> None:
    with pytest.raises(ConfigError, match="model.attention is of kind mla, and the architecture's is gqa"):
        choose_target(load_recipe("debug", [latent()]))
