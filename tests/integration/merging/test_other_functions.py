"""Real pairs of checkpoints whose tensors are alike and whose models are not: merges refuse them, a
new run says so or refuses.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from pretrain.checkpoint import layout
from pretrain.checkpoint.initialize_from import StartingPoint, starting_point
from pretrain.checkpoint.weights import load_state_dict
from pretrain.checkpoint.weights_only import write_weights_folder
from pretrain.core.errors import CheckpointError, ConfigError
from pretrain.run.dry_run import planned_weights
from tests.support.checkpoint_variants import changed_recipe, variant
from tests.support.tiny_checkpoint import Trained
from tools.merge_checkpoints import main

PLAIN = "model.attention.qk_norm=none"
HALVED = (
    PLAIN,
    "model.attention.num_attention_heads=8",
    "model.attention.num_key_value_heads=4",
    "model.attention.head_dim=4",
)
# The same tensors, another function: overrides, and what is said of them.
PAIRS: dict[str, tuple[tuple[str, ...], str]] = {
    "heads": (
        HALVED[1:],
        (
            r"model\.attention\.num_attention_heads \(4 and 8\), .*num_key_value_heads \(2 and 4\),"
            r" .*head_dim \(8 and 4\)"
        ),
    ),
    "rotary base": (
        ("model.position.rope_theta=5e5",),
        r"model\.position\.rope_theta \(10000\.0 and 500000\.0\)",
    ),
    "YaRN": (
        ("model.position={kind: yarn, factor: 4, original_max_position_embeddings: 64}",),
        r"model\.position\.kind \(rope and yarn\)",
    ),
    "eps": (("model.norm.eps=1e-3",), r"model\.norm\.eps \(1e-06 and 0\.001\)"),
    "top_k": (("model.moe.top_k=3",), r"model\.moe\.top_k \(2 and 3\)"),
    "window": (
        ("model.attention.sliding_window=8",),
        r"model\.attention\.sliding_window \(null and 8\)",
    ),
    "scale": (
        ("model.moe.router.routed_scaling_factor=2",),
        r"routed_scaling_factor \(1\.0 and 2\.0\)",
    ),
    "scores": (
        ("model.moe.router={kind: sigmoid_topk}",),
        r"model\.moe\.router\.kind \(softmax_topk and sigmoid_topk\)",
    ),
    "norm": (("model.norm_position=post",), r"model\.norm_position \(pre and post\)"),
}
JOBS = {"average": [], "soup": ["--weights", "1", "2"], "ema": ["--decay", "0.5"]}


def without_qk_norm(tensors: dict[str, Tensor]) -> None:
    for name in [name for name in tensors if "q_norm" in name or "k_norm" in name]:
        del tensors[name]


@pytest.fixture(scope="module")
def plain(trained: Trained, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return variant(trained, tmp_path_factory.mktemp("plain") / "weights", without_qk_norm, PLAIN)


def other(trained: Trained, folder: Path, *overrides: str) -> Path:
    return variant(trained, folder, without_qk_norm, PLAIN, *overrides)


def merge(job: str, output: Path, *checkpoints: Path) -> None:
    main(
        [
            job,
            "--checkpoints",
            *map(str, checkpoints),
            *JOBS[job],
            "--no-score",
            "--output",
            str(output),
        ]
    )


@pytest.mark.parametrize("pair", PAIRS)
def test_a_mean_of_models_that_compute_different_things_is_refused(
    trained: Trained, plain: Path, tmp_path: Path, pair: str
) -> None:
    overrides, said = PAIRS[pair]
    second = other(trained, tmp_path / "second", *overrides)
    for job in JOBS:
        with pytest.raises(CheckpointError, match=said) as error:
            merge(job, tmp_path / "out", plain, second)
        assert str(plain) in str(error.value) and str(second) in str(error.value)
    assert not (tmp_path / "out").exists()


def test_a_mean_of_models_that_training_alone_tells_apart_says_whose_recipe_it_has(
    trained: Trained, plain: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    second = other(
        trained,
        tmp_path / "second",
        "model.dropout.residual=0.1",
        "model.attention.kernel=reference",
    )
    merge("average", tmp_path / "out", plain, second)
    said = capsys.readouterr().out
    assert (
        f"model.dropout.residual is 0.0 in {plain} and 0.1 in {second}" in said
        and "model.attention.kernel is auto" in said
    )
    assert layout.read_recipe(tmp_path / "out").model.dropout.residual == 0.1


def test_dense_models_of_different_functions_are_not_mixed(
    trained: Trained, tmp_path: Path
) -> None:
    dense = ("model.layer_pattern.kind=all_dense", "model.intermediate_size=32", "model.moe=null")

    def one_expert(tensors: dict[str, Tensor]) -> None:
        for layer in range(2):
            prefix = f"layers.{layer}.feed_forward"
            for theirs, ours in (("w1", "gate_proj"), ("w3", "up_proj"), ("w2", "down_proj")):
                tensors[f"{prefix}.{ours}.weight"] = tensors.pop(f"{prefix}.experts.{theirs}")[
                    0
                ].clone()
            del tensors[f"{prefix}.router.gate.weight"]

    folders = [
        variant(trained, tmp_path / name, one_expert, *dense, *more)
        for name, more in {"a": (), "b": ("model.norm.eps=1e-3",)}.items()
    ]
    for given, said in (
        ([folders[0], folders[1]], r"model\.norm\.eps"),
        ([folders[0], folders[0]], r"model\.position\.rope_theta"),
    ):
        with pytest.raises((CheckpointError, ConfigError), match=said):
            main([
                *("experts", "--checkpoints", *map(str, given), "--no-score"),
                *("--set", "model.position.rope_theta=5e5", "--output", str(tmp_path / "out")),
            ])  # fmt: skip


def test_a_vocabulary_of_the_same_size_and_other_tokens_is_refused(
    trained: Trained, tmp_path: Path
) -> None:
    content = json.loads((trained.checkpoint / layout.TOKENIZER).read_text())
    names = sorted(content["model"]["vocab"], key=content["model"]["vocab"].get)
    content["model"]["vocab"] |= {names[-1]: len(names) - 2, names[-2]: len(names) - 1}
    swapped = tmp_path / "swapped.json"
    swapped.write_text(json.dumps(content))
    write_weights_folder(
        tmp_path / "second", trained.recipe, load_state_dict(trained.checkpoint).items(), swapped
    )
    with pytest.raises(
        CheckpointError,
        match=r"second has another tokenizer than .* \(sha256 \w{12}\.\.\. and \w{12}\.\.\.\)",
    ):
        merge("average", tmp_path / "out", trained.checkpoint, tmp_path / "second")


# --- initial_weights ------------------------------------------------------------------------------


def start(trained: Trained, weights: Path, *overrides: str, partial: bool = False) -> StartingPoint:
    more = [f"initial_weights={weights}", f"initial_weights_partial={str(partial).lower()}"]
    found = starting_point(
        changed_recipe(trained.recipe, PLAIN, *overrides, *more), None, Path("/nowhere")
    )
    assert found is not None
    return found


@pytest.mark.parametrize("partial", [False, True])
@pytest.mark.parametrize(
    "overrides,said",
    [
        (HALVED, r"num_attention_heads=4, and the recipe 8 and .*head_dim=8, and the recipe 4"),
        (
            ("model.norm={kind: layer_norm}",),
            r"model\.norm\.kind=rms_norm, and the recipe layer_norm",
        ),
        (
            ("model.feed_forward={kind: clamped_swiglu}",),
            r"model\.feed_forward\.kind=swiglu, and the recipe clamped_swiglu",
        ),
        (("model.position={kind: none}",), r"model\.position\.kind=rope, and the recipe none"),
        (
            (
                (
                    "model.moe={kind: deepspeed, drop_tokens: false, num_experts: 4, top_k: 2,"
                    " moe_intermediate_size: 32}"
                ),
            ),
            r"model\.moe\.kind=dropless, and the recipe deepspeed",
        ),
        (("model.norm_position=post",), r"model\.norm_position=pre, and the recipe post"),
        # One half of the heads' layout is in another shape, and the other half would be read as
        # something else.
        (
            ("model.attention.num_attention_heads=8", "model.attention.head_dim=4"),
            r"num_attention_heads=4, and the recipe 8",
        ),
    ],
)
def test_weights_that_would_mean_something_else_are_refused_in_part_too(
    trained: Trained, plain: Path, overrides: tuple[str, ...], said: str, partial: bool
) -> None:
    with pytest.raises(CheckpointError, match=said):
        start(trained, plain, *overrides, partial=partial)


def test_what_training_adapts_to_is_said_once_and_taken(trained: Trained, plain: Path) -> None:
    overrides = [
        override
        for name in ("rotary base", "eps", "top_k", "window")
        for override in PAIRS[name][0]
    ]
    notes = start(
        trained,
        plain,
        *overrides,
        "model.dropout.residual=0.1",
        "model.max_position_embeddings=512",
    ).notes
    paths = [note.split(" has ")[1].split("=")[0] for note in notes]
    assert sorted(paths) == [
        *(
            "model.attention.sliding_window",
            "model.dropout.residual",
            "model.max_position_embeddings",
        ),
        *("model.moe.top_k", "model.norm.eps", "model.position.rope_theta"),
    ]
    assert any("rope_theta=10000.0, and the recipe 500000.0" in note for note in notes)
    assert [note for note in notes if "no finished model depends on it" in note] == [
        note for note in notes if "dropout" in note
    ]
    assert start(trained, plain).notes == []


@pytest.mark.parametrize(
    "overrides",
    [
        ("model.num_hidden_layers=3",),
        ("model.attention.num_attention_heads=8",),
        ("model.moe.num_experts=6",),
        ("model.attention.qk_norm=head",),
        ("model.tie_word_embeddings=true",),
        ("model.layer_pattern={kind: first_k_dense, k: 1}", "model.intermediate_size=32"),
        ("model.layer_pattern.kind=all_dense", "model.intermediate_size=32", "model.moe=null"),
    ],
)
def test_what_shows_in_names_and_shapes_may_differ_in_a_partial_start_alone(
    trained: Trained, plain: Path, overrides: tuple[str, ...]
) -> None:
    found = start(trained, plain, *overrides, partial=True).found
    assert found.loaded and not found.is_whole
    with pytest.raises(CheckpointError, match="set initial_weights_partial=true"):
        start(trained, plain, *overrides)


CONFIGS: dict[str, Any] = {
    "another loop's": {"n_head": 4, "n_kv_head": 2, "rope_theta": 10000.0, "bias": False},
    "nested": {
        "model": {"attention": {"num_attention_heads": 4, "head_dim": 8}, "rms_norm_eps": 1e-6}
    },
    "ours": None,
}


@pytest.mark.parametrize("form", CONFIGS)
@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_the_configuration_that_a_file_carries_is_compared(
    trained: Trained, plain: Path, tmp_path: Path, form: str, suffix: str
) -> None:
    state, config = (
        load_state_dict(plain),
        CONFIGS[form] or {"model": layout.read_recipe(plain).model.model_dump(mode="json")},
    )
    path = tmp_path / f"weights{suffix}"
    if suffix == ".pt":
        torch.save({"model": state, "config": config}, path)
    else:
        save_file(state, path, {"format": "pt", "config": json.dumps(config)})
    assert start(trained, path).notes == []
    with pytest.raises(CheckpointError, match=r"num_attention_heads=4, and the recipe 8"):
        start(trained, path, *HALVED)
    if form != "nested":
        (note,) = start(trained, path, "model.position.rope_theta=5e5").notes
        assert "rope_theta=10000.0, and the recipe 500000.0" in note


def test_a_file_of_tensors_alone_says_that_nothing_else_is_known(
    trained: Trained, plain: Path, tmp_path: Path
) -> None:
    torch.save(load_state_dict(plain), tmp_path / "weights.pt")
    (note,) = start(trained, tmp_path / "weights.pt", *HALVED).notes
    assert "has tensors alone" in note


def test_a_plan_looks_at_the_weights_as_the_run_would(
    trained: Trained, plain: Path, tmp_path: Path
) -> None:
    def planned(*overrides: str, tokenizer: str | None = None) -> list[str]:
        more = (f"initial_weights={plain}", f"run_path={tmp_path}")
        return planned_weights(changed_recipe(trained.recipe, PLAIN, *overrides, *more), tokenizer)

    (note,) = planned("model.position.rope_theta=5e5", tokenizer=trained.manifest.tokenizer.sha256)
    assert "rope_theta=10000.0, and the recipe 500000.0" in note
    with pytest.raises(CheckpointError, match="another tokenizer"):
        planned(tokenizer="0" * 64)
    with pytest.raises(CheckpointError, match="num_attention_heads=4"):
        planned(*HALVED)
    _, fits = planned("model.num_hidden_layers=3", "initial_weights_partial=true")
    assert (
        f"fits in part: {sum(name.startswith('layers.1.') for name in load_state_dict(plain))}"
        " missing, 0 unexpected" in fits
    )
