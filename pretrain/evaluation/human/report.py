"""The score of a human evaluation as Markdown."""

from __future__ import annotations

from pretrain.checkpoint.model_card import table
from pretrain.evaluation.human.score import Agreement, HumanResult, Interval

Cell = str | int | float | None
# Krippendorff's own threshold for tentative conclusions.
LOWEST_ALPHA = 0.667


def report(result: HumanResult) -> str:
    """All of the score: what was rated, the result, agreement, and each rater."""
    models = result["models"]
    lines = [f"# Human evaluation: {result['question']}", ""]
    rows: list[list[Cell]] = [
        [f"model {'AB'[place]}", f"{model['checkpoint']}"] for place, model in enumerate(models)
    ]
    rows += [
        ["items in the sheets", result["items"]],
        ["items that somebody rated", result["rated_items"]],
        ["judgements", result["judgements"]],
        ["rows that are not filled in", result["unrated"]],
        ["prompts that both models continued alike", result["identical"]],
        ["study", result["study"]],
    ]
    lines += [*table(["what", "value"], rows), ""]
    lines += _pairs(result) if "pairs" in result else _criteria(result)
    left = ["left share"] if "pairs" in result else []
    raters: list[list[Cell]] = [
        [name, one["judgements"], one["score"], *([one["left_share"]] if left else [])]
        for name, one in result["raters"].items()
    ]
    score = "share of A" if left else "mean rating"
    return "\n".join([*lines, *table(["rater", "judgements", score, *left], raters), ""])


def _interval(interval: object) -> str:
    return f"{interval[0]:.3f} to {interval[1]:.3f}" if isinstance(interval, list) else "-"


def _pairs(result: HumanResult) -> list[str]:
    pairs = result["pairs"]
    majority = pairs["majority"]
    rows: list[list[Cell]] = [
        ["judgements for A, for B, ties", f"{pairs['wins']}, {pairs['losses']}, {pairs['ties']}"],
        ["win rate of A, ties half", pairs["win_rate"]],
        ["95% interval, bootstrap over items", _interval(pairs["win_rate_interval"])],
        [
            "items by majority: A, B, undecided",
            f"{majority['wins']}, {majority['losses']}, {majority['undecided']}",
        ],
        ["95% interval of A's share of decided items, Wilson", _interval(majority["interval"])],
        ["p-value, sign test", _number(majority["p_value"])],
        ["share of the left side", _number(pairs["left_share"])],
        ["95% interval of it, Wilson", _interval(pairs["left_interval"])],
        *_agreement(pairs["agreement"]),
    ]
    return [*table(["measured", "value"], rows), "", *_warning([pairs["agreement"]])]


def _criteria(result: HumanResult) -> list[str]:
    rows: list[list[Cell]] = [
        [
            name,
            one["ratings"],
            one["mean"],
            _interval(one["interval"]),
            _number(one["agreement"]["alpha"]),
            _interval(one["agreement"]["interval"]),
        ]
        for name, one in result["criteria"].items()
    ]
    columns = ["criterion", "ratings", "mean", "95% interval", "alpha (ordinal)", "its interval"]
    found = [one["agreement"] for one in result["criteria"].values()]
    return [*table(columns, rows), "", *_warning(found)]


def _agreement(found: Agreement) -> list[list[Cell]]:
    level, units = found["level"], found["units"]
    interval: Interval | None = found["interval"]
    return [
        [f"Krippendorff's alpha ({level}), over {units} items", _number(found["alpha"])],
        ["95% interval of it, bootstrap over items", _interval(interval)],
    ]


def _number(value: object) -> str:
    return f"{value:.4f}" if isinstance(value, float) else "-"


def _warning(agreements: list[Agreement]) -> list[str]:
    """A sentence for agreement that carries no conclusion."""
    alphas = [found["alpha"] for found in agreements]
    if all(alpha is None for alpha in alphas):
        return ["No item has two different ratings to compare: agreement is not known.", ""]
    if any(alpha is not None and alpha < LOWEST_ALPHA for alpha in alphas):
        return [
            f"An alpha below {LOWEST_ALPHA} is too low for conclusions (Krippendorff 2004): the"
            " raters understood the question differently, or the texts hardly differ.",
            "",
        ]
    return []
