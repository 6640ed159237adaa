"""How near generated texts are to given ones: BLEU, ROUGE and exact matches."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from pretrain.core.errors import DataError


@dataclass(frozen=True)
class ReferenceScores:
    """``bleu`` is the corpus's, from 0 to 100, with sacrebleu's ``bleu_signature``.

    ROUGE is the mean F1 of the texts, from 0 to 1.
    """

    texts: int
    bleu: float
    bleu_signature: str
    rouge1: float
    rouge2: float
    rouge_l: float
    exact_match: float


def read_references(path: Path) -> tuple[list[str], list[str]]:
    """Prompts and references of a JSONL file with a "prompt" and a "reference" a line.

    Raises:
        DataError: if it cannot be read, or a line lacks either.
    """
    prompts: list[str] = []
    references: list[str] = []
    for number, row in enumerate(read_jsonl(path), start=1):
        prompt = row.get("prompt")
        reference = row.get("reference")
        if not isinstance(prompt, str) or not isinstance(reference, str):
            raise DataError(
                f'{path}, line {number} has no text "prompt" and "reference": correct it'
            )
        prompts.append(prompt)
        references.append(reference)
    return prompts, references


def read_jsonl(path: Path) -> list[dict[str, object]]:
    """The objects of a JSONL file.

    Raises:
        DataError: if it cannot be read, is empty, or a line is no JSON object.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(
            f"{path} cannot be read: {getattr(error, 'strerror', None) or 'it is not UTF-8'}"
        ) from None
    rows = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError:
            row = None
        if not isinstance(row, dict):
            raise DataError(f"{path}, line {number} is no JSON object: correct it")
        rows.append(row)
    if not rows:
        raise DataError(f"{path} has no line: give a JSON object a line")
    return rows


def score_references(texts: Sequence[str], references: Sequence[str]) -> ReferenceScores:
    """Compares texts with references by BLEU (Papineni et al. 2002) and ROUGE-1, -2, -L (Lin 2004).

    BLEU is that of sacrebleu (Post 2018).
    """
    from rouge_score.rouge_scorer import RougeScorer
    from sacrebleu.metrics import BLEU

    bleu = BLEU()
    corpus = bleu.corpus_score(list(texts), [list(references)])
    scorer = RougeScorer(["rouge1", "rouge2", "rougeL"], use_stemmer=False)
    scores = [
        scorer.score(reference, text) for text, reference in zip(texts, references, strict=True)
    ]
    means = {
        name: sum(score[name].fmeasure for score in scores) / len(scores)
        for name in ("rouge1", "rouge2", "rougeL")
    }
    exact = sum(
        text.strip() == reference.strip() for text, reference in zip(texts, references, strict=True)
    ) / len(texts)
    return ReferenceScores(
        len(texts),
        corpus.score,
        str(bleu.get_signature()),
        means["rouge1"],
        means["rouge2"],
        means["rougeL"],
        exact,
    )
