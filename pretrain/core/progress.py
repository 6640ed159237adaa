"""How far a long stage is: a bar on a terminal, a line now and then elsewhere, both with the rate
of this stage alone.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from types import TracebackType
from typing import Any, Self

from tqdm import tqdm

BAR_SECONDS, LINE_SECONDS = 0.5, 30.0
BAR = "{desc}: {percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}{postfix}]"
WITHOUT_TOTAL = "{desc}: {n_fmt} [{elapsed}{postfix}]"
JUST_A_TITLE = "{desc} [{elapsed}]"


class Tally:
    """Documents and characters that were read so far, by all processes that share it.

    Args:
        shared: an array of two counters of :mod:`multiprocessing`; without it they are this
            process's own.
    """

    def __init__(self, shared: Any = None) -> None:
        self._lock = threading.Lock() if shared is None else shared.get_lock()
        self._counts: Any = [0, 0] if shared is None else shared.get_obj()

    def add(self, documents: int, characters: int) -> None:
        with self._lock:
            self._counts[0] += documents
            self._counts[1] += characters

    def read(self) -> tuple[int, int]:
        with self._lock:
            return int(self._counts[0]), int(self._counts[1])


class _Current:
    """The tally that this process adds to."""

    tally = Tally()


def current_tally() -> Tally:
    return _Current.tally


def use_tally(tally: Tally) -> None:
    _Current.tally = tally


class Stage:
    """One stage of a command on standard error, from its first moment on.

    Args:
        show: without it nothing is printed.
        total: of what :meth:`advance` counts; None where it is not known.
        unit: of it; empty for a stage without steps.
        initial: what an earlier run has done of it, which is no speed of this one.
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
        self.title, self.show, self.total, self.unit, self.initial = (
            title,
            show,
            total,
            unit,
            initial,
        )
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
        return time.perf_counter() - self._started

    def advance(self, amount: float) -> None:
        """So much more is done."""
        self.done += amount

    def rate(self) -> str:
        """Return the mean speed of this stage: documents and characters, or its unit, a second."""
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
        layout = BAR if self.total else WITHOUT_TOTAL if self.unit else JUST_A_TITLE
        # A terminal may not know its size.
        size = (
            {} if os.get_terminal_size(sys.stderr.fileno()).columns else {"ncols": 80, "nrows": 20}
        )
        # Without smoothing the remaining time follows the mean rate since the start of this stage.
        options: dict[str, Any] = {
            "unit_scale": True,
            "smoothing": 0,
            "miniters": 0,
            "bar_format": layout,
            **size,
        }
        return tqdm(total=self.total, desc=self.title, initial=self.initial, **options)

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
