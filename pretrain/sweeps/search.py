"""Points that optuna chooses.

The records of the runs are the only store: an optuna study is made from them whenever it is needed.
So an interrupted search continues as if nothing had happened, and no second store can disagree with
the runs' folders.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from pretrain.core.errors import NON_FINITE
from pretrain.sweeps.axes import Axis, Choice, Point, point_of, short_names
from pretrain.sweeps.study import TRIAL, Record

if TYPE_CHECKING:
    from optuna import Study
    from optuna.distributions import BaseDistribution
    from optuna.samplers import BaseSampler
    from optuna.trial import FrozenTrial

# No run is pruned before this many others have finished, or before it has validated more than once:
# early losses depend more on the warm-up than on the point.
PRUNING_STARTS_AFTER_RUNS = 4
PRUNING_STARTS_AFTER_VALIDATIONS = 1


def trial_name(number: int) -> str:
    """The name of a search's point; zeros keep the names in order."""
    return f"{TRIAL}{number:04d}"


def random_points(axes: Sequence[Axis], count: int, seed: int) -> list[Point]:
    """``count`` points drawn independently and uniformly; on a log scale for ``log:`` ranges."""
    from optuna.samplers import RandomSampler

    study = _study(RandomSampler(seed))
    return [_ask(study, axes, number) for number in range(count)]


def next_point(axes: Sequence[Axis], records: Sequence[Record], seed: int) -> Point:
    """The next trial by the tree-structured Parzen estimator (TPE, Bergstra et al. 2011).

    With one run at a time the search is the same however often it was interrupted.

    Args:
        records: all earlier trials, in order.
    """
    from optuna.samplers import TPESampler

    # The seed differs for each trial because the sampler is new for each: with one seed it would
    # draw the same point again. constant_liar counts active runs as bad ones, so that parallel
    # trials are spread out.
    study = _study(TPESampler(seed=seed + len(records), multivariate=True, constant_liar=True))
    study.add_trials([_trial(record, axes) for record in records])
    return _ask(study, axes, len(records))


def should_prune(records: Sequence[Record], validation: Sequence[tuple[int, float]]) -> bool:
    """Whether a run is worse than the median of the finished runs at the same step.

    Args:
        records: of all runs.
        validation: (step, loss) of the run; its best loss so far is compared.
    """
    from optuna.pruners import MedianPruner
    from optuna.samplers import RandomSampler
    from optuna.trial import TrialState, create_trial

    if not validation:
        return False
    study = _study(RandomSampler(0))
    for record in records:
        if record.loss is not None:
            study.add_trial(
                create_trial(
                    state=TrialState.COMPLETE,
                    value=record.loss,
                    intermediate_values=dict(record.validation),
                )
            )
    running = create_trial(state=TrialState.RUNNING, intermediate_values=dict(validation))
    pruner = MedianPruner(PRUNING_STARTS_AFTER_RUNS, n_min_trials=PRUNING_STARTS_AFTER_RUNS)
    return len(validation) > PRUNING_STARTS_AFTER_VALIDATIONS and bool(pruner.prune(study, running))


def _study(sampler: BaseSampler) -> Study:
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    return optuna.create_study(direction="minimize", sampler=sampler)


def _distributions(axes: Sequence[Axis]) -> dict[str, BaseDistribution]:
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    found: dict[str, BaseDistribution] = {}
    for axis in axes:
        if axis.scale is None:
            found[axis.name] = CategoricalDistribution([choice.label for choice in axis.options])
        elif axis.scale == "int":
            found[axis.name] = IntDistribution(round(axis.low), round(axis.high))
        else:
            found[axis.name] = FloatDistribution(axis.low, axis.high, log=axis.scale == "log")
    return found


def _ask(study: Study, axes: Sequence[Axis], number: int) -> Point:
    values = study.ask(_distributions(axes)).params
    return point_of(
        {axis.name: _choice(axis, values[axis.name]) for axis in axes},
        short_names([axis.name for axis in axes]),
        trial_name(number),
    )


def _choice(axis: Axis, value: float | str) -> Choice:
    if axis.scale is not None:
        return axis.at(float(value))
    return next(option for option in axis.options if option.label == value)


def _trial(record: Record, axes: Sequence[Axis]) -> FrozenTrial:
    """A run as a trial of optuna.

    A diverged or pruned run counts as worse than all finished ones; other failures are ignored.
    """
    from optuna.trial import TrialState, create_trial

    diverged = (
        record.state == "failed"
        and record.attempts
        and record.attempts[-1].get("exit_code") == NON_FINITE
    )
    state = {
        "finished": TrialState.COMPLETE,
        "pruned": TrialState.PRUNED,
        "failed": TrialState.FAIL,
        "refused": TrialState.FAIL,
    }.get(record.state, TrialState.RUNNING)
    params = {
        axis.name: record.point.values[axis.name]
        if axis.scale is None
        else _within(axis, record.point.numbers[axis.name])
        for axis in axes
    }
    return create_trial(
        state=TrialState.PRUNED if diverged else state,
        value=record.loss,
        params=params,
        distributions=_distributions(axes),
        intermediate_values=dict(record.validation),
    )


def _within(axis: Axis, number: float) -> float | int:
    """The value, moved into the range: rounding to four digits may have put it just outside."""
    inside = min(max(number, axis.low), axis.high)
    return round(inside) if axis.scale == "int" else inside
