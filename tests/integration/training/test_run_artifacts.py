"""A real run with every tracker, interrupted by a smaller goal and resumed: its files, its named
checkpoints, and what the trackers hold.
"""

from __future__ import annotations

import csv
import json
import math
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from data_pipeline.preprocess.coordinator import build
from data_pipeline.preprocess.workspace import Output
from data_pipeline.shards.manifest import load_manifest
from pretrain.checkpoint.layout import pointers, read_state, resolve_checkpoint
from pretrain.config.load import load_recipe
from pretrain.core.errors import CheckpointError
from pretrain.train import main
from tests.support.tiny_run import Tiny, curve, own_process
from tests.support.tracker_files import (
    comet_messages,
    comet_metrics,
    holding,
    wandb_history,
    wandb_records,
)

FIRST, LAST = 4, 7
LENGTH, MICRO_BATCH = 32, 8
SETTINGS = (
    f"train.micro_batch_size={MICRO_BATCH}", "validation.interval_steps=4",
    "validation.max_windows=null", "logging.usage_interval_steps=2",
    "checkpoint={interval_steps: 100, keep_last: 1, keep_best: true, keep_epochs: true}",
    "card={license: apache-2.0, data_origin: {all: 'words of this test, CC0-1.0'}}",
)  # fmt: skip
TRACKED = (
    "trackers={kinds: [wandb, comet], project: project-of-tests, group: a-group, tags: [first-tag]}"
)
# Their values must be found nowhere; that of the last one shows that the search would find them.
SECRETS = {
    "WANDB_API_KEY": "c0ffee0123456789c0ffee0123456789c0ffee01",
    "COMET_API_KEY": "CanaryOfComet12345CanaryX",
    "HF_TOKEN": "hf_canaryOfHuggingFaceAAAAAAAAAAAAAAAA",
    "SLURM_JWT": "canary-of-slurm",
}
SHOWN = {"NCCL_DEBUG_FILE": "canary-that-is-shown"}


@dataclass(frozen=True)
class Small:
    """A few of the documents, and so many sequences a step that an epoch of them is about two and a
    half steps.
    """

    tiny: Tiny
    data: Path
    batch: int

    def arguments(self, run: Path, steps: int, *overrides: str) -> list[str]:
        sizes = (
            f"data.path={self.data}",
            f"train.global_batch_size={self.batch}",
            f"train.train_tokens={steps * self.batch * LENGTH}",
        )
        return self.tiny.arguments(run, *SETTINGS, *overrides, *sizes)


@pytest.fixture(scope="module")
def small(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Small:
    folder = tmp_path_factory.mktemp("small") / "data"
    recipe = load_recipe(
        str(tiny.recipe),
        [f"data.source.input=['{tiny.folder}/texts/2[0-4].txt']", "data.validation_share=0.4"],
    )
    build(recipe.data, Output(folder))
    samples = (
        load_manifest(folder).splits["train"].tokens // LENGTH
    )  # which documents are held out depends on the folder's name
    return Small(tiny, folder, MICRO_BATCH * max(1, round(samples / 2.4 / MICRO_BATCH)))


@pytest.fixture(scope="module")
def run(small: Small, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("artifacts") / "run"
    with own_process(), pytest.MonkeyPatch.context() as patch:
        for name, value in {
            "WANDB_MODE": "offline",
            "COMET_START_ONLINE": "0",
            **SECRETS,
            **SHOWN,
        }.items():
            patch.setenv(name, value)
        for steps in (FIRST, LAST):
            assert main(small.arguments(folder, steps, TRACKED)) == 0
    yield folder


def metrics(run: Path, kind: str, name: str) -> dict[int, float]:
    return {row["step"]: row[name] for row in curve(run) if row["kind"] == kind}


def test_epochs_and_the_best_are_kept_and_named(run: Path) -> None:
    rows = [row for row in curve(run) if row["kind"] == "train"]
    ends: dict[int, int] = {}
    for row in rows:
        if row["epoch"] >= 1:
            ends.setdefault(int(row["epoch"]), row["step"])
    losses = metrics(run, "validation", "validation_loss")
    named = pointers(run / "checkpoints")
    assert {1, 2} <= set(ends) and ends[1] <= FIRST < ends[2]
    best = min(losses, key=losses.__getitem__)
    assert named == {
        **{f"epoch_{epoch}": f"step_{step}" for epoch, step in ends.items()},
        "best": f"step_{best}",
        "latest": f"step_{LAST}",
    }
    assert {path.name for path in (run / "checkpoints").iterdir() if path.is_dir()} == set(
        named.values()
    )
    for name, step in named.items():
        assert resolve_checkpoint(run / "checkpoints" / name) == run / "checkpoints" / step
        assert read_state(run / "checkpoints" / step)["step"] == int(step.removeprefix("step_"))
    assert set(ends.values()) <= set(losses)  # an epoch ends with a validation
    assert json.loads((run / "summary.json").read_text())["checkpoints"] == named
    assert 2 <= read_state(resolve_checkpoint(run / "checkpoints" / "epoch_2"))["epoch"] < 3
    with pytest.raises(CheckpointError, match="there is no checkpoint .*epoch_9"):
        resolve_checkpoint(run / "checkpoints" / "epoch_9")


def test_the_history_agrees_with_the_rows(run: Path) -> None:
    history = json.loads((run / "training_history.json").read_text())
    losses = metrics(run, "validation", "validation_loss")
    assert dict(zip(history["step"], history["val_loss"], strict=True)) == losses
    assert history["perplexity"] == [math.exp(loss) for loss in losses.values()]
    assert history["best"]["val_loss"] == min(losses.values()) and history["best"][
        "perplexity"
    ] == math.exp(min(losses.values()))
    assert history["epoch"] == list(metrics(run, "validation", "epoch").values())
    trained = metrics(run, "train", "loss")
    starts = [0, *history["step"]]
    means = [
        sum(trained[step] for step in range(a + 1, b + 1)) / (b - a)
        for a, b in zip(starts, history["step"])
    ]
    assert history["train_loss"] == pytest.approx(means)


def test_the_log_and_the_curves_are_there(run: Path) -> None:
    with (run / "training_log.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row["kind"] == "train"]
    assert {int(row["step"]): float(row["loss"]) for row in rows} == metrics(run, "train", "loss")
    assert (run / "training_curves.png").read_bytes().startswith(b"\x89PNG")


def test_the_card_names_data_licence_and_what_was_measured(run: Path) -> None:
    state = read_state(resolve_checkpoint(run / "checkpoints"))
    for card in (run / "README.md", run / "checkpoints" / f"step_{LAST}" / "README.md"):
        text = card.read_text()
        assert text.startswith("---\nlicense: apache-2.0\n")
        tokens = state["sources"]["all"]["tokens"]
        assert (
            f"| all | text | {state['sources']['all']['documents']} | {tokens:,} | 1.0000 | words"
            " of this test, CC0-1.0 |" in text
        )
        assert (
            f"{state['parameters']['total']:,} parameters" in text
            and f"{state['validation_loss']:.4f}" in text
        )
        for section in (
            "Intended use", "Limits", "Ethics", "Data", "Training", "Results",
            "Hardware and energy", "Licence",
        ):  # fmt: skip
            assert f"## {section}\n" in text
        # Both starts count, and this test needs no counter of energy.
        use = state["hardware"]
        assert use is not None and use["starts"] == 2 and use["devices"] == 1
        assert 0 < use["wall_seconds"] == use["device_seconds"]
        assert "| starts | 2 |" in text and "| energy, kWh (" in text
    assert "| best | checkpoints/step_" in (run / "README.md").read_text()


def test_the_environment_of_both_starts_and_the_resolved_recipe_are_kept(
    run: Path, small: Small
) -> None:
    starts = json.loads((run / "environment.json").read_text())["starts"]
    assert [start["after_step"] for start in starts] == [0, FIRST]
    assert (
        starts[0]["variables"]["NCCL_DEBUG_FILE"] == SHOWN["NCCL_DEBUG_FILE"]
        and starts[0]["git"]["commit"]
    )
    assert load_recipe(str(run / "recipe.yaml")) == load_recipe(
        str(run / "checkpoints" / f"step_{LAST}" / "recipe.yaml")
    )
    assert json.loads((run / "ds_config.json").read_text())["train_batch_size"] == small.batch


@pytest.mark.parametrize("name", SECRETS)
def test_no_file_of_a_run_holds_a_credential(run: Path, name: str) -> None:
    assert holding(run, SECRETS[name]) == []


def test_the_search_for_credentials_finds_what_is_written(run: Path) -> None:
    assert str(run / "environment.json") in holding(run, SHOWN["NCCL_DEBUG_FILE"])


def test_wandb_goes_on_in_the_same_run_with_every_row(run: Path) -> None:
    known = json.loads((run / "trackers.json").read_text())["wandb"]
    logs = [list(wandb_records(path)) for path in sorted(run.glob("wandb/offline-run-*/*.wandb"))]
    assert len(logs) == 2
    seen: dict[int, float] = {}
    for records in logs:
        (started,) = (record.run for record in records if record.WhichOneof("record_type") == "run")
        assert (started.run_id, started.project, started.display_name, started.run_group) == (
            known,
            "project-of-tests",
            "run",
            "a-group",
        )
        assert list(started.tags) == ["first-tag"]
        config = {update.key: json.loads(update.value_json) for update in started.config.update}
        assert config["model"]["moe"]["num_experts"] == 4
        seen |= {
            row["step"]: row["at_a_glance/1_loss"]
            for row in wandb_history(records)
            if "at_a_glance/1_loss" in row
        }
        kept = {
            entry.path
            for record in records
            if record.WhichOneof("record_type") == "artifact"
            for entry in record.artifact.manifest.contents
        }
        assert {"training_curves.png", "training_history.json", "README.md", "recipe.yaml"} <= kept
        models = [
            record.artifact
            for record in records
            if record.WhichOneof("record_type") == "artifact" and record.artifact.type == "model"
        ]
        latest = [artifact for artifact in models if "latest" in artifact.aliases][-1]
        last = f"step_{FIRST if records is logs[0] else LAST}"
        assert last in latest.aliases
        assert json.loads(latest.metadata)["uri"] == (run / "checkpoints" / last).as_uri()
        assert {"usage/log2_1_plus_load/values", "usage/load_by_layer/path"} <= {
            key for row in wandb_history(records) for key in row
        }
        assert (
            next(
                record.exit.exit_code
                for record in records
                if record.WhichOneof("record_type") == "exit"
            )
            == 0
        )
    assert seen == metrics(run, "train", "loss")
    perplexities = perplexities_of(wandb_history(records) for records in logs)
    assert perplexities["train/perplexity"] == metrics(run, "train", "perplexity")
    assert perplexities["validation/perplexity"] == metrics(
        run, "validation", "validation_perplexity"
    )


def perplexities_of(logs: Iterable[Iterable[dict[str, Any]]]) -> dict[str, dict[int, float]]:
    """The values of both perplexities by step."""
    found: dict[str, dict[int, float]] = {"train/perplexity": {}, "validation/perplexity": {}}
    for row in (row for log in logs for row in log):
        for name, values in found.items():
            if name in row:
                values[row["step"]] = row[name]
    return found


def test_comet_goes_on_in_the_same_experiment_with_every_row(run: Path) -> None:
    key = json.loads((run / "trackers.json").read_text())["comet"]
    seen: dict[tuple[str, int], float] = {}
    archives = list((run / "comet").glob("*/*.zip"))
    assert len(archives) == 2
    for archive in archives:
        experiment, messages = comet_messages(archive)
        assert experiment["offline_id"] == key and experiment["project_name"] == "project-of-tests"
        assert sorted(experiment["tags"]) == ["a-group", "first-tag"]
        parameters = {
            message["payload"]["param"]["paramName"]: message["payload"]["param"]["paramValue"]
            for message in messages
            if "param" in message["payload"]
        }
        assert parameters["model|moe|num_experts"] == 4
        uploads = {
            message["payload"]["additional_params"].get("fileName")
            for message in messages
            if message["type"] == "file_upload"
        }
        assert {"training_history.json", "README.md"} <= uploads
        seen |= comet_metrics(messages)
    assert {
        step: value for (name, step), value in seen.items() if name == "at_a_glance/1_loss"
    } == pytest.approx(metrics(run, "train", "loss"))
    assert {
        step: value for (name, step), value in seen.items() if name == "validation/perplexity"
    } == pytest.approx(metrics(run, "validation", "validation_perplexity"))


def test_a_deterministic_run_without_trackers_has_the_same_losses(
    run: Path, small: Small, in_process: None, tmp_path: Path, plain_torch: None
) -> None:
    assert (
        main(
            small.arguments(
                tmp_path / "run", 2, "train.deterministic=true", "validation.max_windows=1"
            )
        )
        == 0
    )
    rows: list[dict[str, Any]] = [row for row in curve(tmp_path / "run") if row["kind"] == "train"]
    assert [row["loss"] for row in rows] == [
        metrics(run, "train", "loss")[row["step"]] for row in rows
    ]
    assert not (tmp_path / "run" / "trackers.json").exists()
    assert torch.are_deterministic_algorithms_enabled() and torch.backends.cudnn.deterministic
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
    with pytest.raises(RuntimeError, match="put_ does not have a deterministic implementation"):
        torch.zeros(3).put_(torch.tensor([0]), torch.ones(1))


def test_a_plain_run_leaves_torch_as_it_is(run: Path, plain_torch: None) -> None:
    torch.zeros(3).put_(torch.tensor([0]), torch.ones(1))


@pytest.fixture
def plain_torch() -> Iterator[None]:
    """A deterministic mode would hold for every later test of this process."""
    assert not torch.are_deterministic_algorithms_enabled()
    yield
    torch.use_deterministic_algorithms(False)
    torch.backends.cudnn.deterministic = False
