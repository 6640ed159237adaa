"""Mistakes of sources and cleaning rules from outside: each is named, with kind and document.

The kinds are defined in processes of their own, so that no other test knows them.
"""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import pytest

from data_pipeline.preprocess.pool import local_pool
from pretrain.config.recipe import Recipe

PARTS = """if True:
    import json, sys, traceback
    from collections import Counter
    from typing import ClassVar, Literal
    from data_pipeline.cleaning.config import CleaningRule
    from data_pipeline.cleaning.stage import Cleaned
    from data_pipeline.config import DataConfig
    from data_pipeline.preprocess.reader import Reader, Task
    from data_pipeline.shards.split import SplitPlan
    from data_pipeline.sources.config import SourceConfig
    from data_pipeline.sources.interface import Document, LeftOut, Source, Unit, meaning_of_reasons

    class Odd(CleaningRule):
        implementation: ClassVar[str] = "__main__:OddRule"
        kind: Literal["odd"]
        mistake: str

    class OddRule:
        def __init__(self, config):
            self.mistake = config.mistake

        def __call__(self, text):
            match self.mistake:
                case "raises":
                    raise ValueError("out of luck")
                case "none":
                    return None
                case "no text":
                    return Cleaned(None)
                case "edits":
                    return Cleaned(text, edits={"a": "b"})
            return Cleaned(text)

    class Words(SourceConfig):
        implementation: ClassVar[str] = "__main__:WordSource"
        reasons: ClassVar[dict[str, str]] = {"missing_field": "mine", "odd": "an odd word"}
        kind: Literal["words"]
        words: list[str | None]

    class WordSource(Source[Words]):
        has_files: ClassVar[bool] = False
        has_ids: ClassVar[bool] = True

        def units(self, unit_bytes):
            return [Unit(self.context.name, ("words",), n, n + 1) for n in range(len(self.config.words))]

        def read(self, unit):
            word = self.config.words[unit.start]
            self.notes["quotes"] += 1
            yield None if word is None else Document(word, f"words:{unit.start}", key=word)

    def read(rules, words, split_by="content"):
        config = DataConfig.model_validate({
            "source": {"kind": "words", "words": words}, "cleaning": {"rules": rules},
            "tokenizer": {"kind": "train_bpe", "vocab_size": 300}, "split_by": split_by,
        })
        task = Task(config, "nowhere", SplitPlan(0.5))
        records = []
        for number in range(len(words)):
            reader = Reader(task, number, Unit("all", ("words",), number, number + 1), None)
            list(reader.documents_with_split())
            records.append(reader.record())
        return records
"""


def in_a_process(script: str) -> Any:
    """What a script that follows the parts prints as JSON."""
    done = subprocess.run(
        [sys.executable, "-c", PARTS + script], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_a_rule_that_fails_or_returns_something_else_is_named_at_its_document() -> None:
    said = in_a_process("""
    said = {}
    for mistake in ("raises", "none", "no text", "edits"):
        try:
            read([{"kind": "odd", "mistake": mistake}], ["first"])
        except Exception as error:
            said[mistake] = "".join(traceback.format_exception_only(error))
    print(json.dumps(said))
""")
    assert set(said) == {"raises", "none", "no text", "edits"}
    for text in said.values():
        assert "cleaning rule 'odd'" in text and "words:0" in text, text
    assert "ValueError: out of luck" in said["raises"]


def test_a_source_that_yields_something_else_is_named() -> None:
    said = in_a_process("""
    try:
        read([], ["first", None])
    except TypeError as error:
        print(json.dumps("".join(traceback.format_exception_only(error))))
""")
    assert "'words' yields None" in said and "source 'all'" in said


def test_remarks_are_counted_for_each_unit_and_ids_may_decide_the_split() -> None:
    assert (
        in_a_process("""
    print(json.dumps([dict(one.notes) for one in read([], ["a", "b", "c"], split_by="id")]))
""")
        == [{"quotes": 1}] * 3
    )


def test_a_plugin_describes_its_own_reasons_and_none_of_ours() -> None:
    meanings = in_a_process("print(json.dumps(meaning_of_reasons()))".join(["\n    ", "\n"]))
    assert meanings["odd"] == "an odd word" and meanings["missing_field"] != "mine"


class AwkwardError(Exception):
    """Cannot be pickled: its arguments are not those of its constructor."""

    def __init__(self, text: str, limit: int) -> None:
        super().__init__(f"{text} over {limit}")


def fail(limit: int) -> None:
    raise AwkwardError("too much", limit)


def test_an_error_that_cannot_be_pickled_is_not_taken_for_a_killed_worker() -> None:
    with (
        pytest.raises(RuntimeError, match="AwkwardError: too much over 5"),
        local_pool(2) as pool,
    ):
        list(pool.run(fail, [5]))


def test_a_recipe_has_a_json_schema() -> None:
    schema = json.dumps(Recipe.model_json_schema())
    assert "train_bpe" in schema and "softmax_topk" in schema
