"""The prose of this project is the field's plain English, and its code has air around it.

Prose is docstrings, comments and Markdown outside of code. Each rule has a limit: what a change may
not exceed.
"""

from __future__ import annotations

import ast
import io
import re
import tokenize
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.support.paths import ROOT

# Limits, lowered whenever the tree allows it.
MAX_DIALECT_WORDS = 0
MAX_WHERE_PER_IF = 0.3
MAX_WIDE_LINES = 0
MAX_LONG_FUNCTIONS = 0
MAX_LONG_FILES = 0

WIDTH, FUNCTION_LINES, FILE_LINES = 100, 70, 450
# Of all lines, also those with a URL or a literal that cannot be broken.
MAX_WIDE_SHARE = 0.005
PRODUCT = ("pretrain", "data_pipeline", "tools", "launchers", "benchmarks")
FOLDERS = (*PRODUCT, "tests", "docs")

# Words that were used here in a sense of their own, and what the field says.
DIALECT = {
    r"turn(?:s|ed)?\b(?! (?:on|off|out|away|into))": "rotate, become",
    r"mend(?:s|ed|ing)?": "fix, repair",
    r"(?:tells?|told)": "report, say, raise",
    r"lies?": "is, is in",
    r"(?:hidden|[A-Z]) numbers": "hidden units, dimensions, elements",
    r"numbers of (?:a|each|every) (?:head|key|token)": "elements",
    r"answers?": "outputs, returns",
    r"twins?": "small copy, counterpart",
    r"trunks?": "parent run",
    r"goe?s? on": "continue, resume",
    r"by turns": "alternating",
    r"wings?": "part",
}
WORD = re.compile("|".join(rf"\b(?P<rule{n}>{rule})\b" for n, rule in enumerate(DIALECT)), re.I)


class Allowance(NamedTuple):
    """Words of one file that are the right ones there."""

    file: str
    words: str
    reason: str


ALLOWED = (
    Allowance(
        "tests/unit/test_language.py",
        ".*",
        "it names the words",
    ),
    Allowance(
        "tests/integration/export/test_chat_models.py",
        "end a turn",
        "a turn of a conversation",
    ),
)


class Prose(NamedTuple):
    """A docstring, a comment or a paragraph, and where it begins."""

    file: str
    line: int
    text: str


def files(*suffixes: str) -> list[str]:
    """The project's files with one of these suffixes, as paths from its root."""
    inside = [path for folder in FOLDERS for path in (ROOT / folder).rglob("*")]
    found = [path for path in (*inside, *ROOT.iterdir()) if path.suffix in suffixes]
    return sorted(str(path.relative_to(ROOT)) for path in found if path.is_file())


@cache
def source(file: str) -> str:
    return (ROOT / file).read_text(encoding="utf-8")


@cache
def tree(file: str) -> ast.Module:
    return ast.parse(source(file))


def in_product(file: str) -> bool:
    return Path(file).parts[0] in PRODUCT


def documented(file: str) -> Iterator[tuple[ast.Constant, str]]:
    """The docstrings of a Python file, each with its node."""
    for node in nodes(file):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            text = ast.get_docstring(node, clean=False)
            if text is not None:
                statement = node.body[0]
                assert isinstance(statement, ast.Expr)
                assert isinstance(statement.value, ast.Constant)
                yield statement.value, text


@cache
def nodes(file: str) -> list[ast.AST]:
    return list(ast.walk(tree(file)))


def comments(file: str) -> Iterator[Prose]:
    """Comments: what follows the first # of a line that is in no string.

    The syntax tree has the strings' places, and is several times faster than reading all tokens.
    """
    strings: dict[int, list[tuple[int, int]]] = {}
    for node in nodes(file):
        if isinstance(node, ast.JoinedStr) or (
            isinstance(node, ast.Constant) and isinstance(node.value, str)
        ):
            last = node.end_lineno or node.lineno
            for line in range(node.lineno, last + 1):
                # Columns are counted in bytes; a string of several lines covers those between.
                start = node.col_offset if line == node.lineno else 0
                end = node.end_col_offset or 0 if line == last else 1 << 30
                strings.setdefault(line, []).append((start, end))
    for number, line in enumerate(source(file).encode().splitlines(), 1):
        at = line.find(b"#")
        while at >= 0 and any(start <= at < end for start, end in strings.get(number, ())):
            at = line.find(b"#", at + 1)
        if at >= 0:
            yield Prose(file, number, line[at:].decode())


def python_prose(file: str) -> Iterator[Prose]:
    for node, text in documented(file):
        yield Prose(file, node.lineno, text)
    yield from comments(file)


def markdown_prose(file: str) -> Iterator[Prose]:
    is_code = False
    for number, line in enumerate(source(file).splitlines(), 1):
        if line.lstrip().startswith("```"):
            is_code = not is_code
        elif not is_code:
            yield Prose(file, number, line)


@cache
def prose() -> list[Prose]:
    """All prose, without what is quoted as code."""
    found = [part for file in files(".py") for part in python_prose(file)]
    found += [part for file in files(".md") for part in markdown_prose(file)]
    return [part._replace(text=re.sub(r"`[^`]*`", "", part.text)) for part in found]


def words_of_the_dialect() -> Iterator[str]:
    """Each word that the field does not use in this sense, with its place and a better one."""
    better = list(DIALECT.values())
    for file, line, text in prose():
        allowed = [entry.words for entry in ALLOWED if entry.file == file]
        for found in WORD.finditer(text):
            around = text[max(0, found.start() - 40) : found.end() + 40].replace("\n", " ")
            if not any(re.search(words, around) for words in allowed):
                rule = next(n for n in range(len(better)) if found[f"rule{n}"])
                at = line + text.count("\n", 0, found.start())
                yield f"{file}:{at}: {found[0]!r} (better: {better[rule]}) in ...{around}..."


def test_prose_uses_the_words_of_the_field() -> None:
    found = list(words_of_the_dialect())
    assert len(found) <= MAX_DIALECT_WORDS, "\n".join(found)


def test_conditions_are_called_if() -> None:
    """ "Where" is for places."""
    words = [word for part in prose() for word in re.findall(r"\b(?:where|if)\b", part.text, re.I)]
    where = sum(word.lower() == "where" for word in words)
    assert where / max(1, len(words) - where) <= MAX_WHERE_PER_IF


@pytest.mark.parametrize("entry", ALLOWED, ids=lambda entry: f"{entry.file}: {entry.words}")
def test_every_allowance_is_needed(entry: Allowance) -> None:
    assert (ROOT / entry.file).is_file() and re.search(entry.words, source(entry.file))


def unbreakable_lines(file: str) -> set[int]:
    """Lines of a name or a literal that cannot be broken: longer than half a line, or a literal of
    several lines.

    A docstring is prose: it is wrapped between its words, of which a test's path may be long.
    """
    docstrings = {node.lineno for node, _ in documented(file)}
    found: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(source(file)).readline):
        (first, start), (last, end) = token.start, token.end
        is_long = first < last or end - start > WIDTH / 2
        if is_long and token.type in (tokenize.STRING, tokenize.NAME) and first not in docstrings:
            found |= set(range(first, last + 1))
    for number, line in enumerate(source(file).splitlines(), 1):
        if max(map(len, line.split()), default=0) > WIDTH / 2:
            found.add(number)
    return found


def wide_lines(file: str) -> Iterator[tuple[int, bool]]:
    """Lines wider than the limit, and whether they had to be."""
    lines = enumerate(source(file).splitlines(), 1)
    wide = [(number, line) for number, line in lines if len(line) > WIDTH]
    unbreakable = unbreakable_lines(file) if wide else set()
    for number, line in wide:
        yield number, "://" in line or number in unbreakable


def test_lines_fit_the_width() -> None:
    wide = [(file, *found) for file in files(".py") for found in wide_lines(file)]
    avoidable = [f"{file}:{number}" for file, number, had_to_be in wide if not had_to_be]
    assert len(avoidable) <= MAX_WIDE_LINES, avoidable
    lines = sum(source(file).count("\n") for file in files(".py"))
    assert len(wide) <= MAX_WIDE_SHARE * lines, (len(wide), lines)


def test_functions_and_files_of_the_product_are_short() -> None:
    product = [file for file in files(".py") if in_product(file)]
    long_files = [file for file in product if source(file).count("\n") > FILE_LINES]
    long_functions = [
        f"{file}:{node.lineno}: {node.name}"
        for file in product
        for node in nodes(file)
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))
        and (node.end_lineno or 0) - node.lineno >= FUNCTION_LINES
    ]
    assert len(long_functions) <= MAX_LONG_FUNCTIONS, long_functions
    assert len(long_files) <= MAX_LONG_FILES, long_files


@pytest.mark.parametrize("text", ["the vector is turned", "a key of 64 numbers", "It goes on."])
def test_a_word_of_the_dialect_is_found(text: str) -> None:
    assert bool(WORD.search(text)) == (text != "a key of 64 numbers")


def test_what_is_no_dialect_passes() -> None:
    assert not WORD.search("Turn on the option; it turns out to be a lying return, believe me.")
