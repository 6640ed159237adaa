"""The table, the ranking over seeds and the pictures say what the records say."""

from __future__ import annotations

import csv
import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from pretrain.sweeps.axes import grid, one_at_a_time, parse_axis, with_seeds
from pretrain.sweeps.benchmarks import FORMULA, task_scores
from pretrain.sweeps.report import markdown, write_report
from pretrain.sweeps.results import finished_groups, point_rows, ranking, states
from pretrain.sweeps.search import random_points
from pretrain.sweeps.study import Design, Record, Study

RATE = "optimizer.learning_rate"


def result(loss: float, total: int = 4000, active: int = 1000) -> dict[str, Any]:
    sizes = {"parameters_total": total, "parameters_active": active}
    return sizes | {
        "validation_loss_in_training": loss,
        "train_tokens": 512,
        "steps": 2,
        "tokens_per_second": 100.0,
        "train_seconds": 5.0,
    }


def study_of(output: Path, axes: dict[str, Any], search: str, seeds: list[int]) -> Study:
    design = Design("ablation", "debug", {}, axes, search, 0, 0, seeds, None, 1, {}, str(output))
    parsed = [parse_axis(*item) for item in axes.items()]
    return Study(
        output,
        design,
        with_seeds(grid(parsed) if search == "grid" else one_at_a_time(parsed), seeds),
    )


def settle(study: Study, name: str, *given: Any) -> None:
    point = next(point for point in study.points if point.name == name)
    study.point_folder(name).mkdir(parents=True)
    study.write(Record(point, *given))


@pytest.fixture
def seeded(tmp_path: Path) -> Study:
    """Two learning rates with three seeds each, of which one run diverged."""
    study = study_of(tmp_path / "sweep", {RATE: "log:1e-3:1e-2:2"}, "grid", [1, 2, 3])
    for seed, loss in ((1, 2.0), (2, 2.2), (3, 2.4)):
        settle(
            study,
            f"learning_rate=0.001,seed={seed}",
            "finished",
            [{"exit_code": 0}],
            None,
            result(loss),
        )
    for seed, loss in ((1, 2.0), (2, 2.1)):
        settle(
            study,
            f"learning_rate=0.01,seed={seed}",
            "finished",
            [{}, {"exit_code": 0}],
            None,
            result(loss),
        )
    settle(
        study,
        "learning_rate=0.01,seed=3",
        "failed",
        [{"exit_code": 6}],
        "the gradient of step 7 is not | finite",
        None,
    )
    return study


def test_seeds_are_one_entry_with_mean_and_spread_behind_those_of_which_every_seed_finished(
    seeded: Study,
) -> None:
    whole, partial = ranking(seeded)
    assert (whole.rank, whole.point, whole.seeds, whole.seeds_asked) == (
        1,
        "learning_rate=0.001",
        3,
        3,
    )
    assert (partial.rank, partial.point, partial.seeds, partial.seeds_asked) == (
        2,
        "learning_rate=0.01",
        2,
        3,
    )
    assert partial.validation_loss == pytest.approx(2.05) and partial.spread == pytest.approx(
        math.sqrt(0.005)
    )
    assert whole.validation_loss == pytest.approx(2.2) and whole.spread == pytest.approx(0.2)
    assert whole.perplexity == pytest.approx(math.exp(2.2)) and whole.active_share == 0.25
    assert whole.overrides == [f"{RATE}=0.001"]
    assert states(seeded) == {"finished": 5, "failed": 1}


def test_the_table_has_a_row_a_point_and_pictures_are_drawn_whole(seeded: Study) -> None:
    paths = write_report(seeded)
    with paths["csv"].open() as file:
        rows = list(csv.DictReader(file))
    assert paths["csv"].name == "ablation_results.csv" and len(rows) == 6
    assert [row["axis_learning_rate"] for row in rows] == ["0.001"] * 3 + ["0.01"] * 3
    assert [row["attempts"] for row in rows] == ["1", "1", "1", "2", "2", "1"]
    assert (
        rows[5]["exit_code"] == "6"
        and "not | finite" in rows[5]["error"]
        and rows[5]["perplexity"] == ""
    )
    assert (
        float(rows[0]["perplexity"]) == pytest.approx(math.exp(2.0))
        and rows[0]["overrides"] == f"{RATE}=0.001 seed=1"
    )
    for name in ("params_vs_perplexity", "active_ratio_vs_perplexity", "axes_vs_perplexity"):
        content = paths[name].read_bytes()
        assert (
            content.startswith(b"\x89PNG")
            and content.endswith(b"IEND\xaeB`\x82")
            and len(content) > 5000
        )
    assert "| 1 | learning_rate=0.001 |" in paths["markdown"].read_text() and not list(
        seeded.output.glob("*.partial")
    )


def test_markdown_ranks_and_tells_what_is_missing(seeded: Study) -> None:
    seeded.skipped = [{"name": "learning_rate=7", "reason": "too high"}]
    text = markdown(seeded, point_rows(seeded), ranking(seeded))
    assert text.index("| 1 | learning_rate=0.001 |") < text.index("| 2 | learning_rate=0.01 |")
    assert (
        "| 9.025 | 2.2000 ± 0.2000 | 3 |" in text and "| 7.768 | 2.0500 ± 0.0707 | 2 of 3 |" in text
    )
    command = f"--recipe {seeded.base_recipe} --set optimizer.learning_rate=0.001"
    assert command in text and "Warning" not in text
    assert (
        "| learning_rate=0.01,seed=3 | failed | 6 | the gradient of step 7 is not \\| finite |"
        in text
    )
    assert "| learning_rate=7 | left out |  | too high |" in text


def test_equal_recipes_are_ranked_once_and_stand_beside_the_base_on_each_axis(
    tmp_path: Path,
) -> None:
    axes = {
        "experts": {"4": {"model.moe.num_experts": 4}, "8": {"model.moe.num_experts": 8}},
        "model.moe.top_k": [1, 2],
    }
    study = study_of(tmp_path / "sweep", axes, "each", [])
    study.points = [
        type(point)(**(vars(point) | {"run": "base"})) if point.name == "experts=8" else point
        for point in study.points
    ]
    for name, loss, total in (
        ("base", 2.0, 8000),
        ("experts=4", 2.5, 4000),
        ("top_k=1", 2.25, 8000),
        ("top_k=2", 1.75, 8000),
    ):
        settle(study, name, "finished", [{"exit_code": 0}], None, result(loss, total))
    assert [(entry.point, entry.also) for entry in ranking(study)] == [
        ("top_k=2", []),
        ("base", ["experts=8"]),
        ("top_k=1", []),
        ("experts=4", []),
    ]
    assert len(finished_groups(study)) == len(point_rows(study)) == 5
    text = markdown(study, point_rows(study), ranking(study))
    section = text[text.index("## experts") : text.index("## model.moe.top_k")]
    assert (
        "| 4 | 12.18 | 2.5000 | 1 | +0.5000 | 4,000 | 25.0% |" in section
        and "| 8 | 7.389 | 2.0000 | 1 | +0.0000 | 8,000 | 12.5% |" in section
    )
    assert "| 2 | base (also experts=8) |" in text


def test_a_search_shows_the_values_of_its_trials(tmp_path: Path) -> None:
    study = study_of(tmp_path / "sweep", {RATE: "log:1e-3:1e-2:2"}, "grid", [])
    study.points = random_points(study.design.parsed_axes(), 1, seed=0)
    settle(study, "trial_0000", "finished", [{"exit_code": 0}], None, result(2.0))
    assert f"| 1 | trial_0000 (learning_rate={study.points[0].values[RATE]}) | 7.389 |" in markdown(
        study, [], ranking(study)
    )


def test_a_sweep_of_which_nothing_has_finished_still_reports(tmp_path: Path) -> None:
    study = study_of(tmp_path / "sweep", {RATE: [1e-3]}, "grid", [])
    (tmp_path / "sweep").mkdir()
    paths = write_report(study)
    assert (
        set(paths) == {"csv", "markdown"}
        and "| learning_rate=0.001 | waiting |  |  |" in paths["markdown"].read_text()
    )


TASKS = ["choice", "tagged", "code"]


def evaluated(study: Study, name: str, step: int, **scores: float) -> None:
    """What an evaluation of a run's checkpoint leaves behind."""
    run = study.run_folder(name)
    run.mkdir(parents=True, exist_ok=True)
    record = {"kind": "evaluation", "step": step, "manifest": "m"} | {
        f"tasks/{path}": value for path, value in scores.items()
    }
    with (run / "evaluations.jsonl").open("a") as file:
        file.write(json.dumps(record) + "\n")


@pytest.fixture
def benchmarked(tmp_path: Path) -> Study:
    """Three sizes; two were evaluated on everything, one on a part."""
    study = study_of(
        tmp_path / "sweep", {"size": {n: {"seed": i} for i, n in enumerate("abc")}}, "grid", []
    )
    study = replace(study, design=replace(study.design, base={"evaluation": {"tasks": TASKS}}))
    for name, total in (("size=a", 1000), ("size=b", 2000), ("size=c", 3000)):
        settle(study, name, "finished", [{"exit_code": 0}], None, result(2.0, total))
    whole = {"choice/acc": 0.2, "choice/acc_norm": 0.5, "choice/acc_norm_stderr": 0.9}
    evaluated(study, "size=a", 1, **{"choice/acc_norm": 0.9})  # of an earlier step
    evaluated(
        study, "size=a", 2, **whole, **{"tagged_x/acc": 0.2, "tagged_y/acc": 0.4},
        **{"code/pass@1/create_test": 0.1},
    )  # fmt: skip
    evaluated(
        study, "size=b", 2, **{"choice/acc": 0.6, "tagged/acc": 0.3, "tagged_x/acc": 0.9},
        **{"code/pass@1": 0.0},
    )  # fmt: skip
    evaluated(study, "size=c", 2, **{"choice/acc": 0.7})
    return study


def test_a_task_never_gets_the_score_of_another_one(tmp_path: Path) -> None:
    record = {
        "step": 4,
        "tasks/hellaswag/f1": 0.9,
        "tasks/hellaswag_de/acc": 0.1,
        "tasks/truthfulqa_mc1/acc": 0.2,
        "tasks/truthfulqa_mc2/acc": 0.4,
    }
    path = tmp_path / "evaluations.jsonl"
    path.write_text(json.dumps(record) + "\n")
    tasks = ["hellaswag", "hellaswag_de", "truthfulqa"]
    scores = task_scores(tmp_path, tasks, step=4)
    assert scores == {"hellaswag_de": 0.1, "truthfulqa": pytest.approx(0.3)}


def test_scores_of_the_last_checkpoint_are_columns_and_their_mean_is_the_combined_score(
    benchmarked: Study,
) -> None:
    rows = {row.point: row for row in point_rows(benchmarked)}
    assert rows["size=a"].scores == pytest.approx({"choice": 0.5, "tagged": 0.3, "code": 0.1})
    assert rows["size=a"].combined_score == pytest.approx(0.3)
    assert rows["size=b"].scores == pytest.approx({"choice": 0.6, "tagged": 0.3, "code": 0.0})
    # Without one of its tasks there is no combined score.
    assert rows["size=c"].scores == {"choice": 0.7, "tagged": None, "code": None}
    assert rows["size=c"].combined_score is None
    columns = rows["size=a"].to_dict()
    assert columns["score_choice"] == 0.5 and "scores" not in columns


def test_each_task_gets_a_picture_over_all_parameters_and_the_formula_is_stated(
    benchmarked: Study,
) -> None:
    paths = write_report(benchmarked)
    for name in (*TASKS, "combined_score"):
        picture = paths[f"total_params_vs_{name}"]
        assert picture.name == f"total_params_vs_{name}.png"
        assert picture.read_bytes().startswith(b"\x89PNG")
    report = paths["markdown"].read_text()
    assert "## Benchmarks" in report and FORMULA in report
    assert "| size=a | 0.3000 | 0.5000 | 0.3000 | 0.1000 |" in report
    assert "| size=c |  | 0.7000 |  |  |" in report
    assert "![total_params_vs_combined_score](total_params_vs_combined_score.png)" in report


def test_a_sweep_without_tasks_has_neither(seeded: Study) -> None:
    paths = write_report(seeded)
    assert not any(name.startswith("total_params_vs_") for name in paths)
    assert "## Benchmarks" not in paths["markdown"].read_text()
