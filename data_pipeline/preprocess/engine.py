"""Chooses the engine that encodes a corpus.

One worker measures while the others begin with the most likely choice.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import takewhile
from pathlib import Path

from data_pipeline.preprocess.plan import BuildPlan, open_sources
from data_pipeline.preprocess.pool import Pool
from data_pipeline.preprocess.reader import Task
from data_pipeline.preprocess.worker import choose, encode_ahead, unit_folder
from data_pipeline.sources.interface import Document
from data_pipeline.tokenizer.engine_choice import LIKELY_ENGINE
from data_pipeline.tokenizer.sentencepiece_reference import SentencePieceReference

SAMPLE_CHARACTERS = 1 << 16
SAMPLED_UNITS = 8
# Choosing an engine takes a second, in which the tokenizers library encodes this much on a few
# cores.
WORTH_CHOOSING_FOR = 8 << 20


def fit_engine(plan: BuildPlan, task: Task, pool: Pool) -> str:
    """The engine for a build, by a sample of its corpus.

    Units that were encoded in the meantime stay if their engine is the one; else the next stage
    finds that they are of another plan. The task's engine is the tokenizer's own library.
    """
    # The other engines hold no SentencePiece model.
    if plan.input_bytes < WORTH_CHOOSING_FOR or task.engine == SentencePieceReference.engine:
        return task.engine
    likely = replace(task, engine=LIKELY_ENGINE)
    choice = pool.begin(choose, (likely, sample_texts(plan, task)))
    missing = (
        number
        for number in range(len(plan.units))
        if not unit_folder(task.workspace, "units", number).exists()
    )
    if not plan.config.streaming:
        jobs = ((likely, number, plan.units[number]) for number in missing)
        for _ in pool.run(encode_ahead, takewhile(lambda _: not choice.done(), jobs)):
            pass
    return choice.result()


def sample_texts(plan: BuildPlan, task: Task) -> list[str]:
    """A little of the corpus, from units spread over it."""
    sources = open_sources(plan.config, Path(task.workspace))
    spread = plan.units[:: max(1, len(plan.units) // SAMPLED_UNITS)][:SAMPLED_UNITS]
    texts: list[str] = []
    for number, unit in enumerate(spread, 1):
        for found in sources[unit.source].read(unit):
            if sum(map(len, texts)) >= SAMPLE_CHARACTERS * number / len(spread):
                break
            if isinstance(found, Document):
                texts.append(found.text[:SAMPLE_CHARACTERS])
    return texts
