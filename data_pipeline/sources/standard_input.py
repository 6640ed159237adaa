"""A source of the text that is piped into the command."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Iterator
from typing import Literal

from data_pipeline.sources.config import JsonlSource, StandardInputSource, TextSource
from data_pipeline.sources.files import BLOCK_BYTES
from data_pipeline.sources.interface import Document, LeftOut, Source, Unit
from data_pipeline.sources.jsonl import Jsonl
from data_pipeline.sources.text import Text
from pretrain.core.errors import ConfigError, DataError

NAME = "stdin"


class StandardInput(Source[StandardInputSource]):
    """A pipe can be read once only, so it is copied to ``context.spool`` first.

    A copy that an unfinished build has left counts if the same comes through the pipe again, or
    nothing.
    """

    has_files = False

    def units(self, unit_bytes: int) -> list[Unit]:
        """Copy what comes through the pipe, and return it as one unit.

        Raises:
            ConfigError: if standard input is a terminal or closed.
            DataError: if nothing came through the pipe.
        """
        spool = self._spool
        if os.path.exists(spool):
            _compare_standard_input(spool)
        else:
            _copy_standard_input(spool)
        if not os.path.getsize(spool):
            os.remove(spool)
            raise DataError(
                "standard input was empty: pipe the records into the command, such as 'zcat"
                " a.jsonl.gz | ...'"
            )
        try:
            return self._source().units(unit_bytes)
        except DataError as error:
            raise DataError(str(error).replace(spool, NAME)) from None

    def read(self, unit: Unit) -> Iterator[Document | LeftOut]:
        source = self._source()
        for result in source.read(unit):
            if isinstance(result, LeftOut):
                yield result._replace(path=NAME)
            elif result.key is None:
                yield result._replace(id=NAME + result.id.removeprefix(self._spool), file=None)
            else:
                yield result
        self.lines_read = source.lines_read

    @property
    def _spool(self) -> str:
        assert self.context.spool is not None
        return self.context.spool

    def _source(self) -> Jsonl | Text:
        config = self.config
        files = [self._spool]
        if config.format == "jsonl":
            fields = config.model_dump(
                include={"text_field", "id_field", "metadata_fields", "encoding"}
            )
            return Jsonl(
                JsonlSource(kind="jsonl", input=files, split=config.split, **fields), self.context
            )
        document: Literal["line", "file"] = "line" if config.format == "line" else "file"
        return Text(
            TextSource(
                kind="text",
                input=files,
                split=config.split,
                document=document,
                encoding=config.encoding,
            ),
            self.context,
        )


def _is_open() -> bool:
    return sys.stdin is not None and not sys.stdin.closed and not sys.stdin.isatty()


def _copy_standard_input(spool: str) -> None:
    if not _is_open():
        raise ConfigError(
            "source kind 'stdin' reads what is piped into the command, and standard input is no"
            " pipe: use 'cat file | ...'"
        )
    os.makedirs(os.path.dirname(spool) or ".", exist_ok=True)
    partial = f"{spool}.partial"
    with open(partial, "wb") as copy:
        shutil.copyfileobj(sys.stdin.buffer, copy, BLOCK_BYTES)
    os.replace(partial, spool)


def _compare_standard_input(spool: str) -> None:
    """Replace the copy if the pipe holds something else.

    Nothing is written as long as the content is the same.
    """
    if not _is_open():
        return
    same = 0
    partial = f"{spool}.partial"
    with open(spool, "rb") as kept:
        while (block := sys.stdin.buffer.read(BLOCK_BYTES)) and kept.read(len(block)) == block:
            same += len(block)
        if not block and same in (0, os.path.getsize(spool)):
            return
        kept.seek(0)
        with open(partial, "wb") as copy:
            for start in range(0, same, BLOCK_BYTES):
                copy.write(kept.read(min(BLOCK_BYTES, same - start)))
            copy.write(block)
            shutil.copyfileobj(sys.stdin.buffer, copy, BLOCK_BYTES)
    os.replace(partial, spool)
