from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from data_pipeline.preprocess.coordinator import build
from data_pipeline.preprocess.workspace import Output
from data_pipeline.shards.manifest import load_manifest
from data_pipeline.tokenizer.config import TrainSentencePiece
from data_pipeline.tokenizer.sentencepiece_model import convert_sentencepiece
from data_pipeline.tokenizer.sentencepiece_training import train_sentencepiece
from data_pipeline.tokenizer.tokenizer import Tokenizer, load_tokenizer
from pretrain.checkpoint.initialize_from import starting_point
from pretrain.checkpoint.layout import TOKENIZER, read_recipe
from pretrain.checkpoint.validate import open_whole_weights
from pretrain.config.load import load_recipe
from pretrain.core.errors import DONE, CheckpointError, ConfigError
from pretrain.evaluation.checkpoint import whole_checkpoint
from pretrain.evaluation.generation.generate import Sampling, generate
from pretrain.evaluation.generation.generators import open_generator
from pretrain.export.hf_folder import write_hf_folder
from pretrain.export.import_hf import import_hf
from pretrain.export.parity import load_exported, same_bits
from pretrain.export.targets import choose_target
from pretrain.export.writer import RECORD, WEIGHTS, open_exported_weights
from pretrain.model.moe.config import RoutedMoE
from tests.support.fork_server import run_python
from tests.support.paths import TOOLS
from tests.support.random_checkpoint import random_checkpoint, recipe_of, small_tokenizer
from tests.support.tool_runs import run_here
from tests.unit.export.test_architectures import NATIVES

QUICK = {
    "mixtral_8x7b_mini",
    "qwen2_moe: gated shared expert",
    "deepseek_v3_mini",
    "gpt_oss_20b_mini",
}
CASES = [pytest.param(name, marks=[] if name in QUICK else [pytest.mark.full]) for name in NATIVES]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return small_tokenizer()


def their_folder(
    folder: Path, case: str, tokenizer: Tokenizer, dtype: torch.dtype = torch.bfloat16
) -> Path:
    """A folder that transformers itself wrote."""
    name, overrides, target = NATIVES[case]
    recipe = recipe_of(name, *overrides, "model.embedding_size=null")
    random_checkpoint(folder / "checkpoint", recipe, tokenizer)
    (folder / "hf").mkdir()
    write_hf_folder(
        folder / "hf",
        choose_target(recipe, target),
        recipe.model,
        open_whole_weights(folder / "checkpoint", recipe.model),
        tokenizer,
    )
    model = load_exported(folder / "hf").to(dtype)
    for name, buffer in model.named_buffers():
        if name.endswith("e_score_correction_bias"):
            buffer.data = buffer.data.float()  # as published models have it
    model.save_pretrained(folder / "theirs")
    (folder / "theirs" / TOKENIZER).write_bytes(tokenizer.content)
    return folder / "theirs"


@pytest.mark.parametrize("case", CASES)
def test_there_and_back_is_the_same_bit_for_bit(
    case: str, tmp_path: Path, tokenizer: Tokenizer
) -> None:
    source = their_folder(tmp_path, case, tokenizer)
    conversion = import_hf(source, tmp_path / "ours", overwrite=False)
    assert (
        conversion.parity is not None
        and conversion.parity.max_difference <= 1e-4 < conversion.parity.logits_std
    )
    folder = whole_checkpoint(tmp_path / "ours")
    recipe = read_recipe(folder)
    (tmp_path / "back").mkdir()
    target = choose_target(recipe, NATIVES[case][2])
    its_tokenizer = load_tokenizer(folder / TOKENIZER, recipe.data.tokenizer)
    write_hf_folder(
        tmp_path / "back",
        target,
        recipe.model,
        open_whole_weights(folder, recipe.model),
        its_tokenizer,
        torch.bfloat16,
    )
    first, again = open_exported_weights(source), open_exported_weights(tmp_path / "back")
    tied_copy = {"lm_head.weight"} if recipe.model.tie_word_embeddings else set()
    assert set(first.names) - tied_copy == set(again.names)
    assert all(same_bits(first.read(name), again.read(name)) for name in again.names)


def test_a_sentencepiece_tokenizer_comes_with_its_export(tmp_path: Path) -> None:
    config = TrainSentencePiece(kind="train_sentencepiece", vocab_size=90, eod_token="<|end|>")
    model = train_sentencepiece(["the router sends each token to two experts"] * 9, config)
    source = their_folder(tmp_path, "mixtral_8x7b_mini", model, torch.float32)
    # Transformers has written no tokenizer; that of the export has.
    (source / TOKENIZER).unlink()
    for name in ("tokenizer.model", "tokenizer_config.json"):
        (source / name).write_bytes((tmp_path / "hf" / name).read_bytes())
    import_hf(source, tmp_path / "ours", overwrite=False)
    assert (tmp_path / "ours" / "tokenizer.model").read_bytes() == model.content
    ours, theirs = (open_generator(tmp_path / name, torch.device("cpu")) for name in ("ours", "hf"))
    text = "the two  routers ½"
    assert ours.encode(text) == theirs.encode(text) == model.encode([text])[0].tolist()
    assert ours.eod_id == theirs.eod_id == 2


def test_training_starts_from_a_sentencepiece_model_that_could_be_converted(
    tmp_path: Path,
) -> None:
    config = TrainSentencePiece(
        kind="train_sentencepiece",
        model_type="bpe",
        vocab_size=295,
        byte_fallback=True,
        normalization="identity",
        eod_token="<|end|>",
    )
    model = train_sentencepiece(["the router sends each token to two experts"] * 9, config)
    assert convert_sentencepiece(model.content, "it").startswith(b"{")
    source = their_folder(tmp_path, "mixtral_8x7b_mini", model, torch.float32)
    (source / TOKENIZER).unlink()
    (source / "tokenizer.model").write_bytes(model.content)
    (source / "tokenizer_config.json").write_text('{"tokenizer_class": "SentencePieceBackend"}')
    import_hf(source, tmp_path / "ours", overwrite=False)
    (tmp_path / "texts").mkdir()
    for number in range(20):
        text = f"the router sends token {number} to two experts " * 20
        (tmp_path / "texts" / f"{number}.txt").write_text(text)
    folder = whole_checkpoint(tmp_path / "ours")
    recipe = load_recipe(
        str(folder / "recipe.yaml"),
        [
            f"data.source={{kind: text, input: ['{tmp_path}/texts/*.txt']}}",
            f"initial_weights={tmp_path / 'ours'}",
        ],
    )
    build(recipe.data, Output(tmp_path / "data"), workers=1)
    tokenizer = load_manifest(tmp_path / "data").tokenizer
    assert (tokenizer.file, tokenizer.sha256) == ("tokenizer.model", model.sha256)
    start = starting_point(recipe, tokenizer.sha256, None)
    assert start is not None and start.found.is_whole
    with pytest.raises(CheckpointError, match="another tokenizer"):
        starting_point(recipe, "0" * 64, None)


def test_one_choice_that_is_divided_by_itself_comes_as_it_is_with_a_warning(
    tmp_path: Path, tokenizer: Tokenizer
) -> None:
    """It computes what it says, which transformers' logits confirm; only training on would leave
    its router as it is.
    """
    source = their_folder(tmp_path, "mixtral_8x7b_mini", tokenizer, torch.float32)
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | {"num_experts_per_tok": 1}))
    done = run_here("convert_checkpoint.py", "--from", "hf", source, "--output", tmp_path / "ours")
    assert (
        done.returncode == 0
        and "warning: model.moe.router.norm_topk_prob=true with top_k=1" in done.stderr
    )
    model = read_recipe(tmp_path / "ours").model
    assert isinstance(model.moe, RoutedMoE) and (
        model.moe.top_k,
        model.moe.router.norm_topk_prob,
    ) == (1, True)
    assert choose_target(read_recipe(tmp_path / "ours"), "mixtral").name == "mixtral"


def test_an_imported_model_writes_the_same_text_and_is_exported_by_the_command(
    tmp_path: Path, tokenizer: Tokenizer
) -> None:
    source = their_folder(tmp_path, "mixtral_8x7b_mini", tokenizer, torch.float32)
    options = ("--from", "hf", source, "--output", tmp_path / "ours", "--json", "-")
    done = run_python(TOOLS / "convert_checkpoint.py", *options)
    assert done.returncode == DONE, done.stderr
    assert json.loads(done.stdout)["parity"]["windows"] == 4
    texts = []
    for folder in (source, tmp_path / "ours"):
        (source / "tokenizer_config.json").write_text(
            json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|endoftext|>"})
        )
        generator = open_generator(folder, torch.device("cpu"))
        prompt = generator.encode("def f(x): return 12")
        texts.append(
            generate(
                generator.start(len(prompt) + 20),
                prompt,
                Sampling(greedy=True),
                generator.eod_id,
                range(20),
            )
        )
    assert texts[0] == texts[1] and len(texts[0]) > 0
    with pytest.raises(ConfigError, match="--overwrite"):
        import_hf(source, tmp_path / "ours", overwrite=False)
    assert (tmp_path / "ours" / RECORD).is_file()


@pytest.mark.parametrize(
    "change,words",
    [
        (
            {"model_type": "bert"},
            "model_type 'bert', and the ones that recipes can say are llama, mistral",
        ),
        (
            {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}},
            "rope_type is 'linear'",
        ),
        ({"quantization_config": {"quant_method": "fp8"}}, "quantised"),
        ({"hidden_act": "gelu"}, "hidden_act = gelu, and the nearest recipe would be silu"),
    ],
)
def test_a_config_that_no_recipe_can_say_is_refused(
    change: dict[str, object], words: str, tmp_path: Path, tokenizer: Tokenizer
) -> None:
    source = their_folder(tmp_path, "mixtral_8x7b_mini", tokenizer)
    config = json.loads((source / "config.json").read_text()) | change
    (source / "config.json").write_text(json.dumps(config))
    with pytest.raises(ConfigError, match=words):
        import_hf(source, tmp_path / "ours", overwrite=False)
    assert not (tmp_path / "ours").exists()


def test_half_turned_heads_and_clipped_queries_are_refused(
    tmp_path: Path, tokenizer: Tokenizer
) -> None:
    """Published GLM-4.5 rotates half of a head.

    OLMoE may clip. Neither is in a recipe, and both would load without an error.
    """
    for case, change, field in (
        (
            "glm4_moe: nothing but a sigmoid router",
            {"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.5}},
            "rope_parameters",
        ),
        ("olmoe_1b_7b_mini", {"clip_qkv": 8.0}, "clip_qkv"),
    ):
        source = their_folder(tmp_path / field, case, tokenizer)
        config = json.loads((source / "config.json").read_text()) | change
        (source / "config.json").write_text(json.dumps(config))
        with pytest.raises(ConfigError, match=field):
            import_hf(source, tmp_path / "ours", overwrite=False)


def test_missing_and_superfluous_tensors_are_refused_and_extra_blocks_are_named(
    tmp_path: Path, tokenizer: Tokenizer
) -> None:
    source = their_folder(tmp_path, "deepseek_v3_mini", tokenizer)
    whole = load_file(source / WEIGHTS)
    save_file(
        {
            name: tensor
            for name, tensor in whole.items()
            if name != "model.layers.4.mlp.experts.7.up_proj.weight"
        },
        source / WEIGHTS,
    )
    with pytest.raises(
        CheckpointError, match=r"model\.layers\.4\.mlp\.experts\.7\.up_proj\.weight"
    ):
        import_hf(source, tmp_path / "ours", overwrite=False)
    save_file(whole | {"model.layers.1.surprise": torch.zeros(1)}, source / WEIGHTS)
    with pytest.raises(CheckpointError, match=r"'model\.layers\.1\.surprise' has no place"):
        import_hf(source, tmp_path / "ours", overwrite=False)
    assert not (tmp_path / "ours").exists()
    save_file(whole | {"model.layers.5.eh_proj.weight": torch.zeros(2, 4)}, source / WEIGHTS)
    assert import_hf(source, tmp_path / "ours", overwrite=False, memory_bytes=0).left_out == (
        "model.layers.5.eh_proj.weight",
    )
