"""The page docs/combinations.md: tables that are made by asking the rules."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable
from typing import NamedTuple

from combinations import AXES, WORLD_SIZE, Choice, recipe_of, refusal

from pretrain.core.errors import ConfigError
from pretrain.core.files import JsonObject
from pretrain.engine.ds_config_check import check_ds_config
from pretrain.engine.ds_config_rules import check_combination

STAGES = (0, 1, 2, 3)
PAGE_WIDTH = 120


class Reasons:
    """Why something is refused: each sentence once, with its number on the page."""

    def __init__(self) -> None:
        self._sentences: list[str] = []

    def number(self, sentence: str) -> int:
        """The number of a sentence, from 1."""
        if sentence not in self._sentences:
            self._sentences.append(sentence)
        return self._sentences.index(sentence) + 1

    def lines(self) -> list[str]:
        """The numbered list."""
        found = []
        for number, sentence in enumerate(self._sentences, start=1):
            start = f"{number}. "
            found += textwrap.wrap(
                start + sentence, PAGE_WIDTH, subsequent_indent=" " * len(start),
                break_long_words=False, break_on_hyphens=False,
            )  # fmt: skip
        return found


def table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> list[str]:
    """A table of Markdown."""
    titles = list(head)
    return [
        f"| {' | '.join(cells)} |" for cells in (titles, ["---"] * len(titles), *map(list, rows))
    ]


# --- what goes together ---------------------------------------------------------------------------


def pair_cell(choice: Choice, axis: str, reasons: Reasons) -> str:
    """Which values of an axis a choice goes with."""
    if axis == choice[0]:
        return ""
    if (alone := refusal(choice)) is not None:
        return f"no ({reasons.number(alone)})"
    refused: dict[str, int] = {}
    others = [value for value in AXES[axis].values if refusal((axis, value)) is None]
    for value in others:
        # In one order, so that a pair is asked for once.
        pair = sorted((choice, (axis, value)), key=lambda one: list(AXES).index(one[0]))
        if (sentence := refusal(*pair)) is not None:
            refused[value] = reasons.number(sentence)
    if not refused:
        return "yes"
    # Sentences of several values may differ in the value alone: the first one is shown.
    names = ", ".join(refused)
    return f"{'no' if len(refused) == len(others) else f'not {names}'} ({min(refused.values())})"


def pair_table(reasons: Reasons) -> list[str]:
    """A row for each value of each axis."""
    rows = [
        [f"{axis.name} `{value}`", *(pair_cell((axis.name, value), of, reasons) for of in AXES)]
        for axis in AXES.values()
        for value in axis.values
    ]
    return table(["", *AXES], rows)


# --- sections of a ds_config ----------------------------------------------------------------------


class Policy(NamedTuple):
    """One setting of a ds_config, and what a run of it showed.

    Attributes:
        shown: the key and its value.
        zero: in the section zero_optimization.
        sections: other sections.
        seen: what was measured.
    """

    shown: str
    seen: str
    zero: JsonObject = {}
    sections: JsonObject = {}


def policy_refusal(policy: Policy, kind: str, stage: int, device: str) -> str | None:
    """Why the rules refuse a setting at a ZeRO stage on a device."""
    ds_config: JsonObject = {
        **policy.sections,
        "zero_optimization": {"stage": stage, **policy.zero},
    }
    try:
        check_ds_config(ds_config, "it")
        check_combination(ds_config, "it", recipe_of([("MoE layer", kind)]), device)
    except ConfigError as error:
        return str(error).removeprefix("it: ")
    return None


def policy_cell(policy: Policy, kind: str, reasons: Reasons) -> str:
    """The stages at which a setting is allowed."""
    stages = [stage for stage in STAGES if refusal(("MoE layer", kind), _stage(stage)) is None]
    refused = {stage: policy_refusal(policy, kind, stage, "cuda") for stage in stages}
    allowed = [stage for stage, sentence in refused.items() if sentence is None]
    # "No effect at this stage" says nothing about experts.
    sentences = [text for text in refused.values() if text and "has no effect" not in text]
    note = f" ({reasons.number(sentences[0])})" if sentences else ""
    if not allowed:
        return f"no{note}"
    on_cpu = [stage for stage in allowed if policy_refusal(policy, kind, stage, "cpu") is None]
    where = "" if on_cpu == allowed else ", GPU"
    return f"{', '.join(map(str, allowed))}{where}{note}"


def _stage(stage: int) -> Choice:
    return ("ZeRO stage", str(stage))


def policy_table(policies: Iterable[Policy], reasons: Reasons) -> list[str]:
    """A row for each setting, a column for each kind of layer."""
    kinds = list(AXES["MoE layer"].values)
    rows = [
        [f"`{policy.shown}`", *(policy_cell(policy, kind, reasons) for kind in kinds), policy.seen]
        for policy in policies
    ]
    return table(["setting", *kinds, "what was run"], rows)


# --- the page -------------------------------------------------------------------------------------

# What a run showed is on 2 ranks with gloo unless it says more; "not run" is said as well.
POLICIES = (
    Policy("overlap_comm: true", "`dropless`, each stage: equal bits", {"overlap_comm": True}),
    Policy(
        "contiguous_gradients: false",
        "`dropless` at 1, `peer` at 2: equal losses; `dropless` at 2: DeepSpeed's assertion",
        {"contiguous_gradients": False},
    ),
    Policy(
        "reduce_scatter: false",
        "`peer` at 1: equal losses; `dropless` at 1: DeepSpeed's assertion",
        {"reduce_scatter": False},
    ),
    Policy(
        "zero_hpz_partition_size: 2",
        "`peer` and dense, 2 and 4 ranks: equal losses; `dropless`: DeepSpeed's assertion",
        {"zero_hpz_partition_size": 2},
    ),
    Policy("mics_shard_size: 2", "DeepSpeed's error", {"mics_shard_size": 2}),
    Policy(
        "mics_hierarchical_params_gather: true",
        "not run",
        {"mics_hierarchical_params_gather": True},
    ),
    Policy(
        "zero_quantized_weights: true",
        "`dropless` in fp32, kernels replaced by PyTorch's operators: losses differ by up to 7e-4,"
        " gradient norms by 7e-3; not run on a GPU",
        {"zero_quantized_weights": True},
    ),
    Policy(
        "zero_quantized_gradients: true",
        "`dropless`: DeepSpeed's assertion; others: no kernels on a CPU, not run on a GPU",
        {"zero_quantized_gradients": True},
    ),
    Policy(
        "zero_quantized_nontrainable_weights: true",
        "`dropless`, kernels replaced by PyTorch's operators: equal losses",
        {"zero_quantized_nontrainable_weights": True},
    ),
    Policy("zenflow", "not run", {"zenflow": {"topk_ratio": 0.1}}),
    Policy(
        "communication_data_type: bf16",
        "`dropless` in fp32, each stage: gradient norms differ by up to 7e-5",
        sections={"communication_data_type": "bf16"},
    ),
    Policy(
        "sequence_parallel_size: 2",
        "DeepSpeed counts half the ranks: its error about batch sizes",
        sections={"sequence_parallel_size": 2},
    ),
    Policy(
        "data_parallel_size: 2",
        "read with `sequence_parallel_size` only",
        sections={"data_parallel_size": 2},
    ),
    Policy(
        "tensor_parallel.autotp_size: 2",
        "DeepSpeed's assertion: the ranks have different tokens",
        sections={"tensor_parallel": {"autotp_size": 2}},
    ),
    Policy(
        "expert_parallel.enabled: true",
        "`dropless`: equal losses, it finds no layer to replace",
        sections={"expert_parallel": {"enabled": True}},
    ),
    Policy(
        "pipeline.stages: 2",
        "[pipeline parallelism](pipeline_parallelism.md)",
        sections={"pipeline": {"stages": 2}},
    ),
)

HEAD = f"""\
# What goes together

The tables are made by asking the rules that refuse a recipe or a ds_config before anything starts,
by `python docs/figures/make_figures.py`; a test fails if they differ. What they allow is trained:
rows in which every allowed pair of the first table is at least once run on {WORLD_SIZE} ranks.
In fp32 losses and gradient norms are those of one rank to 1e-6, in bf16 the mean loss is fp32's to
1e-3. `tests/integration/distributed/test_parallel_pairs.py` runs rows with every value in
`make test`, all in `make test-full`. fp16 and fp8 need a GPU and are not run.

## Recipes

On {WORLD_SIZE} ranks: each value in a row, each axis in a column, all others at their first value.
A number in brackets is a reason below. The number of ranks must be a multiple of `ep_size`.
"""
MIDDLE = """\
## ds_configs

The ZeRO stages at which a setting is allowed with each kind of MoE layer; "GPU" if not on a CPU. A
stage at which it would have no effect is refused too, without a number. Runs are of 2 ranks with
gloo if nothing else is said. All keys: [ds_configs](ds_configs.md).
"""


def page() -> str:
    """The whole page."""
    pairs, policies = Reasons(), Reasons()
    recipes = pair_table(pairs)
    settings = policy_table(POLICIES, policies)
    return "\n".join(
        [HEAD, *recipes, "", *pairs.lines(), "", MIDDLE, *settings, "", *policies.lines(), ""]
    )
