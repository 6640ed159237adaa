from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from data_pipeline.tokenizer.tokenizer import Tokenizer
from pretrain.checkpoint.validate import open_whole_weights
from pretrain.config.recipe import Recipe
from pretrain.core.errors import CheckpointError, ConfigError
from pretrain.core.shipped import RECIPES
from pretrain.export.folded_embedding import without_factors
from pretrain.export.hf_folder import write_hf_folder
from pretrain.export.parity import (
    check_parity,
    compare_logits,
    load_exported,
    reference_model,
    same_bits,
)
from pretrain.export.targets import architectures, choose_target, representable, targets
from pretrain.export.writer import INDEX, open_exported_weights
from pretrain.model.decoder import DecoderLM
from tests.support.random_checkpoint import (
    TEXT,
    VOCAB_SIZE,
    random_checkpoint,
    recipe_of,
    small_tokenizer,
)

PLAIN = "model.attention.qk_norm=none"
NATIVE = ["model.moe.kind=deepspeed", "model.moe.drop_tokens=false"]
OWN_GATE = [*NATIVE, "model.moe.gate=router"]
YARN = (
    "model.position={kind: yarn, factor: 4, original_max_position_embeddings: 16, truncate: false}"
)
MSCALE = (
    "model.position={kind: yarn, factor: 4, original_max_position_embeddings: 16, mscale: 0.7,"
    " mscale_all_dim: 1.3}"
)
LLAMA3 = (
    "model.position={kind: llama3, factor: 8, original_max_position_embeddings: 32,"
    " low_freq_factor: 1}"
)
THREE = ["model.num_hidden_layers=3", "model.attention.full_attention_every=3"]
SIGMOID = [
    "model.moe.router={kind: sigmoid_topk, norm_topk_prob: false, routed_scaling_factor: 1.7}"
]
DENSE = ["model.layer_pattern.kind=all_dense", "model.intermediate_size=48"]
V2 = "model.moe.router={kind: softmax_topk, norm_topk_prob: false, routed_scaling_factor: 3}"
V2_GROUPS = (
    "model.moe.router={kind: softmax_topk, norm_topk_prob: false, groups: {num_groups: 4,"
    " top_k_groups: 2}}"
)

# What each shipped mini recipe is in transformers; None is for a class of our own.
SMALL_RECIPES = {
    "deepseek_moe_16b_mini": "qwen2_moe",  # its ungated shared experts are folded into gated ones
    "deepseek_v3_mini": "deepseek_v3",
    "fastgpt_moe_mini": None,
    "gpt_oss_20b_mini": "gpt_oss",
    "h64lm_mini": None,
    "h64lm_tied_mini": None,
    "khanh_692m_mini": None,
    "mixtral_8x7b_mini": "mixtral",
    "olmoe_1b_7b_mini": "olmoe",
    "p828_60m_mini": None,
    "p828_800m_mini": None,
    "p828_800m_as_written_mini": None,
    "peer_mla_mini": None,
    "qwen3_30b_a3b_mini": "qwen3_moe",
}
# name: (recipe, overrides, target)
VARIANTS: dict[str, tuple[str, list[str], str]] = {
    "llama: dense, all biases, factorised embedding": (
        "debug",
        [
            PLAIN,
            *DENSE,
            "model.attention.bias=all",
            "model.feed_forward.bias=true",
            "model.embedding_size=16",
        ],
        "llama",
    ),
    "llama: tied factorised embedding": (
        "debug",
        [PLAIN, *DENSE, "model.embedding_size=16", "model.tie_word_embeddings=true"],
        "llama",
    ),
    "llama: Llama 3.1's stretched RoPE": ("debug", [PLAIN, *DENSE, LLAMA3], "llama"),
    "mistral: window, YaRN, tied": (
        "debug",
        [PLAIN, *DENSE, "model.attention.sliding_window=9", YARN, "model.tie_word_embeddings=true"],
        "mistral",
    ),
    "qwen2: windows but in every third layer": (
        "debug",
        [PLAIN, *DENSE, "model.attention.bias=qkv", "model.attention.sliding_window=9", *THREE],
        "qwen2",
    ),
    "qwen2: no window, tied": (
        "debug",
        [PLAIN, *DENSE, "model.attention.bias=qkv", LLAMA3, "model.tie_word_embeddings=true"],
        "qwen2",
    ),
    "qwen3: biases, heads of another width, windows in all layers": (
        "debug",
        [
            *DENSE,
            "model.attention.bias=all",
            "model.attention.head_dim=16",
            "model.attention.sliding_window=9",
        ],
        "qwen3",
    ),
    "mixtral: window, YaRN, tied": (
        "debug",
        [PLAIN, "model.attention.sliding_window=9", YARN, "model.tie_word_embeddings=true"],
        "mixtral",
    ),
    "mixtral: native layer": ("debug", [PLAIN, *OWN_GATE], "mixtral"),
    "qwen3_moe: every second layer dense": (
        "debug",
        [
            "model.layer_pattern={kind: every_nth, n: 2}",
            "model.intermediate_size=48",
            "model.num_hidden_layers=4",
            "model.attention.bias=all",
        ],
        "qwen3_moe",
    ),
    "qwen3_moe: weights not renormalised": (
        "debug",
        ["model.moe.router.norm_topk_prob=false", "model.position.rope_theta=777"],
        "qwen3_moe",
    ),
    "qwen3_moe: head_dim that hidden_size does not give": (
        "debug",
        ["model.attention.head_dim=16", "model.norm.eps=1e-3"],
        "qwen3_moe",
    ),
    "qwen3_moe: DeepSpeed's gate, top 1": (
        "debug",
        [*NATIVE, "model.moe.top_k=1", "model.moe.router.norm_topk_prob=false"],
        "qwen3_moe",
    ),
    "qwen3_moe: DeepSpeed's gate, top 3": ("debug", [*NATIVE, "model.moe.top_k=3"], "qwen3_moe"),
    "qwen2_moe: gated shared expert": (
        "debug",
        [
            PLAIN,
            "model.moe.num_shared_experts=1",
            "model.moe.shared_expert_gate=true",
            "model.attention.bias=qkv",
        ],
        "qwen2_moe",
    ),
    "qwen2_moe: ungated shared experts of the native layer": (
        "debug",
        [
            PLAIN,
            *OWN_GATE,
            "model.moe.num_shared_experts=2",
            "model.moe.shared_intermediate_size=17",
        ],
        "qwen2_moe",
    ),
    "qwen2_moe: no shared expert": (
        "debug",
        [PLAIN, "model.moe.router.norm_topk_prob=false"],
        "qwen2_moe",
    ),
    "olmoe: biases": ("olmoe_1b_7b_mini", ["model.attention.bias=all", *OWN_GATE], "olmoe"),
    "glm4_moe: shared experts, balancing bias, YaRN": (
        "debug",
        [
            *SIGMOID,
            "model.moe.bias_balancing={}",
            "model.attention.bias=qkv",
            "model.moe.num_shared_experts=2",
            YARN,
        ],
        "glm4_moe",
    ),
    "glm4_moe: nothing but a sigmoid router": ("debug", [*SIGMOID, *OWN_GATE, PLAIN], "glm4_moe"),
    "deepseek_v3: no query latent, biases, scaled scores, no shared experts, no groups": (
        "deepseek_v3_mini",
        [
            "model.attention.q_lora_rank=null",
            "model.attention.bias=all",
            MSCALE,
            "model.moe.num_shared_experts=0",
            "model.moe.router.groups=null",
        ],
        "deepseek_v3",
    ),
    "deepseek_v3: multi-token prediction is left out": (
        "deepseek_v3_mini",
        ["model.multi_token_prediction={}"],
        "deepseek_v3",
    ),
    "deepseek_v2: groups": (
        "deepseek_v3_mini",
        [V2_GROUPS, "model.moe.bias_balancing=null"],
        "deepseek_v2",
    ),
    "deepseek_v2: scaled scores and weights": (
        "deepseek_v3_mini",
        [V2, "model.moe.bias_balancing=null", MSCALE],
        "deepseek_v2",
    ),
    "gpt_oss: native layer, plain attention": (
        "gpt_oss_20b_mini",
        [*OWN_GATE, "model.attention.bias=none"],
        "gpt_oss",
    ),
    "gpt_oss: no window": (
        "gpt_oss_20b_mini",
        ["model.attention.sliding_window=null", "model.attention.full_attention_every=null"],
        "gpt_oss",
    ),
}
NATIVES = {
    name: (name, list[str](), target)
    for name, target in SMALL_RECIPES.items()
    if target is not None
} | VARIANTS
# One of each architecture, and what is written in another way than plain renaming.
QUICK = {
    "llama: tied factorised embedding",
    "llama: Llama 3.1's stretched RoPE",
    "mistral: window, YaRN, tied",
    "qwen2: windows but in every third layer",
    "qwen3: biases, heads of another width, windows in all layers",
    "mixtral: window, YaRN, tied",
    "qwen3_moe: every second layer dense",
    "qwen2_moe: ungated shared experts of the native layer",
    "olmoe_1b_7b_mini",
    "glm4_moe: nothing but a sigmoid router",
    "deepseek_v3: no query latent, biases, scaled scores, no shared experts, no groups",
    "deepseek_v2: groups",
    "gpt_oss_20b_mini",
}
QUICK_ROUNDED = {"llama: tied factorised embedding", "gpt_oss_20b_mini"}
CASES = [pytest.param(name, marks=[] if name in QUICK else [pytest.mark.full]) for name in NATIVES]
ROUNDED = [
    pytest.param(name, marks=[] if name in QUICK_ROUNDED else [pytest.mark.full])
    for name in NATIVES
]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return small_tokenizer()


def export(
    folder: Path,
    recipe: Recipe,
    tokenizer: Tokenizer,
    target: str = "auto",
    dtype: torch.dtype = torch.float32,
) -> DecoderLM:
    """Writes ``checkpoint`` and ``hf`` into ``folder``; returns the model that the export is
    rounded from.
    """
    random_checkpoint(folder / "checkpoint", recipe, tokenizer)
    weights = open_whole_weights(folder / "checkpoint", recipe.model)
    model, ours = without_factors(recipe.model, weights)
    (folder / "hf").mkdir()
    write_hf_folder(folder / "hf", choose_target(recipe, target), model, ours, tokenizer, dtype)
    return (
        reference_model(recipe.model, weights, dtype)
        if dtype == torch.float32
        else reference_model(model, ours, dtype)
    )


def greedy(model: DecoderLM, prompt: list[int], count: int) -> list[int]:
    ids = list(prompt)
    with torch.inference_mode():
        for _ in range(count):
            ids.append(int(model.logits(torch.tensor([ids]))[0, -1].argmax()))
    return ids


def test_every_mini_recipe_is_in_the_table_and_its_target_is_the_first_that_is_exact() -> None:
    assert SMALL_RECIPES.keys() == {path.stem for path in RECIPES.glob("*_mini.yaml")}
    for name, expected in SMALL_RECIPES.items():
        exact = [
            target for target, reasons in representable(recipe_of(name)).items() if not reasons
        ]
        assert (
            exact == ["custom"]
            if expected is None
            else exact[0] == expected and exact[-1] == "custom"
        )
    assert (
        choose_target(recipe_of("quickstart")).name
        == choose_target(recipe_of("moe_1b")).name
        == "qwen3_moe"
    )
    assert {target for _, _, target in NATIVES.values()} == {
        target.name for target in architectures()
    }


@pytest.mark.parametrize("case", CASES)
def test_transformers_computes_the_same_logits_and_text(
    case: str, tmp_path: Path, tokenizer: Tokenizer
) -> None:
    name, overrides, target = NATIVES[case]
    recipe = recipe_of(name, *overrides)
    model = export(tmp_path, recipe, tokenizer, target)
    exported = load_exported(tmp_path / "hf")
    assert (
        exported.config.model_type == target
        and exported.config.vocab_size == VOCAB_SIZE
        and model.config.padded_vocab_size == 320
    )
    windows_WS = torch.randint(VOCAB_SIZE, (2, 64))
    parity = compare_logits(model, exported, windows_WS)
    check_parity(parity)
    assert parity.logits_std > 0.5
    exported.generation_config.eos_token_id = exported.config.eos_token_id = None
    prompt = windows_WS[0, :40].tolist()  # longer than the windows of attention
    ids_BS = torch.tensor([prompt])
    text = exported.generate(
        ids_BS, attention_mask=torch.ones_like(ids_BS), max_new_tokens=12, do_sample=False
    )[0].tolist()
    assert text == greedy(model, prompt, 12)
    exported.save_pretrained(tmp_path / "again")
    with torch.inference_mode():
        assert torch.equal(
            load_exported(tmp_path / "again")(windows_WS).logits, exported(windows_WS).logits
        )
    first, again = open_exported_weights(tmp_path / "hf"), open_exported_weights(tmp_path / "again")
    tied_copy = {"lm_head.weight"} if recipe.model.tie_word_embeddings else set()
    assert set(first.names) == set(again.names) - tied_copy, (
        "transformers itself writes the same keys"
    )
    assert all(same_bits(first.read(name), again.read(name)) for name in first.names)


@pytest.mark.parametrize("case", ROUNDED)
def test_a_rounded_export_is_the_equally_rounded_model(
    case: str, tmp_path: Path, tokenizer: Tokenizer
) -> None:
    name, overrides, target = NATIVES[case]
    model = export(tmp_path, recipe_of(name, *overrides), tokenizer, target, torch.bfloat16)
    forms = {
        open_exported_weights(tmp_path / "hf").form(name)
        for name in open_exported_weights(tmp_path / "hf").names
        if "score_correction" not in name
    }
    assert {form.dtype for form in forms} == {torch.bfloat16}
    check_parity(
        compare_logits(model, load_exported(tmp_path / "hf"), torch.randint(VOCAB_SIZE, (2, 64)))
    )


@pytest.mark.parametrize(
    "case,field,value",
    [
        ("mixtral: window, YaRN, tied", "sliding_window", 10),
        ("qwen3_moe: every second layer dense", "norm_topk_prob", False),
        ("deepseek_v2: groups", "topk_method", "greedy"),
        ("deepseek_v3_mini", "rope_interleave", False),
        ("gpt_oss_20b_mini", "swiglu_limit", 0.1),
    ],
)
def test_the_comparison_notices_a_field_that_says_something_else(
    case: str, field: str, value: object, tmp_path: Path, tokenizer: Tokenizer
) -> None:
    name, overrides, target = NATIVES[case]
    model = export(tmp_path, recipe_of(name, *overrides), tokenizer, target)
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    config[field] = value
    (tmp_path / "hf" / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="differ"):
        check_parity(
            compare_logits(
                model, load_exported(tmp_path / "hf"), torch.randint(VOCAB_SIZE, (2, 64))
            )
        )


def test_the_comparison_notices_exchanged_experts_and_nan(
    tmp_path: Path, tokenizer: Tokenizer
) -> None:
    model = export(tmp_path, recipe_of("debug"), tokenizer)
    exported = load_exported(tmp_path / "hf")
    windows_WS = torch.randint(VOCAB_SIZE, (2, 64))
    with torch.no_grad():
        w1 = model.layers[1].feed_forward.experts.w1
        w1.copy_(w1.roll(1, dims=0))
    with pytest.raises(CheckpointError, match="differ"):
        check_parity(compare_logits(model, exported, windows_WS))
    with torch.no_grad():
        w1[0, 0, 0] = torch.nan
    with pytest.raises(CheckpointError, match="differ"):
        check_parity(compare_logits(model, exported, windows_WS))


def test_shards_load_as_one_model(tmp_path: Path, tokenizer: Tokenizer) -> None:
    recipe = recipe_of("debug")
    model = random_checkpoint(tmp_path / "checkpoint", recipe, tokenizer)
    weights = open_whole_weights(tmp_path / "checkpoint", recipe.model)
    (tmp_path / "hf").mkdir()
    write_hf_folder(
        tmp_path / "hf", choose_target(recipe), recipe.model, weights, tokenizer, shard_bytes=40_000
    )
    assert (tmp_path / "hf" / INDEX).is_file()
    check_parity(
        compare_logits(model, load_exported(tmp_path / "hf"), torch.randint(VOCAB_SIZE, (2, 64)))
    )


def test_auto_tokenizer_gives_the_same_ids_and_knows_the_end_of_document(
    tmp_path: Path, tokenizer: Tokenizer
) -> None:
    from transformers import AutoTokenizer

    recipe = recipe_of("debug")
    export(tmp_path, recipe, tokenizer)
    opened = AutoTokenizer.from_pretrained(tmp_path / "hf")
    assert opened(TEXT)["input_ids"] == tokenizer.encode([TEXT])[0].tolist()
    assert opened.decode(opened(TEXT)["input_ids"]) == TEXT
    assert (
        opened.eos_token_id == tokenizer.eod_id == 0
        and opened.model_max_length == recipe.model.max_position_embeddings
    )
    exported = load_exported(tmp_path / "hf")
    assert exported.generation_config.eos_token_id == 0
    assert (
        exported.generate(torch.tensor([[0, 5]]), max_new_tokens=5, do_sample=False).shape[1] <= 7
    )


@pytest.mark.parametrize(
    ("recipe", "overrides", "target", "reason"),
    [
        (
            "debug",
            [PLAIN],
            "qwen3_moe",
            "model.attention.qk_norm is none, and qwen3_moe has only head",
        ),
        (
            "debug",
            ["model.moe.num_shared_experts=1"],
            "qwen3_moe",
            "model.moe.num_shared_experts is 1, and qwen3_moe has nothing for it",
        ),
        ("debug", DENSE, "qwen3_moe", "no layer is a mixture of experts"),
        (
            "debug",
            ["model.moe.kind=deepspeed", "model.moe.causal=false"],
            "qwen3_moe",
            "model.moe.drop_tokens is true",
        ),
        ("debug", [*NATIVE, "model.moe.use_residual=true"], "qwen3_moe", "model.moe.use_residual"),
        (
            "debug",
            [*NATIVE, "model.moe.top2_2nd_expert_sampling=true"],
            "qwen3_moe",
            "top2_2nd_expert_sampling",
        ),
        ("debug", ["model.attention.bias=qkv"], "qwen3_moe", "model.attention.bias is qkv"),
        ("debug", ["model.attention.sinks=true"], "qwen3_moe", "sinks"),
        ("debug", ["model.attention.sliding_window=16"], "qwen3_moe", "sliding_window is 16"),
        ("debug", ["model.position.kind=none"], "qwen3_moe", "model.position.kind is none"),
        ("debug", ["model.norm.kind=layer_norm"], "qwen3_moe", "model.norm.kind is layer_norm"),
        ("debug", ["model.feed_forward.kind=gelu"], "qwen3_moe", "model.feed_forward.kind is gelu"),
        ("debug", ["model.feed_forward.bias=true"], "qwen3_moe", "model.feed_forward.bias"),
        ("debug", ["model.norm_position=post"], "qwen3_moe", "model.norm_position is post"),
        ("debug", ["model.final_norm=false"], "qwen3_moe", "model.final_norm is false"),
        ("debug", ["model.head_bias=true"], "qwen3_moe", "head_bias"),
        (
            "debug",
            ["model.moe={kind: peer, product_key_sizes: [4, 4], query_dim: 8}"],
            "qwen3_moe",
            "model.moe.kind is peer",
        ),
        (
            "debug",
            ["model.moe.router.kind=noisy_topk"],
            "qwen3_moe",
            "model.moe.router.kind is noisy_topk",
        ),
        ("debug", ["model.moe.router.temperature=2"], "qwen3_moe", "temperature"),
        ("debug", ["model.moe.router.bias=true"], "qwen3_moe", "model.moe.router.bias is true"),
        (
            "debug",
            ["model.moe.router.groups={num_groups: 2, top_k_groups: 1}"],
            "qwen3_moe",
            "groups is set",
        ),
        ("debug", ["model.moe.bias_balancing={}"], "qwen3_moe", "bias_balancing is set"),
        ("debug", [MSCALE], "qwen3_moe", "mscale"),
        (
            "mixtral_8x7b_mini",
            ["model.moe.router.norm_topk_prob=false"],
            "mixtral",
            "norm_topk_prob is false, and mixtral has only true",
        ),
        (
            "mixtral_8x7b_mini",
            ["model.layer_pattern={kind: first_k_dense, k: 1}", "model.intermediate_size=48"],
            "mixtral",
            "1 layers are dense",
        ),
        (
            "mixtral_8x7b_mini",
            ["model.attention.sliding_window=16", "model.attention.full_attention_every=2"],
            "mixtral",
            "full_attention_every is 2",
        ),
        ("mixtral_8x7b_mini", [], "llama", "2 layers are mixtures of experts"),
        ("olmoe_1b_7b_mini", ["model.attention.head_dim=32"], "olmoe", "head_dim"),
        ("deepseek_v3_mini", ["model.norm.eps=1e-5"], "deepseek_v3", "norms of its latents"),
        (
            "deepseek_v3_mini",
            ["model.layer_pattern={kind: every_nth, n: 2}"],
            "deepseek_v3",
            "dense layers are between",
        ),
        (
            "deepseek_v3_mini",
            ["model.moe.router.groups.score=max"],
            "deepseek_v3",
            "two best experts",
        ),
        ("deepseek_v3_mini", ["model.moe.shared_intermediate_size=33"], "deepseek_v3", "33 wide"),
        (
            "deepseek_v3_mini",
            ["model.moe.shared_expert_gate=true"],
            "deepseek_v3",
            "shared_expert_gate",
        ),
        ("deepseek_v3_mini", ["model.attention.sinks=true"], "deepseek_v3", "sinks"),
        ("gpt_oss_20b_mini", ["model.attention.sinks=false"], "gpt_oss", "sinks is false"),
    ],
)
def test_what_transformers_cannot_compute_is_refused_with_the_reason(
    recipe: str, overrides: list[str], target: str, reason: str
) -> None:
    loaded = recipe_of(recipe, *overrides)
    assert any(reason in sentence for sentence in representable(loaded)[target])
    with pytest.raises(ConfigError, match=reason.replace(".", r"\.")):
        choose_target(loaded, target)


def test_every_reason_of_every_target_is_given_at_once() -> None:
    """Second experts that are drawn at random at inference are what the class of last resort
    refuses too.
    """
    drawn = [
        "model.moe.kind=deepspeed",
        "model.moe.drop_tokens=false",
        "model.moe.top2_2nd_expert_sampling=true",
        "model.moe.router.bias=false",
    ]
    with pytest.raises(ConfigError) as refused:
        choose_target(recipe_of("khanh_692m_mini", *drawn))
    assert all(f"\n  {target.name}: " in str(refused.value) for target in targets())
    assert str(refused.value).count("model.norm.kind is layer_norm") == len(architectures())


def test_a_feature_that_no_white_list_names_speaks_against_every_target() -> None:
    reasons = representable(recipe_of("debug", "model.moe.shared_expert_gate=true"))
    assert [
        name for name, against in reasons.items() if "shared_expert_gate" not in "; ".join(against)
    ] == ["qwen2_moe", "custom"]


def test_an_unknown_target_is_refused_with_the_known_ones() -> None:
    with pytest.raises(ConfigError, match="auto or one of llama, mistral"):
        choose_target(recipe_of("debug"), "gpt5")
