"""The order of the stages, normalisation, and what a document's report says."""

from __future__ import annotations

import unicodedata

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipeline.cleaning.cleaner import Cleaner
from data_pipeline.cleaning.config import Cleaning, Normalize
from data_pipeline.cleaning.normalize import Normalizer
from data_pipeline.cleaning.stage import REASONS, Cleaned

CODE = "def f(x):\n\tif x:\n\t\treturn {'a': 1}   \n\n\n    # spaces\n"


def cleaner(**sections: object) -> Cleaner:
    return Cleaner(Cleaning.model_validate(sections))


def test_nothing_is_needed_by_default_and_duplicates_are_no_stage() -> None:
    assert not cleaner().is_needed
    assert not cleaner(exact_duplicates=True, near_duplicates={}).is_needed
    assert cleaner().clean(CODE) == Cleaned(CODE)
    assert cleaner(normalize={}).is_needed


def test_normalisation_leaves_code_as_it_is() -> None:
    assert cleaner(normalize={}).clean(CODE) == Cleaned(CODE)


def test_normalisation_counts_what_it_changes() -> None:
    cleaned = cleaner(normalize={}).clean("e\u0301\r\na\x00\x01b\rc\td\x7f\n")
    assert cleaned == Cleaned(
        "é\nab\nc\td\n", edits={"line_ends": 2, "control_characters": 2, "normalized": 1}
    )


def test_each_part_of_normalisation_can_be_left_out() -> None:
    text = "ﬁ\r\n\x02"
    assert Normalizer(Normalize())(text).text == "ﬁ\n"
    assert Normalizer(Normalize(form="NFKC"))(text).text == "fi\n"
    assert (
        Normalizer(Normalize(unify_line_ends=False, strip_control_characters=False))(text).text
        == text
    )


@settings(max_examples=200, deadline=None)
@given(st.text(st.characters(exclude_categories=["Cs"])), st.sampled_from(["NFC", "NFKC"]))
def test_normalised_text_is_normal_and_stays_so(text: str, form: str) -> None:
    normalizer = Normalizer(Normalize.model_validate({"form": form}))
    once = normalizer(text).text
    assert unicodedata.is_normalized(form, once)
    assert normalizer(once) == Cleaned(once)
    assert not [
        character
        for character in once
        if unicodedata.category(character) == "Cc" and character not in "\t\n"
    ]


def test_stages_work_on_what_the_stage_before_made() -> None:
    # Joined by the control characters, the words are too few for the rule; normalised first, they
    # are one.
    both = cleaner(normalize={}, gopher_quality={"min_words": 2, "min_stop_words": 0})
    assert both.clean("one\x00two").dropped == "gopher_min_words"
    # Redaction comes last: what is dropped before is not counted as redacted.
    sections = {"code_quality": {"max_line_length": 10}, "redact": {}}
    assert cleaner(**sections).clean("mail jane@corp.com now") == Cleaned(
        "mail jane@corp.com now", "code_line_length", "a line of 22 characters, the most is 10"
    )
    assert cleaner(redact={}).clean("mail jane@corp.com now") == Cleaned(
        "mail <EMAIL> now", edits={"redacted_email": 1}
    )


def test_a_dropped_document_keeps_the_edits_made_before() -> None:
    cleaned = cleaner(normalize={}, gopher_quality={}).clean("one\r\ntwo")
    assert cleaned == Cleaned(
        "one\ntwo", "gopher_min_words", "2 words, the least is 50", {"line_ends": 1}
    )


def test_a_document_of_which_nothing_is_left_is_dropped() -> None:
    assert cleaner(normalize={}).clean("\x01\x02").dropped == "empty_after_cleaning"
    assert (
        cleaner(c4_quality={"min_sentences": 0}).clean("home\nabout\n").dropped
        == "empty_after_cleaning"
    )


@pytest.mark.parametrize(
    ("sections", "text", "reason"),
    [
        ({"gopher_quality": {}}, "few", "gopher_min_words"),
        ({"gopher_repetition": {}}, "a b\n" * 9, "gopher_duplicate_lines"),
        ({"c4_quality": {}}, "int main() {", "c4_curly_bracket"),
        ({"code_quality": {}}, "x" * 2000, "code_mean_line_length"),
        (
            {"language": {"keep": ["en"]}},
            "Das ist ein kurzer deutscher Satz über das Wetter in Hamburg.",
            "language",
        ),
    ],
)
def test_every_section_of_a_recipe_adds_its_stage(
    sections: dict[str, object], text: str, reason: str
) -> None:
    assert cleaner(**sections).clean(text).dropped == reason
    assert reason in REASONS
    assert cleaner().clean(text).dropped is None
