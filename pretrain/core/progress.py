"""Progress of a long stage: a bar on a terminal, a line now and then elsewhere.

Both show the rate of this stage alone.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from types import TracebackType
from typing import Any, Self

from tqdm import tqdm

BAR_SECONDS = 0.5
LINE_SECONDS = 30.0
BAR = "{desc}: {percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}{postfix}]"
WITHOUT_TOTAL = "{desc}: {n_fmt} [{elapsed}{postfix}]"
JUST_A_TITLE = "{desc} [{elapsed}]"


class Tally:
    """Documents and characters read so far, by all processes that share it.

    Args:
        shared: an array of two counters of :mod:`multiprocessing`; without it they are this
            process's own.
    """

    def __init__(self, shared: Any = None) -> None:
        self._lock = threading.Lock() if shared is None else shared.get_lock()
        self._counts: Any = [0, 0] if shared is None else shared.get_obj()

    def add(self, documents: int, characters: int) -> None:
        """Count documents and their characters."""
        with self._lock:
            self._counts[0] += documents
            self._counts[1] += characters

    def read(self) -> tuple[int, int]:
        """(documents, characters) counted so far."""
        with self._lock:
            return int(self._counts[0]), int(self._counts[1])


class _Current:
    """The tally that this process adds to."""

    tally = Tally()


def current_tally() -> Tally:
    """The tally of this process."""
    return _Current.tally


def use_tally(tally: Tally) -> None:
    """Count into ``tally`` from now on."""
    _Current.tally = tally


class Stage:
    """One stage of a command, shown on standard error.

    Args:
        show: if false, nothing is printed.
        total: of what :meth:`advance` counts; None if it is not known.
        unit: of ``total``; empty for a stage without steps.
        initial: the part that an earlier run has done, which does not count in the rate.
        counts_documents: the rate is that of the documents which :func:`current_tally` counts
            inside the stage.
    """

    def __init__(
        self,
        title: str,
        show: bool,
        total: float | None = None,
        unit: str = "",
        initial: int = 0,
        counts_documents: bool = False,
    ) -> None:
        self.title = title
        self.show = show
        self.total = total
        self.unit = unit
        self.initial = initial
        self.done: float = initial
        self._before = current_tally().read() if counts_documents else None
        self._ended = threading.Event()
        self._is_terminal = sys.stderr.isatty()

    def __enter__(self) -> Self:
        self._started = time.perf_counter()
        if self.show:
            self._bar = self._open_bar() if self._is_terminal else None
            if self._bar is None:
                self._print(self._size())
            # A thread, so that a stage that blocks in native code still shows its time.
            self._thread = threading.Thread(target=self._keep_showing, daemon=True)
            self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._ended.set()
        if not self.show:
            return
        self._thread.join()
        if self._bar is not None:
            self._refresh(self._bar)
            self._bar.close()
        elif kind is None and self.seconds >= 1.0:
            self._print(f"done in {_clock(self.seconds)}{self._rate_after_comma()}")

    @property
    def seconds(self) -> float:
        """Seconds since the stage began."""
        return time.perf_counter() - self._started

    def advance(self, amount: float) -> None:
        """Count ``amount`` more units as done."""
        self.done += amount

    def rate(self) -> str:
        """The mean speed of this stage per second: documents and characters, or its unit."""
        # The clock may not have advanced yet.
        seconds = self.seconds or 1.0
        if self._before is not None:
            documents, characters = (
                now - before
                for now, before in zip(current_tally().read(), self._before, strict=True)
            )
            if documents:
                return (
                    f"{documents / seconds:,.0f} documents/s, {characters / seconds / 1e6:.2f} M "
                    "chars/s"
                )
        done = self.done - self.initial
        return f"{tqdm.format_sizeof(done / seconds)}{self._name}/s" if done and self.unit else ""

    @property
    def _name(self) -> str:
        return self.unit if self.unit == "B" else f" {self.unit}s"

    def _rate_after_comma(self) -> str:
        return f", {rate}" if (rate := self.rate()) else ""

    def _size(self) -> str:
        if not self.total:
            return ""
        return (
            f"{self.total:,.0f}{self._name}"
            if self.unit != "B"
            else f"{tqdm.format_sizeof(self.total)}B"
        )

    def _open_bar(self) -> Any:
        layout = BAR if self.total else WITHOUT_TOTAL
        if not self.total and not self.unit:
            layout = JUST_A_TITLE
        # A terminal may not know its size, and tqdm would then print no bar.
        knows_size = os.get_terminal_size(sys.stderr.fileno()).columns > 0
        # Without smoothing the remaining time follows the mean rate since the start of this stage.
        return tqdm(
            total=self.total,
            desc=self.title,
            initial=self.initial,
            unit_scale=True,
            smoothing=0,
            miniters=0,
            bar_format=layout,
            ncols=None if knows_size else 80,
            nrows=None if knows_size else 20,
        )

    def _refresh(self, bar: Any) -> None:
        if self.total and not bar.total:
            bar.bar_format = BAR
        bar.total = self.total
        bar.set_postfix_str(self.rate(), refresh=False)
        bar.update(self.done - bar.n)
        bar.refresh()

    def _keep_showing(self) -> None:
        while not self._ended.wait(LINE_SECONDS if self._bar is None else BAR_SECONDS):
            if self._bar is not None:
                self._refresh(self._bar)
            else:
                share = f"{self.done / self.total:.0%} of {self._size()}, " if self.total else ""
                self._print(f"{share}{_clock(self.seconds)}{self._rate_after_comma()}")

    def _print(self, text: str) -> None:
        print(f"{self.title}: {text}" if text else self.title, file=sys.stderr, flush=True)


def _clock(seconds: float) -> str:
    return str(tqdm.format_interval(seconds))
