"""What is shown while a text is written: whole characters only, and no beginning of what may become
a stop string.
"""

from __future__ import annotations

import itertools

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from pretrain.evaluation.heldout.text_stream import TextStream

TEXT = "naïve 中文 \N{GRINNING FACE}\N{ZERO WIDTH JOINER} end\n"


def decode_bytes(ids: list[int]) -> str:
    """A tokenizer of single bytes, with Python's own replacement of what is no UTF-8."""
    return bytes(ids).decode("utf-8", errors="replace")


def pieces(stream: TextStream, ids: bytes | list[int]) -> list[str]:
    return [stream.push(token) for token in ids] + [stream.finish()]


def test_a_character_of_several_tokens_comes_whole() -> None:
    shown = pieces(TextStream(decode_bytes), TEXT.encode())
    assert "".join(shown) == TEXT
    assert max(map(len, shown)) == 1 and "\N{REPLACEMENT CHARACTER}" not in "".join(shown)


def test_decoding_every_token_alone_would_tear_characters() -> None:
    assert "".join(decode_bytes([token]) for token in TEXT.encode()) != TEXT


@pytest.mark.parametrize(
    "broken",
    [
        b"a\xff\xfeb",
        b"\xe4\xb8",
        b"\xe4\xb8\xe4\xb8\xade",
        b"\xf0\x9f\xf0\x9f\x98\x80",
        b"\x80" * 9 + b"x",
        "\ufffd ok".encode(),
    ],
)
def test_what_is_no_utf8_comes_as_the_whole_text_has_it(broken: bytes) -> None:
    assert "".join(pieces(TextStream(decode_bytes), broken)) == decode_bytes(list(broken))


def test_every_sequence_of_a_few_bytes_is_shown_as_the_whole_text_has_it() -> None:
    for ids in itertools.product((0x61, 0xC3, 0xA9, 0xE4, 0xB8, 0xF0), repeat=5):
        assert "".join(pieces(TextStream(decode_bytes), list(ids))) == decode_bytes(list(ids))


def test_a_decoder_that_strips_the_first_space_keeps_the_others() -> None:
    vocabulary = {"▁a": 0, "▁b": 1, "c": 2, "<unk>": 3}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    ids = [0, 1, 2, 0, 0, 1]
    assert tokenizer.decode(ids) == "a bc a a b"
    assert "".join(pieces(TextStream(tokenizer.decode), ids)) == "a bc a a b"


def test_a_stop_string_ends_the_text_and_no_part_of_it_is_shown() -> None:
    stream = TextStream(decode_bytes, stop=["\n\nclass", "\n\ndef"])
    shown = pieces(stream, b"a\n\nb\n\ndef f")
    assert stream.stopped and stream.text == "".join(shown) == "a\n\nb"
    assert (
        shown[1] == "" and shown[3] == "\n\nb"
    )  # held back while it could have become a stop string


def test_a_stop_string_that_does_not_come_is_not_lost() -> None:
    stream = TextStream(decode_bytes, stop=["abcd"])
    assert "".join(pieces(stream, b"xabcxabc")) == "xabcxabc" and not stream.stopped


def test_the_earliest_of_several_stop_strings_counts_also_inside_a_token() -> None:
    words = ["one. tw", "o! three"]
    stream = TextStream(lambda ids: "".join(words[token] for token in ids), stop=["!", "two", ""])
    assert "".join(pieces(stream, [0, 1])) == "one. " and stream.stopped
