"""Progress of a sweep: one bar over the steps of all runs, and a line when a run starts or ends."""

from __future__ import annotations

import math
import sys
from pathlib import Path

from tqdm import tqdm

from pretrain.sweeps.axes import Point
from pretrain.sweeps.study import Record


class SweepProgress:
    """The bar on standard error; if that is no terminal, the bar is a line every half minute.

    Args:
        total_runs, total_steps: of the whole sweep.
        settled: the steps of each run that has ended, by name.
        reached: the step that each other run has reached in earlier starts.
    """

    def __init__(
        self, total_runs: int, total_steps: int, settled: dict[str, int], reached: dict[str, int]
    ) -> None:
        interval = 0.5 if sys.stderr.isatty() else 30.0
        self.total_runs = total_runs
        self.settled = dict(settled)
        self.reached = dict(reached)
        self.bar = tqdm(
            total=total_steps,
            initial=sum(settled.values()) + sum(reached.values()),
            unit="step",
            desc=f"{len(settled)}/{total_runs} runs",
            mininterval=interval,
            maxinterval=interval,
            dynamic_ncols=True,
        )
        self._waiting: set[str] = set()

    def say(self, text: str) -> None:
        """Prints a line above the bar."""
        tqdm.write(text, file=sys.stderr)

    def started(self, point: Point) -> None:
        """A run has started."""
        self._waiting.discard(point.run)
        self.say(f"started {point.run}")

    def waiting(self, point: Point, folder: Path) -> None:
        """A run cannot start yet; said once for each run."""
        if point.run not in self._waiting:
            self._waiting.add(point.run)
            self.say(
                f"{point.run}: a process of an earlier start, or of another machine, still writes"
                f" to {folder}: waiting for it to end"
            )

    def ended(self, record: Record, steps: int) -> None:
        """A run has ended; ``steps`` is the number of steps that it was to take."""
        run = record.point.run
        loss = record.loss
        if record.state != "interrupted":
            self.reached.pop(run, None)
            self.settled[run] = steps
        self.bar.set_description(f"{len(self.settled)}/{self.total_runs} runs", refresh=False)
        if loss is not None and record.result is not None:
            what = (
                f"perplexity {math.exp(loss):.4g}, {record.result['parameters_active']:,} of"
                f" {record.result['parameters_total']:,} parameters active"
            )
        else:
            what = record.error or ""
        self.say(f"{record.state} {run}{': ' + what if what else ''}")

    def stopping(self, running: int, again: bool) -> None:
        """The sweep was asked to stop, for the first time or ``again``."""
        how = (
            "ending them without saving"
            if again
            else "waiting for them to save (Ctrl-C once more ends them at once)"
        )
        self.say(f"stopping: {running} runs are active, {how}")

    def show(self, steps: dict[str, int]) -> None:
        """Moves the bar to the steps that the active runs have reached, by name."""
        # A resumed run starts below the step it had reached: the bar must not move back.
        self.reached |= {
            run: max(step, self.reached.get(run, 0))
            for run, step in steps.items()
            if run not in self.settled
        }
        self.bar.set_postfix_str(
            ", ".join(f"{run} {step}" for run, step in steps.items()), refresh=False
        )
        self.bar.update(sum(self.settled.values()) + sum(self.reached.values()) - self.bar.n)

    def close(self) -> None:
        """Leaves the bar as it is, and ends its line."""
        self.bar.close()
