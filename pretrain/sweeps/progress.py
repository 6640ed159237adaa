"""What a sweep says while it runs: one bar over the steps of all runs with the time left, and a
line when a run starts or ends.
"""

from __future__ import annotations

import math
import sys
from pathlib import Path

from tqdm import tqdm

from pretrain.sweeps.axes import Point
from pretrain.sweeps.study import Record


class SweepProgress:
    """On standard error; where that is no terminal, the bar is a line every half minute.

    Args:
        steps: of each run, by name; a search adds its runs as it chooses them.
        total_runs, total_steps: of the whole sweep.
        reached: the step each run has already reached.
    """

    def __init__(
        self, total_runs: int, total_steps: int, settled: dict[str, int], reached: dict[str, int]
    ) -> None:
        interval = 0.5 if sys.stderr.isatty() else 30.0
        self.total_runs, self.settled, self.reached = total_runs, dict(settled), dict(reached)
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
        tqdm.write(text, file=sys.stderr)

    def started(self, point: Point) -> None:
        self._waiting.discard(point.run)
        self.say(f"started {point.run}")

    def waiting(self, point: Point, folder: Path) -> None:
        if point.run not in self._waiting:
            self._waiting.add(point.run)
            self.say(
                f"{point.run}: a process of an earlier start, or of another machine, still writes"
                f" to {folder}: waiting for it to end"
            )

    def ended(self, record: Record, steps: int) -> None:
        """A run has ended in one way or another; ``steps`` are those it was to take."""
        run, loss = record.point.run, record.loss
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
        how = (
            "ending them without saving"
            if again
            else "waiting for them to save (Ctrl-C once more ends them at once)"
        )
        self.say(f"stopping: {running} runs are going on, {how}")

    def show(self, steps: dict[str, int]) -> None:
        """``steps`` that the running ones have reached."""
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
        self.bar.close()
