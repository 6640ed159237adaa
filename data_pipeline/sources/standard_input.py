"""What is piped into the command."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Iterator
from typing import Literal

from data_pipeline.sources.files import BLOCK_BYTES
from data_pipeline.sources.interface import Document, LeftOut, Source, Unit
from data_pipeline.sources.jsonl import Jsonl
from data_pipeline.sources.text import Text
from pretrain.config.data_schema import JsonlSource, StandardInputSource, TextSource
from pretrain.config.errors import ConfigError, DataError

NAME = "stdin"


class StandardInput(Source[StandardInputSource]):
    """A pipe can be read once only, so it is copied to ``context.spool`` first; a copy that is there already is used instead of the pipe."""

    has_files = False

    def units(self, unit_bytes: int) -> list[Unit]:
        """
        Raises:
            ConfigError: where standard input is a terminal or closed.
            DataError: where nothing came through the pipe.
        """
        spool = self._spool
        if not os.path.exists(spool):
            _copy_standard_input(spool)
        if not os.path.getsize(spool):
            os.remove(spool)
            raise DataError("standard input was empty: pipe the records into the command, such as 'zcat a.jsonl.gz | ...'")
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
        config, files = self.config, [self._spool]
        if config.format == "jsonl":
            fields = config.model_dump(include={"text_field", "id_field", "metadata_fields", "encoding"})
            return Jsonl(JsonlSource(kind="jsonl", input=files, split=config.split, **fields), self.context)
        document: Literal["line", "file"] = "line" if config.format == "line" else "file"
        return Text(TextSource(kind="text", input=files, split=config.split, document=document, encoding=config.encoding), self.context)


def _copy_standard_input(spool: str) -> None:
    if sys.stdin is None or sys.stdin.closed or sys.stdin.isatty():
        raise ConfigError("source kind 'stdin' reads what is piped into the command, and standard input is no pipe: use 'cat file | ...'")
    os.makedirs(os.path.dirname(spool) or ".", exist_ok=True)
    partial = f"{spool}.partial"
    with open(partial, "wb") as copy:
        shutil.copyfileobj(sys.stdin.buffer, copy, BLOCK_BYTES)
    os.replace(partial, spool)
