"""The rules of Gopher, C4, Codex and of languages: each limit drops what is beyond it and nothing
else.
"""

from __future__ import annotations

import re
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipeline.cleaning.c4 import C4Filter
from data_pipeline.cleaning.code import CodeFilter
from data_pipeline.cleaning.config import (
    C4Quality,
    CodeQuality,
    GopherQuality,
    GopherRepetition,
    Language,
)
from data_pipeline.cleaning.gopher import (
    GopherQualityFilter,
    GopherRepetitionFilter,
    Words,
    duplicate_shares,
)
from data_pipeline.cleaning.language import LanguageFilter, sample_of
from data_pipeline.cleaning.stage import REASONS, Cleaned
from pretrain.core.errors import ConfigError

PROSE = """The harbour lies to the north of the town, and ships have come to it for many centuries.
Fishermen mend their nets on the quay while children watch them work and ask about the sea.
In winter storms close the harbour mouth, so that boats must wait outside until the wind falls.
Merchants used to trade wool and timber here, but most of that business moved away long ago.
Now visitors arrive by train each summer; they walk along the cliffs and eat in small restaurants."""


def test_prose_passes_every_rule_of_gopher() -> None:
    assert GopherQualityFilter(GopherQuality())(PROSE) == Cleaned(PROSE)
    assert GopherRepetitionFilter(GopherRepetition())(PROSE) == Cleaned(PROSE)


@pytest.mark.parametrize(
    ("reason", "text", "limits"),
    [
        ("gopher_min_words", "too few words here", {}),
        ("gopher_max_words", PROSE, {"max_words": 60}),
        ("gopher_mean_word_length", "a b c d the and of " * 20, {}),
        ("gopher_mean_word_length", "incomprehensibilities the internationalization of " * 20, {}),
        ("gopher_symbol_word_ratio", PROSE + " #tag" * 12, {}),
        ("gopher_symbol_word_ratio", PROSE + " and... so… on" * 10, {}),
        ("gopher_bullet_lines", "\n".join(f"- {line}" for line in PROSE.split("\n")), {}),
        ("gopher_ellipsis_lines", PROSE.replace(".\n", "...\n", 2), {}),
        ("gopher_alphabetic_words", PROSE + " 12345 1/2" * 20, {}),
        ("gopher_stop_words", re.sub(r"(?i)\b(the|of|and|to|that|have)\b", "", PROSE), {}),
    ],
)
def test_each_quality_rule_of_gopher_drops_what_is_beyond_its_limit(
    reason: str, text: str, limits: dict[str, float]
) -> None:
    found = GopherQualityFilter(GopherQuality.model_validate(limits))(text)
    assert found.dropped == reason and found.text == text
    assert any(character.isdigit() for character in found.detail)


def test_a_limit_of_gopher_is_still_allowed_itself() -> None:
    words = len(PROSE.split())
    assert (
        GopherQualityFilter(GopherQuality(min_words=words, max_words=words))(PROSE).dropped is None
    )
    assert (
        GopherQualityFilter(GopherQuality(min_words=words + 1))(PROSE).dropped == "gopher_min_words"
    )
    assert (
        GopherQualityFilter(GopherQuality(max_words=words - 1))(PROSE).dropped == "gopher_max_words"
    )
    assert GopherQualityFilter(GopherQuality(min_words=0))(" \n ").dropped is None


@pytest.mark.parametrize(
    ("reason", "text"),
    [
        ("gopher_duplicate_lines", PROSE + "\nshort" * 4),
        (
            "gopher_duplicate_line_characters",
            f"{PROSE}\n{PROSE.splitlines()[0]}\n{PROSE.splitlines()[1]}",
        ),
        ("gopher_duplicate_paragraphs", "One line.\n\n" + PROSE + "\n\nOne line.\n \nOne line."),
        ("gopher_duplicate_paragraph_characters", f"{PROSE}\n\nOne.\n\nTwo.\n\nThree.\n\n{PROSE}"),
        ("gopher_top_ngram", PROSE + " for example" * 15),
        ("gopher_duplicate_ngrams", PROSE + " " + " ".join(PROSE.split()[20:45])),
    ],
)
def test_each_repetition_rule_of_gopher_drops_what_repeats(reason: str, text: str) -> None:
    lenient = {
        name: 1.0
        for name in GopherRepetition.model_fields
        if name.startswith("max_duplicate_") and "ngram" not in name
    }
    own = f"max_{reason.removeprefix('gopher_')}"
    config = GopherRepetition.model_validate(
        {name: limit for name, limit in lenient.items() if name != own}
    )
    assert GopherRepetitionFilter(config)(text).dropped == reason
    everything = GopherRepetition.model_validate(
        lenient | {"max_top_ngram_characters": {}, "max_duplicate_ngram_characters": {}}
    )
    assert GopherRepetitionFilter(everything)(text) == Cleaned(text)


def reference_shares(words: list[str], size: int) -> tuple[float, float]:
    """The shares of the commonest and of the repeated n-grams, counted word by word."""
    ngrams = [tuple(words[start : start + size]) for start in range(len(words) - size + 1)]
    counts = Counter(ngrams)
    most = max(counts.values())
    top = next(ngram for ngram in ngrams if counts[ngram] == most)
    seen: set[tuple[str, ...]] = set()
    covered = [set[int](), set[int]()]
    for start, ngram in enumerate(ngrams):
        for kind, hit in enumerate((ngram == top, ngram in seen)):
            if hit:
                covered[kind] |= set(range(start, start + size))
        seen.add(ngram)
    total = sum(map(len, words))
    return tuple(sum(len(words[place]) for place in places) / total for places in covered)


@settings(max_examples=300, deadline=None)
@given(st.lists(st.sampled_from(["a", "bb", "ccc", "d"]), min_size=1, max_size=40))
def test_shares_of_ngrams_are_those_of_a_plain_count(words: list[str]) -> None:
    counted = Words.of(" ".join(words))
    found = dict(counted.repeated_ngrams(6))
    for size in range(2, 7):
        if size not in found:
            assert len(words) < size or reference_shares(words, size)[1] == 0
            continue
        shares = (
            counted.share(found[size].commonest(), size),
            counted.share(found[size].starts[~found[size].is_first], size),
        )
        assert shares == pytest.approx(reference_shares(words, size))


def test_only_later_ones_of_equal_lines_are_duplicates() -> None:
    assert duplicate_shares(["aaa", "b", "aaa", "aaa"]) == pytest.approx((0.5, 0.6))
    assert duplicate_shares(["a", "b"]) == duplicate_shares([]) == (0.0, 0.0)


def test_c4_keeps_sentences_and_removes_menus_scripts_policies_and_citations() -> None:
    lines = PROSE.split("\n")
    page = "\n".join(
        [
            "Home | About",
            *lines[:3],
            "",
            "Please enable JavaScript to see this page.",
            "Read our privacy policy here.",
            *lines[3:],
            "More of that...",
        ]
    )
    page = page.replace("centuries.", "centuries.[12][citation needed]")
    cleaned = C4Filter(C4Quality())(page)
    assert (
        cleaned.text
        == "\n".join([*lines[:3], "", *lines[3:]])[: -len(lines[4]) - 1] + "\n" + lines[4]
    )
    assert cleaned.edits == {"c4_removed_lines": 4, "c4_removed_citations": 2}
    assert cleaned.dropped is None


@pytest.mark.parametrize(
    ("rule", "line"),
    [
        ("require_terminal_punctuation", "A line of text without an end"),
        ("drop_javascript_lines", "This page needs Javascript to work."),
        ("drop_policy_lines", "By reading on you accept the Terms of Use."),
    ],
)
def test_each_line_rule_of_c4_can_be_left_out(rule: str, line: str) -> None:
    text = f"{PROSE}\n{line}"
    assert C4Filter(C4Quality())(text) == Cleaned(PROSE, edits={"c4_removed_lines": 1})
    assert C4Filter(C4Quality.model_validate({rule: False}))(text) == Cleaned(text)


def test_c4_removes_lines_of_few_words_and_of_endless_ones() -> None:
    assert C4Filter(C4Quality())(f"{PROSE}\nToo short.").text == PROSE
    assert C4Filter(C4Quality())(f"{PROSE}\nThis is {'x' * 1001} long.").text == PROSE
    assert C4Filter(C4Quality(min_words_per_line=2))(f"{PROSE}\nToo short.") == Cleaned(
        f"{PROSE}\nToo short."
    )


def test_c4_drops_pages_with_lorem_ipsum_curly_brackets_or_few_sentences() -> None:
    assert (
        C4Filter(C4Quality())(PROSE + "\nLorem Ipsum dolor sit amet.").dropped == "c4_lorem_ipsum"
    )
    assert C4Filter(C4Quality())(PROSE + "\n{").dropped == "c4_curly_bracket"
    few = C4Filter(C4Quality())("\n".join(PROSE.split("\n")[:4]))
    assert (few.dropped, few.detail) == ("c4_sentences", "4 sentences, the least is 5")
    assert C4Filter(C4Quality(min_sentences=4))("\n".join(PROSE.split("\n")[:4])).dropped is None


CODE = (
    "import os\n\n\ndef list_files(path):\n    return [name for name in os.listdir(path) if name]\n"
)


@pytest.mark.parametrize(
    ("reason", "text"),
    [
        ("code_mean_line_length", ("x = 1 + " * 15 + "\n") * 10),
        ("code_line_length", CODE * 20 + "x" * 1001),
        ("code_alphanumeric", "{[(;;)]}\n,.;:-+\n==\n" * 10 + CODE),
        (
            "code_autogenerated",
            "# -*- coding: utf-8 -*-\n# Automatically generated by protoc. Do not edit!\n" + CODE,
        ),
    ],
)
def test_each_rule_for_code_drops_what_is_beyond_its_limit(reason: str, text: str) -> None:
    assert CodeFilter(CodeQuality())(text).dropped == reason
    lenient = CodeQuality(
        max_mean_line_length=1e9,
        max_line_length=10**9,
        min_alphanumeric_share=0,
        drop_autogenerated=False,
    )
    assert (
        CodeFilter(lenient)(text)
        == CodeFilter(CodeQuality())(CODE)._replace(text=text)
        == Cleaned(text)
    )


def test_a_note_far_down_does_not_make_code_autogenerated() -> None:
    assert CodeFilter(CodeQuality())(CODE + "# this table is auto-generated\n").dropped is None


def test_languages_are_told_apart_and_the_detail_says_what_was_found() -> None:
    english = LanguageFilter(Language(keep=["en"]))
    assert english(PROSE) == Cleaned(PROSE)
    german = (
        "Der Hafen liegt im Norden der Stadt, und seit Jahrhunderten kommen Schiffe aus aller Welt"
        " hierher."
    )
    assert english(german).dropped == "language" and english(german).detail.startswith(
        "de with probability 0.9"
    )
    assert LanguageFilter(Language(keep=["en", "de"]))(german) == Cleaned(german)
    assert (
        LanguageFilter(Language(keep=["en"], min_probability=0.2))("12 34 56").dropped == "language"
    )


def test_a_long_text_is_judged_by_parts_from_its_start_to_its_end() -> None:
    assert sample_of(PROSE) == PROSE
    text = "".join(chr(0x100 + place // 1000) for place in range(10_000))
    assert sample_of(text) == "\n".join(
        text[start : start + 250] for start in (0, 3250, 6500, 9750)
    )


def test_an_unknown_language_is_refused_with_the_nearest_one() -> None:
    with pytest.raises(ConfigError, match="no language 'eng': .* such as 'en'"):
        LanguageFilter(Language(keep=["eng"]))


def test_reasons_are_all_explained() -> None:
    assert all(reason.islower() and text for reason, text in REASONS.items())
