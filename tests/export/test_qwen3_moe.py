from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from data_pipeline.tokenizer import Tokenizer, train_bpe
from pretrain.config.data_schema import TrainBPE
from pretrain.config.errors import CheckpointError, ConfigError
from pretrain.config.load import load_recipe
from pretrain.config.schema import Recipe
from pretrain.export.hf_folder import write_hf_folder
from pretrain.export.name_map import to_ours
from pretrain.export.parity import check_parity, compare_logits, load_exported
from pretrain.export.targets import choose_target, representable
from pretrain.export.writer import INDEX, read_weights, write_weights
from pretrain.model.decoder import DecoderLM

TEXT = "def f(x):\n  '  return Xyz ünï don't 12345\t\n\n\n end"
VOCABULARY = "model.vocab_size=300"
NATIVE = ["model.moe.kind=deepspeed", "model.moe.drop_tokens=false"]

VARIANTS = {
    "all layers are mixtures of experts": [],
    "head tied to the embedding": ["model.tie_word_embeddings=true"],
    "every second layer dense": ["model.layer_pattern={kind: every_nth, n: 2}", "model.intermediate_size=48", "model.num_hidden_layers=4"],
    "first layer dense": ["model.layer_pattern={kind: first_k_dense, k: 1}", "model.intermediate_size=48"],
    "weights not renormalised": ["model.moe.router.norm_topk_prob=false", "model.position.rope_theta=777"],
    "head_dim that hidden_size does not give": ["model.attention.head_dim=16", "model.norm.eps=1e-3"],
    "native layer with a router of ours": ["model.moe.kind=deepspeed", "model.moe.gate=router", "model.moe.drop_tokens=false"],
    "native layer, top 1": [*NATIVE, "model.moe.top_k=1", "model.moe.router.norm_topk_prob=false"],
    "native layer, top 2": NATIVE,
    "native layer, top 3": [*NATIVE, "model.moe.top_k=3"],
}


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_bpe([TEXT] * 9, TrainBPE(vocab_size=300))


def random_model(recipe: Recipe) -> DecoderLM:
    """Norms away from one, and matrices large enough for logits to differ and for routing to be clear."""
    torch.manual_seed(0)
    model = DecoderLM(recipe.model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(1.0 if parameter.dim() == 1 else 0.0, 0.2)
    return model.eval()


def weights_of(model: DecoderLM) -> dict[str, torch.Tensor]:
    tied = {"head.weight"} if model.config.tie_word_embeddings else set()
    return {name: tensor.detach() for name, tensor in model.state_dict().items() if name not in tied}


def write(folder: Path, recipe: Recipe, model: DecoderLM, tokenizer: Tokenizer) -> Path:
    folder.mkdir(exist_ok=True)
    write_hf_folder(folder, choose_target(recipe), recipe.model, weights_of(model), tokenizer)
    return folder


@pytest.mark.parametrize("variant", VARIANTS)
def test_transformers_computes_the_same_logits(variant: str, tmp_path: Path, tokenizer: Tokenizer) -> None:
    recipe = load_recipe("debug", [VOCABULARY, *VARIANTS[variant]])
    model = random_model(recipe)
    exported = load_exported(write(tmp_path, recipe, model, tokenizer))
    assert exported.config.vocab_size == 300 and model.config.padded_vocab_size == 320
    assert exported.config.rope_parameters["rope_theta"] == recipe.model.position.rope_theta
    parity = compare_logits(model, exported, torch.randint(300, (8, 64)))
    check_parity(parity)
    assert parity.windows == 8 and parity.logits_std > 0.5


def test_the_comparison_notices_a_rope_theta_that_was_not_read(tmp_path: Path, tokenizer: Tokenizer) -> None:
    recipe = load_recipe("debug", [VOCABULARY])
    model = random_model(recipe)
    folder = write(tmp_path, recipe, model, tokenizer)
    config = json.loads((folder / "config.json").read_text())
    config["rope_parameters"]["rope_theta"] = 1e6
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="differ"):
        check_parity(compare_logits(model, load_exported(folder), torch.randint(300, (2, 64))))


def test_the_comparison_notices_exchanged_experts_and_nan(tmp_path: Path, tokenizer: Tokenizer) -> None:
    recipe = load_recipe("debug", [VOCABULARY])
    model = random_model(recipe)
    exported = load_exported(write(tmp_path, recipe, model, tokenizer))
    windows_WS = torch.randint(300, (2, 64))
    with torch.no_grad():
        w1 = model.layers[1].feed_forward.experts.w1
        w1.copy_(w1.roll(1, dims=0))
    with pytest.raises(CheckpointError, match="differ"):
        check_parity(compare_logits(model, exported, windows_WS))
    with torch.no_grad():
        w1[0, 0, 0] = torch.nan
    with pytest.raises(CheckpointError, match="differ"):
        check_parity(compare_logits(model, exported, windows_WS))


def test_keys_are_one_per_expert_and_a_model_saved_by_transformers_maps_back(tmp_path: Path, tokenizer: Tokenizer) -> None:
    """transformers itself writes per-expert files from its fused parameters: our map reads them back to our weights."""
    recipe = load_recipe("debug", [VOCABULARY])
    model = random_model(recipe)
    exported = load_exported(write(tmp_path / "ours", recipe, model, tokenizer))
    exported.save_pretrained(tmp_path / "theirs")
    theirs = read_weights(tmp_path / "theirs")
    assert theirs.keys() == read_weights(tmp_path / "ours").keys()
    back = to_ours(choose_target(recipe).links(recipe.model), theirs)
    assert all(torch.equal(back[name], tensor[: len(back[name])]) for name, tensor in weights_of(model).items())


def test_shards_load_as_one_model(tmp_path: Path, tokenizer: Tokenizer) -> None:
    recipe = load_recipe("debug", [VOCABULARY])
    model = random_model(recipe)
    write_hf_folder(tmp_path, choose_target(recipe), recipe.model, weights_of(model), tokenizer, max_shard_size=40_000)
    assert (tmp_path / INDEX).is_file()
    check_parity(compare_logits(model, load_exported(tmp_path), torch.randint(300, (2, 64))))


def test_a_missing_tensor_is_refused_not_initialised_at_random(tmp_path: Path, tokenizer: Tokenizer) -> None:
    recipe = load_recipe("debug", [VOCABULARY])
    folder = write(tmp_path, recipe, random_model(recipe), tokenizer)
    tensors = read_weights(folder)
    del tensors["model.norm.weight"]
    write_weights(folder, tensors)
    with pytest.raises(CheckpointError, match=r"model\.norm\.weight"):
        load_exported(folder)


def test_auto_tokenizer_gives_the_same_ids_and_knows_the_end_of_document(tmp_path: Path, tokenizer: Tokenizer) -> None:
    from transformers import AutoTokenizer

    recipe = load_recipe("debug", [VOCABULARY])
    opened = AutoTokenizer.from_pretrained(write(tmp_path, recipe, random_model(recipe), tokenizer))
    assert opened(TEXT)["input_ids"] == tokenizer.encode([TEXT])[0].tolist()
    assert opened.decode(opened(TEXT)["input_ids"]) == TEXT
    assert opened.eos_token_id == tokenizer.eod_id == 0 and opened.model_max_length == recipe.model.max_position_embeddings


def test_transformers_generates_and_stops_at_the_end_of_document(tmp_path: Path, tokenizer: Tokenizer) -> None:
    recipe = load_recipe("debug", [VOCABULARY])
    exported = load_exported(write(tmp_path, recipe, random_model(recipe), tokenizer))
    assert exported.generation_config.eos_token_id == 0
    assert exported.generate(torch.tensor([[0, 5]]), max_new_tokens=5, do_sample=False).shape[1] <= 7


@pytest.mark.parametrize(
    ("overrides", "reason"),
    [
        (["model.attention.qk_norm=none"], "qk_norm"),
        (["model.moe.num_shared_experts=1"], "num_shared_experts"),
        (["model.layer_pattern.kind=all_dense", "model.intermediate_size=64"], "no layer is a mixture"),
        (["model.moe.kind=deepspeed", "model.moe.causal=false"], "drop_tokens"),
        ([*NATIVE, "model.moe.use_residual=true"], "use_residual"),
        ([*NATIVE, "model.moe.top2_2nd_expert_sampling=true"], "top2_2nd_expert_sampling"),
        (["model.attention.bias=qkv"], "model.attention.bias is qkv"),
        (["model.attention.sinks=true"], "sinks"),
        (["model.attention.sliding_window=16"], "sliding_window is 16"),
        (["model.position.kind=none"], "model.position is of kind none"),
        (["model.norm.kind=layer_norm"], "model.norm is of kind layer_norm"),
        (["model.feed_forward.kind=gelu"], "model.feed_forward is of kind gelu"),
        (["model.feed_forward.bias=true"], "model.feed_forward.bias"),
        (["model.norm_position=post"], "norms before"),
        (["model.final_norm=false"], "behind the last block"),
        (["model.embedding_size=16"], "embedding_size is 16"),
        (["model.head_bias=true"], "head_bias"),
        (["model.moe.router.kind=sigmoid_topk"], "router is of kind sigmoid_topk"),
        (["model.moe.router.temperature=2"], "temperature"),
        (["model.moe.router.groups={num_groups: 2, top_k_groups: 1}"], "groups"),
        (["model.moe.bias_balancing={}"], "bias_balancing"),
    ],
)
def test_what_transformers_cannot_compute_is_refused_with_the_reason(overrides: list[str], reason: str) -> None:
    recipe = load_recipe("debug", [VOCABULARY, *overrides])
    assert [reason in sentence for sentence in representable(recipe)] == [True]
    with pytest.raises(ConfigError, match=reason):
        choose_target(recipe)


def test_every_reason_is_given_at_once() -> None:
    overrides = [*NATIVE, "model.moe.use_residual=true", "model.attention.qk_norm=none"]
    assert len(representable(load_recipe("debug", [VOCABULARY, *overrides]))) == 2
    assert representable(load_recipe("debug", [VOCABULARY])) == []
