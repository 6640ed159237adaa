"""Documents for tokenizers: scripts, emoji, case folding, white space, control characters, special
tokens spelled out, code and long runs, from a seed.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence

from data_pipeline.tokenizer.agreement import folding_characters

WORDS = (
    "def return the router sends each token lambda x: größer don't WE'LL it's I'VE naïve Straße"
    " İstanbul'da ısı f(x) == 12345 0x7f3.14 _private camelCase HTTPServer … «quoted» “curly”"
).split()
# First and last code points: Latin to African scripts, Hangul, kana with half widths, historic
# ones, mathematics, private use and planes whose UTF-8 begins with 0xf1 to 0xf4.
SCRIPTS = (
    (0x20, 0x7E), (0xA0, 0x24F), (0x300, 0x36F), (0x370, 0x3FF), (0x400, 0x52F), (0x590, 0x5FF),
    (0x600, 0x6FF), (0x900, 0x97F), (0xE00, 0xE7F), (0x1100, 0x11FF), (0x1200, 0x137F),
    (0x1E00, 0x1FFF), (0x2000, 0x206F), (0x2100, 0x218F), (0x3040, 0x30FF), (0x4E00, 0x5FFF),
    (0xAC00, 0xD7A3), (0xE000, 0xE0FF), (0xFB00, 0xFDFF), (0xFE00, 0xFE6F), (0xFF00, 0xFFEF),
    (0x10000, 0x100FF), (0x10400, 0x1044F), (0x1D400, 0x1D7FF), (0x1F100, 0x1F64F),
    (0x20000, 0x200FF), (0x50000, 0x500FF), (0xE0000, 0xE01EF), (0x10FF00, 0x10FFFF),
)  # fmt: skip
BLANKS = " \t\n\r\x0b\x0c\x1c\x85\u00a0\u1680\u2003\u2028\u2029\u202f\u3000\u200b\ufeff"
EMOJI = "👩👧👨🏽🏿🇩🇪🇯🇵❤☺1#\u200d\ufe0f\u20e3🏴\U000e0067\U000e007f"
CODE = "    \t\t{}[]()<>=!+-*/&|^%~#@$`\\'\";:,.?0123456789abcxyzABC_\n\n\r\n"


def generated_documents(count: int, special: Sequence[str], seed: int = 0) -> Iterator[str]:
    """Yield documents; ``special`` are tokens that some of them spell out."""
    source = random.Random(seed)
    parts: list[Callable[[], str]] = [
        lambda: " ".join(source.choices(WORDS, k=source.randrange(1, 30))),
        lambda: _of_script(source),
        lambda: "".join(source.choices(EMOJI, k=source.randrange(1, 20))),
        lambda: "".join(source.choices("'''''sStTdDmMlLrRvVeEkK x" + folding_characters(), k=20)),
        lambda: "".join(source.choices(BLANKS, k=source.randrange(1, 12))),
        lambda: "".join(chr(source.randrange(0x20)) for _ in range(source.randrange(1, 8))),
        lambda: source.choice([*special, "<|endoftext|>", "</s>", "<unk>", "<0x41>", "\u2581"]),
        lambda: "".join(source.choices(CODE, k=source.randrange(1, 120))),
        lambda: source.choice(" a\n=.0é中\u0301ſ") * int(source.paretovariate(0.7) % 2000 + 1),
        lambda: "".join(_scalar(source) for _ in range(source.randrange(1, 6))),
    ]
    for _ in range(count):
        chosen = source.choices(parts, k=source.randrange(0, 9))
        joint = source.choice(("", " ", "\n", "  "))
        yield joint.join(part() for part in chosen)


def _of_script(source: random.Random) -> str:
    first, last = source.choice(SCRIPTS)
    characters = (chr(source.randint(first, last)) for _ in range(source.randrange(1, 40)))
    return "".join(character + (" " if source.random() < 0.15 else "") for character in characters)


def _scalar(source: random.Random) -> str:
    point = source.randrange(1, 0x110000 - 0x800)
    return chr(point + 0x800 if point >= 0xD800 else point)
