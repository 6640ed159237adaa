"""What a sweep refuses before anything starts, and what its folder remembers."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from data_pipeline.preprocess.coordinator import build
from data_pipeline.preprocess.workspace import Output
from pretrain.config.load import load_recipe
from pretrain.core.errors import ConfigError, StorageError
from pretrain.sweeps.axes import Point
from pretrain.sweeps.command import exit_code
from pretrain.sweeps.plan import checked_points, planned_points, planned_study, searching
from pretrain.sweeps.report import markdown
from pretrain.sweeps.results import incomparable, point_rows
from pretrain.sweeps.study import SETTLED, Design, Record, Study, base_mapping, open_study
from tests.support.tiny_run import Tiny

TOP_K = "model.moe.top_k"


def design_of(tiny: Tiny, axes: dict[str, Any], search: str = "grid", **changes: Any) -> Design:
    base = base_mapping(str(tiny.recipe), [], None)
    given = {
        "seeds": [],
        "train_tokens": None,
        "ranks": 1,
        "ds_config": {},
        "folder": str(tiny.folder),
        "trials": 4,
        "search_seed": 0,
    }
    return Design(
        **(
            {"kind": "sweep", "recipe": "tiny", "base": base, "axes": axes, "search": search}
            | given
            | changes
        )
    )


def planned(
    tiny: Tiny,
    output: Path,
    axes: dict[str, Any],
    search: str = "grid",
    skip_invalid: bool = False,
    **changes: Any,
) -> Study:
    return planned_study(output, design_of(tiny, axes, search, **changes), None, skip_invalid)


@pytest.mark.parametrize(
    "axes,changes,told",
    [
        (
            {TOP_K: [1, 2, 8]},
            {},
            r"1 of 3 points cannot run, nothing was started: top_k=8: .*top_k",
        ),
        ({"model.moe.topk": [1]}, {}, "unknown field 'model.moe.topk': did you mean 'top_k'"),
        ({"train.micro_batch_size": [2, 3]}, {}, "micro_batch_size=3: .*no multiple"),
        ({TOP_K: [1]}, {"ranks": 3}, r"micro_batch_size x ranks \(2 x 3\)"),
        ({"data.path": ["absent"]}, {}, "absent"),
        ({"data.mixture": [{"kind": "weights", "weights": {"web": 1.0}}]}, {}, "web"),
        ({"parallel.ep_size": [1, 2]}, {}, "ep_size=2: .*does not divide the number of ranks"),
    ],
)
def test_points_that_cannot_run_are_told_before_anything_starts(
    tiny: Tiny, tmp_path: Path, axes: dict[str, Any], changes: Any, told: str
) -> None:
    with pytest.raises(ConfigError, match=told):
        planned(tiny, tmp_path / "sweep", axes, **changes)
    assert list(tmp_path.iterdir()) == []


def test_on_request_they_are_left_out_and_remembered(tiny: Tiny, tmp_path: Path) -> None:
    study = planned(tiny, tmp_path / "sweep", {TOP_K: [1, 2, 8]}, skip_invalid=True)
    assert [point.name for point in study.points] == ["top_k=1", "top_k=2"]
    study.save()
    again = open_study(tmp_path / "sweep")
    assert (
        again is not None
        and again.points == study.points
        and again.skipped == study.skipped
        and again.design == study.design
    )
    assert again.skipped[0]["name"] == "top_k=8" and "top_k" in again.skipped[0]["reason"]
    with pytest.raises(ConfigError, match="1 of 1 points"):
        planned(tiny, tmp_path / "none", {TOP_K: [8]}, skip_invalid=True)


def test_equal_recipes_are_one_run(tiny: Tiny, tmp_path: Path) -> None:
    study = planned(
        tiny,
        tmp_path / "sweep",
        {
            "experts": {"2": {"model.moe.num_experts": 2}, "4": {"model.moe.num_experts": 4}},
            TOP_K: [1, 2],
        },
        "each",
    )
    assert {point.name: point.run for point in study.points} == {
        "base": "base",
        "experts=2": "experts=2",
        "experts=4": "base",
        "top_k=1": "top_k=1",
        "top_k=2": "base",
    }
    assert [point.name for point in study.runs] == ["base", "experts=2", "top_k=1"]


def test_points_whose_losses_are_over_different_windows_are_told(
    tiny: Tiny, tmp_path: Path
) -> None:
    build(
        load_recipe(str(tiny.recipe), ["data.tokenizer.vocab_size=290"]).data,
        Output(tmp_path / "other"),
    )
    changes = {
        "train.sequence_length": 16,
        "data.path": str(tmp_path / "other"),
        "data.document_mask": True,
        "model.attention.qk_norm": "none",
    }
    told = {}
    for field, value in changes.items():
        study = planned(
            tiny, tmp_path / "sweep", {"axis": {"base": {"seed": 7}, "changed": {field: value}}}
        )
        assert len(study.runs) == 2
        told[field] = incomparable(study)
        assert (f"**Warning:** {told[field]}." in markdown(study, point_rows(study), [])) == (
            told[field] is not None
        )
    differing = {
        field: note and note.removeprefix("runs that differ in ").split(" have ")[0]
        for field, note in told.items()
    }
    assert differing == {
        "train.sequence_length": "sequence length",
        "data.path": "tokenizer or validation split",
        "data.document_mask": "document mask",
        "model.attention.qk_norm": None,
    }


def test_a_recipe_that_changes_under_a_sweep_changes_nothing(tiny: Tiny, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(tiny.recipe.read_text())
    study = Study(
        tmp_path / "sweep",
        design_of(tiny, {TOP_K: [1]}, base=base_mapping(str(recipe), ["seed=11"], 512)),
        [],
    )
    study.points, _ = checked_points(study, planned_points(study.design), False)
    study.save()
    recipe.write_text("name: another")
    again = open_study(tmp_path / "sweep")
    assert again is not None
    found = again.recipe_of(again.points[0])
    assert (found.seed, found.train.train_tokens, found.run_path) == (
        11,
        512,
        str(tmp_path / "sweep" / "runs" / "top_k=1"),
    )


@pytest.mark.parametrize("place", ["base", "point"])
def test_a_sweep_s_folder_imports_no_plugin_that_was_not_given(
    tiny: Tiny, tmp_path: Path, place: str
) -> None:
    base = base_mapping(str(tiny.recipe), [], 512)
    point = Point("strange", {}, ["plugins=[strange_parts]"] if place == "point" else [])
    if place == "base":
        base["plugins"] = ["strange_parts"]
    study = Study(tmp_path / "sweep", design_of(tiny, {TOP_K: [1]}, base=base), [point])
    study.save()
    found = open_study(tmp_path / "sweep")
    assert found is not None
    with pytest.raises(ConfigError, match="give --plugin strange_parts if you trust it"):
        found.recipe_of(found.points[0])


def grown(tiny: Tiny, found: Study, **changes: Any) -> Study:
    """The sweep of a folder, asked for with changes; written, and read back."""
    asked = dataclasses.replace(design_of(tiny, {}), **(vars(found.design) | changes))
    study = planned_study(found.output, asked, found, False)
    study.save()
    again = open_study(found.output)
    assert again is not None and again.design == asked
    return again


@pytest.mark.parametrize(
    "field,value",
    [
        ("axes", {TOP_K: [1]}),
        ("axes", {TOP_K: [1, 2], "seed": [1]}),
        ("seeds", [1]),
        ("ranks", 2),
        ("search", "random"),
        ("ds_config", {"a": 1}),
    ],
)
def test_another_sweeps_folder_is_refused(
    tiny: Tiny, tmp_path: Path, field: str, value: Any
) -> None:
    found = planned(tiny, tmp_path / "sweep", {TOP_K: [1, 2]})
    assert planned_study(found.output, found.design, found, False) is found
    with pytest.raises(
        ConfigError,
        match=f"holds a sweep with another '{field}'.*choose another folder with --output",
    ):
        planned_study(
            found.output, dataclasses.replace(found.design, **{field: value}), found, False
        )


def test_more_seeds_and_values_are_added_behind_the_runs_that_are_there(
    tiny: Tiny, tmp_path: Path
) -> None:
    found = planned(tiny, tmp_path / "sweep", {TOP_K: [1]}, seeds=[2])
    found.save()
    found.point_folder("top_k=1,seed=2").mkdir(parents=True)
    found.write(Record(found.points[0], "finished"))
    study = grown(tiny, found, axes={TOP_K: [2, 1]}, seeds=[1, 2])
    assert [point.name for point in study.points] == [
        "top_k=1,seed=2",
        "top_k=2,seed=1",
        "top_k=2,seed=2",
        "top_k=1,seed=1",
    ]
    assert (
        study.points[0] == found.points[0]
        and [study.record(point).state for point in study.points] == ["finished"] + ["waiting"] * 3
    )
    with pytest.raises(ConfigError, match="another 'seeds'"):
        grown(tiny, study, seeds=[1])


def test_an_axis_is_added_where_each_is_tried_by_itself_and_points_to_a_random_search(
    tiny: Tiny, tmp_path: Path
) -> None:
    found = planned(tiny, tmp_path / "each", {TOP_K: [1]}, "each")
    assert [point.name for point in grown(tiny, found, axes={"seed": [5], TOP_K: [1]}).points] == [
        "base",
        "top_k=1",
        "seed=5",
    ]
    drawn = planned(
        tiny, tmp_path / "random", {"optimizer.learning_rate": "log:1e-4:1e-2"}, "random", trials=2
    )
    assert grown(tiny, drawn, trials=4).points[:2] == drawn.points
    with pytest.raises(ConfigError, match="another 'axes'"):
        grown(tiny, drawn, axes={"optimizer.learning_rate": "log:1e-5:1e-2"})


def test_a_tpe_search_gets_more_trials_and_wider_axes_and_neither_fewer_nor_narrower(
    tiny: Tiny, tmp_path: Path
) -> None:
    found = planned(
        tiny,
        tmp_path / "sweep",
        {"optimizer.learning_rate": "log:1e-4:1e-2", TOP_K: [1]},
        "tpe",
        trials=4,
    )
    wider = {"optimizer.learning_rate": "log:1e-5:1e-2", TOP_K: [1, 2]}
    study = grown(tiny, found, trials=6, axes=wider)
    for changes in ({"trials": 5}, {"axes": found.design.axes}, {"axes": wider | {"seed": [1, 2]}}):
        with pytest.raises(ConfigError, match="holds a sweep with another"):
            grown(tiny, study, **changes)


def test_a_folder_with_other_files_and_damaged_files_are_told(tiny: Tiny, tmp_path: Path) -> None:
    study = planned(tiny, tmp_path / "sweep", {TOP_K: [1]})
    (tmp_path / "sweep").mkdir()
    (tmp_path / "sweep" / "notes.txt").write_text("mine")
    with pytest.raises(ConfigError, match=r"holds notes.txt and no sweep"):
        study.save()
    assert [path.name for path in (tmp_path / "sweep").iterdir()] == ["notes.txt"]
    (tmp_path / "sweep" / "notes.txt").unlink()
    study.save()
    record = study.point_folder("top_k=1") / "record.json"
    record.parent.mkdir(parents=True)
    record.write_text('{"state": ')
    with pytest.raises(StorageError, match="is damaged: delete it"):
        study.record(study.points[0])
    (tmp_path / "sweep" / "study.json").write_text("{")
    with pytest.raises(ConfigError, match="is damaged or of another version"):
        open_study(tmp_path / "sweep")


def test_a_tpe_search_hands_out_what_was_left_and_then_new_trials_and_refuses_what_no_rule_lets_pass(
    tiny: Tiny, tmp_path: Path
) -> None:
    axes = {"optimizer.learning_rate": "log:1e-4:1e-2", TOP_K: [1, 2, 8]}
    study = planned(tiny, tmp_path / "sweep", axes, "tpe")
    study.save()
    following = searching(study, [])
    first = following()
    assert first is not None and study.record(first).state == "waiting"
    study.write(
        Record(first, "finished", [{"exit_code": 0}], None, {"validation_loss_in_training": 3.0})
    )
    second = following()
    assert second is not None and second.name != first.name

    again = open_study(tmp_path / "sweep")
    assert again is not None
    rest = searching(
        again, [point for point in again.points if again.record(point).state not in SETTLED]
    )
    handed = []
    while (point := rest()) is not None:
        handed.append(point)
        again.write(
            Record(
                point, "finished", [{"exit_code": 0}], None, {"validation_loss_in_training": 4.0}
            )
        )
    assert handed[0] == second and len(handed) == 3
    records = [again.record(point) for point in again.points]
    assert [record.state for record in records].count("finished") == 4
    assert all("top_k" in str(record.error) for record in records if record.state == "refused")
    assert all(
        record.point.values[TOP_K] != "8" for record in records if record.state == "finished"
    )


def test_a_search_of_which_every_point_was_refused_ends_with_a_code_of_its_own(
    tiny: Tiny, tmp_path: Path
) -> None:
    study = planned(tiny, tmp_path / "sweep", {TOP_K: [1, 2]}, "tpe")
    study.points = [
        Point("trial_0000", {}, [], run="trial_0000"),
        Point("trial_0001", {}, [], run="trial_0001"),
    ]
    for point in study.points:
        study.point_folder(point.run).mkdir(parents=True)
        study.write(Record(point, "refused"))
    assert exit_code(study, study.points) == 2
    study.write(Record(study.points[1], "finished"))
    assert exit_code(study, study.points) == 0


def test_a_tpe_search_takes_no_seeds(tiny: Tiny, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="takes no --seeds"):
        planned(tiny, tmp_path / "sweep", {TOP_K: [1, 2]}, "tpe", seeds=[1, 2])


def test_the_resolved_study_is_plain_json(tiny: Tiny, tmp_path: Path) -> None:
    study = planned(tiny, tmp_path / "sweep", {TOP_K: [1, 2]}, seeds=[1, 2])
    study.save()
    content = json.loads((tmp_path / "sweep" / "study.json").read_text())
    assert [point["overrides"] for point in content["points"]] == [
        [f"{TOP_K}={k}", f"seed={seed}"] for k in (1, 2) for seed in (1, 2)
    ]
