"""The drill: a reference run, and the same run killed at random moments until it ends."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from pretrain.core.errors import DONE, PipelineError
from pretrain.soak import observed
from pretrain.soak.attempt import LAUNCHER, Attempt, Layout, training_command

POLL_SECONDS = 0.003
START, TRAINING, SAVE = "start", "training", "save"
# Of the kills that are not aimed at a save, this share hits a run that still starts.
START_SHARE = 0.12
LAUNCHER_SHARE = 0.2
# Before the end of the run, without a kill.
SPARE_STEPS = 5


@dataclass(frozen=True)
class Settings:
    """What a drill does.

    Attributes:
        save_share: of the kills, at least this share happens during a save.
        layouts: the first one is the reference's; restarts take the next one each, cyclically.
        settings: ``A.B=C`` for both runs.
        hang_seconds: an attempt without a new step for so long hangs.
        orphan_seconds: the processes of a killed attempt must end within.
    """

    recipe: str
    folder: Path
    kills: int
    steps: int
    layouts: tuple[Layout, ...]
    settings: tuple[str, ...]
    seed: int
    save_share: float = 0.3
    hang_seconds: float = 600.0
    orphan_seconds: float = 60.0

    @property
    def reference(self) -> Path:
        """The folder of the uninterrupted run."""
        return self.folder / "reference"

    @property
    def killed(self) -> Path:
        """The folder of the killed run."""
        return self.folder / "killed"


@dataclass
class AttemptResult:
    """What one start of the killed run did.

    Attributes:
        phase: in which it was killed; None if it ended by itself.
        published: the newest checkpoint at its start, and at its end.
        resumed: the step that training continued from; None if it did not come so far.
        reached: the last step with a record.
        start_seconds: until the first step that was not there before; None without one.
    """

    layout: str
    phase: str | None = None
    victim: str | None = None
    code: int | None = None
    published: tuple[int, int] = (0, 0)
    resumed: int | None = None
    reached: int = 0
    seconds: float = 0.0
    start_seconds: float | None = None
    orphans: list[str] = field(default_factory=list)
    damaged: list[str] = field(default_factory=list)


class AttemptFailed(PipelineError):
    """A run of the drill that ended with an error, or hangs."""


class Drill:
    """Runs both runs.

    Args:
        advance: called after each attempt of the killed run.
    """

    def __init__(
        self, settings: Settings, advance: Callable[[AttemptResult], None] = lambda _: None
    ) -> None:
        self.settings = settings
        self.results: list[AttemptResult] = []
        self.reference_seconds = 0.0
        self._advance = advance
        self._random = random.Random(settings.seed)
        # Seconds that a start took and that a save was seen for.
        self._start_seconds = 10.0
        self._save_seconds = 0.05

    def run_reference(self) -> None:
        """Run without interruption.

        Raises:
            AttemptFailed: if it fails or hangs.
        """
        began = time.monotonic()
        attempt = self._start(self.settings.reference, self.settings.layouts[0])
        code = self._watch(attempt, self.settings.reference, lambda: False)
        attempt.orphans(self.settings.orphan_seconds)
        self.reference_seconds = time.monotonic() - began
        if code != DONE:
            output = self.settings.folder / "reference.txt"
            raise AttemptFailed(
                f"the uninterrupted run ended with exit code {code}: read the end of {output}"
            )

    def run_killed(self) -> None:
        """Start the run again until it ends by itself; kill it ``kills`` times before."""
        layouts = self.settings.layouts
        # Two more than the kills: the last start, and one that a kill may have come too late for.
        while len(self.results) < self.settings.kills + 2:
            layout = layouts[len(self.results) % len(layouts)]
            result = self._attempt(layout)
            self.results.append(result)
            self._advance(result)
            if result.phase is None:
                return

    def kills(self, phase: str | None = None) -> int:
        """How many kills there were, in all or in a phase."""
        phases = [result.phase for result in self.results if result.phase is not None]
        return len(phases) if phase is None else phases.count(phase)

    def _start(self, run: Path, layout: Layout) -> Attempt:
        settings = self.settings
        command = training_command(layout, settings.recipe, [*settings.settings, f"run_path={run}"])
        return Attempt(command, layout.ranks, settings.folder / f"{run.name}.txt")

    def _attempt(self, layout: Layout) -> AttemptResult:
        run = self.settings.killed
        result = AttemptResult(str(layout))
        before = observed.newest_step(run)
        num_starts = len(observed.starts(run))
        began = time.monotonic()
        attempt = self._start(run, layout)
        if self.kills() < self.settings.kills:
            self._kill(attempt, result, before)
        else:
            self._watch(attempt, run, lambda: False)
        result.orphans = attempt.orphans(self.settings.orphan_seconds)
        result.code = attempt.code
        result.seconds = time.monotonic() - began
        result.published = (before, observed.newest_step(run))
        result.reached = observed.last_step(run)
        result.damaged = observed.damaged_checkpoints(run)
        if new := observed.starts(run)[num_starts:]:
            result.resumed = new[0]
        return result

    def _watch(self, attempt: Attempt, run: Path, until: Callable[[], bool]) -> int | None:
        """Wait until something is seen (None) or the command has ended (its exit code).

        Raises:
            AttemptFailed: if no step is made for too long; everything is killed first.
        """
        newest, since = observed.last_step(run), time.monotonic()
        while not until():
            if attempt.code is not None:
                return attempt.code
            step = observed.last_step(run)
            if step != newest:
                newest, since = step, time.monotonic()
            elif time.monotonic() - since > self.settings.hang_seconds:
                attempt.orphans(0)
                raise AttemptFailed(
                    f"{run} made no step for {self.settings.hang_seconds:.0f} s after step "
                    f"{newest}: read the end of {run}.txt and {run / 'log.txt'}"
                )
            time.sleep(POLL_SECONDS)
        return None

    def _kill(self, attempt: Attempt, result: AttemptResult, published: int) -> None:
        """Kill a process of the attempt at a random moment, unless it ends before."""
        draw, run, began = self._random, self.settings.killed, time.monotonic()
        stale, before = observed.saves_in_progress(run), observed.metrics_time(run)
        in_save = self.kills(SAVE) < self.settings.save_share * (self.kills() + 1)
        in_save = in_save or draw.random() < self.settings.save_share
        if not in_save and draw.random() < START_SHARE:
            end = began + draw.uniform(0.1, 1.0) * self._start_seconds
            if self._watch(attempt, run, lambda: time.monotonic() > end) is None:
                self._strike(attempt.victims(), result, START)
            return
        # The records of an earlier start beyond the checkpoint are removed when training begins.
        if self._watch(attempt, run, lambda: observed.metrics_time(run) != before) is not None:
            return
        if self._watch(attempt, run, lambda: observed.last_step(run) > published) is not None:
            return
        result.start_seconds = time.monotonic() - began
        self._start_seconds = 0.7 * self._start_seconds + 0.3 * result.start_seconds
        victims = attempt.victims()
        target = published + self._steps_to_kill(published)
        if not in_save:
            if self._watch(attempt, run, lambda: observed.last_step(run) >= target) is None:
                self._pause_within_step(run)
                self._strike(victims, result, TRAINING, run, stale)
            return

        def saves() -> bool:
            reached = observed.last_step(run) >= target
            return reached and observed.saves_in_progress(run) != stale

        if self._watch(attempt, run, saves) is None:
            time.sleep(draw.uniform(0, self._save_seconds))
            self._strike(victims, result, SAVE, run, stale)

    def _steps_to_kill(self, published: int) -> int:
        """A random number of steps that leaves enough of the run for the other kills."""
        left = max(1, self.settings.kills - self.kills())
        steps = self.settings.steps - published
        # A kill that is to come after the last save would come too late.
        latest = max(1, steps - SPARE_STEPS)
        return self._random.randint(1, min(latest, max(1, round(1.8 * steps / left))))

    def _pause_within_step(self, run: Path) -> None:
        """Wait for a random part of the time that the last steps took."""
        first = observed.last_step(run)
        began = time.monotonic()
        # At most a second: a step of a small model takes a few milliseconds.
        while observed.last_step(run) == first and time.monotonic() - began < 1.0:
            time.sleep(POLL_SECONDS)
        time.sleep(self._random.random() * (time.monotonic() - began))

    def _strike(
        self,
        victims: dict[str, list[psutil.Process]],
        result: AttemptResult,
        phase: str,
        run: Path | None = None,
        stale: observed.Saves | None = None,
    ) -> None:
        """Send SIGKILL to one of the processes, and note in which phase it was."""
        ranks = sorted(name for name in victims if name != LAUNCHER)
        names = ranks or list(victims)
        if LAUNCHER in victims and self._random.random() < LAUNCHER_SHARE:
            names = [LAUNCHER]
        if not names:
            return
        name = self._random.choice(names)
        process = self._random.choice(victims[name])
        try:
            process.kill()
        except psutil.NoSuchProcess:
            return
        if run is not None and stale is not None:
            saves = observed.saves_in_progress(run)
            in_save = any(stale.get(folder) != changed for folder, changed in saves.items())
            if phase == SAVE and not in_save:
                # It was faster than expected: next time the pause is shorter.
                self._save_seconds *= 0.7
            elif phase == SAVE:
                self._save_seconds = min(1.15 * self._save_seconds, 2.0)
            phase = SAVE if in_save else TRAINING
        result.phase, result.victim = phase, name
