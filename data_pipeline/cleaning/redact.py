"""Replaces secrets and personal data by placeholders.

Patterns are bounded, so that the time is linear in the text, and what they find is checked by the
rules of its kind.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Callable
from typing import NamedTuple

from data_pipeline.cleaning.config import Redact
from data_pipeline.cleaning.secret_patterns import SECRETS, SecretPattern
from data_pipeline.cleaning.stage import Cleaned

EMAIL = "<EMAIL>"
IP_ADDRESS = "<IP_ADDRESS>"
SECRET = "<SECRET>"
PHONE_NUMBER = "<PHONE_NUMBER>"
CREDIT_CARD = "<CREDIT_CARD>"

# The part before the @ (RFC 5321: up to 64 octets) is looked for backwards, since a search for it
# would begin at every letter.
EMAIL_DOMAIN = re.compile(
    r"@((?:[A-Za-z0-9](?:[A-Za-z0-9-]{0,62})\.){1,8}[A-Za-z]{2,24})(?![\w(\[-])"
)
LOCAL_CHARACTERS = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789._%+-"
# Names that RFC 2606 keeps for examples, and hosts whose address every clone command writes.
NO_ONES_DOMAINS = (
    ".example",
    ".test",
    ".invalid",
    ".localhost",
    ".local",
    ".example.com",
    ".example.org",
    ".example.net",
)
NO_ONES_LOCALS = ("git", "noreply", "no-reply")

IPV4 = re.compile(r"[0-9](?<![\w.].)[0-9]{0,2}\.[0-9]{1,3}\.[0-9]{1,3}\.[0-9]{1,3}")
# Global unicast addresses are in 2000::/3 (RFC 4291, section 2.4).
IPV6 = re.compile(r"[23][0-9A-Fa-f]{3}:[0-9A-Fa-f:]{2,34}")
VERSION_BEFORE = re.compile(
    r"(?:(?<![a-z])(?:version|release|ver|rev|build|v|sections?)[\s:='\"(]{0,4}"
    r"|[=<>~^]=|[<>~^]|\w/)\Z",
    re.IGNORECASE,
)

# North American numbers (area and exchange codes begin with 2 to 9), and international ones with a
# plus (ITU-T E.164).
PHONE_PARENTHESES = re.compile(r"\([2-9][0-9]{2}\) ?[2-9][0-9]{2}[-. ][0-9]{4}(?![\w-])")
PHONE_NORTH_AMERICA = re.compile(
    r"(?:1[-. ])?[2-9][0-9]{2}([-. ])[2-9][0-9]{2}\1[0-9]{4}(?![\w-]|[. ][0-9])"
)
PHONE_INTERNATIONAL = re.compile(
    r"\+[1-9][0-9]{0,2}[ .-]?(?:\([0-9]{1,4}\)[ .-]?)?[0-9]{2,4}(?:["
    r" .-]?[0-9]{2,4}){1,4}(?!\w|\.[0-9])"
)
# Issuers' ranges (ISO/IEC 7812): Visa 4, Mastercard 51-55 and 2221-2720, American Express 34 and
# 37, Discover 6011 and 65, JCB 35, Diners 36.
CARD = re.compile(
    r"[2-6][0-9]{3}(?<![\w.+/-]....)(?:[ -]?[0-9]{4}[ -]?[0-9]{4}[ -]?[0-9]{4}|[ -]?[0-9]{6}["
    r" -]?[0-9]{4,5})(?![\w+/-]|\.[0-9])"
)
CARD_LENGTHS = {
    "4": (16,),
    "5": (16,),
    "2": (16,),
    "6": (16,),
    "34": (15,),
    "37": (15,),
    "35": (16,),
    "36": (14,),
}


class Rule(NamedTuple):
    """Finds what to replace.

    Attributes:
        kind: counted as ``redacted_<kind>``.
        literal: a text without it has no match; empty if there is none.
        is_real: whether a match is what it looks like.
    """

    kind: str
    placeholder: str
    literal: str
    pattern: re.Pattern[str]
    is_real: Callable[[re.Match[str]], bool]


class Redactor:
    """Replaces secrets and personal data by placeholders.

    Edits: ``redacted_secret``, ``redacted_email``, ``redacted_ip_address``,
    ``redacted_phone_number``, ``redacted_credit_card``.
    """

    def __init__(self, config: Redact) -> None:
        self.email_addresses = config.email_addresses
        self.rules: list[Rule] = []
        if config.secrets:
            self.rules += [_secret_rule(secret) for secret in SECRETS]
        if config.ip_addresses:
            self.rules += [
                Rule("ip_address", IP_ADDRESS, "", pattern, is_public_address)
                for pattern in (IPV4, IPV6)
            ]
        if config.credit_cards:
            self.rules.append(Rule("credit_card", CREDIT_CARD, "", CARD, is_card))
        if config.phone_numbers:
            self.rules.append(
                Rule("phone_number", PHONE_NUMBER, "+", PHONE_INTERNATIONAL, _is_international)
            )
            self.rules.append(
                Rule("phone_number", PHONE_NUMBER, "(", PHONE_PARENTHESES, _stands_alone)
            )
            self.rules.append(
                Rule("phone_number", PHONE_NUMBER, "", PHONE_NORTH_AMERICA, _stands_alone)
            )

    def __call__(self, text: str) -> Cleaned:
        edits: dict[str, int] = {}
        for rule in self.rules:
            if not rule.literal or rule.literal in text:
                spans = [
                    _span(match) for match in rule.pattern.finditer(text) if rule.is_real(match)
                ]
                text = _replace(text, spans, rule.placeholder, f"redacted_{rule.kind}", edits)
        if self.email_addresses and "@" in text:
            text = _replace(text, email_spans(text), EMAIL, "redacted_email", edits)
        return Cleaned(text, edits=edits or None)


def _secret_rule(secret: SecretPattern) -> Rule:
    def is_real(match: re.Match[str]) -> bool:
        return secret.is_real is None or secret.is_real(match["secret"])

    return Rule("secret", SECRET, secret.literal, secret.pattern, is_real)


def _span(match: re.Match[str]) -> tuple[int, int]:
    return match.span("secret" if "secret" in match.re.groupindex else 0)


def _replace(
    text: str, spans: list[tuple[int, int]], placeholder: str, edit: str, edits: dict[str, int]
) -> str:
    if not spans:
        return text
    edits[edit] = edits.get(edit, 0) + len(spans)
    pieces = []
    end = 0
    for start, stop in spans:
        pieces += [text[end:start], placeholder]
        end = stop
    return "".join([*pieces, text[end:]])


def email_spans(text: str) -> list[tuple[int, int]]:
    """Return the spans of e-mail addresses in order, without those that belong to no one."""
    spans = []
    end = 0
    for match in EMAIL_DOMAIN.finditer(text):
        window = text[max(end, match.start() - 64) : match.start()]
        local = window[len(window.rstrip(LOCAL_CHARACTERS)) :].lstrip("._%+-")
        if (
            local
            and not local.endswith(".")
            and not f".{match[1].lower()}".endswith(NO_ONES_DOMAINS)
            and local.lower() not in NO_ONES_LOCALS
        ):
            end = match.end()
            spans.append((match.start() - len(local), end))
    return spans


def is_public_address(match: re.Match[str]) -> bool:
    """Whether a match is an address on the public internet, as far as its context shows.

    Version and section numbers look the same.

    Four numbers below 10 are a version or a section, as is what follows a word such as 'version', a
    comparison or a program's name.
    """
    text = match.string
    start = match.start()
    stop = match.end()
    before, after = text[max(start - 12, 0) : start], text[stop : stop + 2]
    if re.search(r"[\w.:-]\Z", before) or re.match(r"[\w-]|\.[0-9]", after):
        return False
    if match.re is IPV4 and (
        all(len(part) == 1 for part in match[0].split(".")) or VERSION_BEFORE.search(before)
    ):
        return False
    try:
        address = ipaddress.ip_address(match[0].rstrip(":"))
    except ValueError:
        return False
    return address.is_global and not address.is_multicast


def is_card(match: re.Match[str]) -> bool:
    """A number in an issuer's range, of its length, whose check digit is right (Luhn 1960)."""
    digits = [int(character) for character in match[0] if character.isdigit()]
    number = "".join(map(str, digits))
    if (
        len(digits) not in CARD_LENGTHS.get(number[:2], CARD_LENGTHS.get(number[0], ()))
        or len(set(digits)) == 1
    ):
        return False
    if (number[0] == "2" and not 2221 <= int(number[:4]) <= 2720) or (
        number[0] == "5" and not 51 <= int(number[:2]) <= 55
    ):
        return False
    if number[0] == "6" and not (number.startswith(("6011", "65"))):
        return False
    doubled = [digit * 2 - 9 * (digit > 4) for digit in digits[-2::-2]]
    return (sum(digits[-1::-2]) + sum(doubled)) % 10 == 0


def _stands_alone(match: re.Match[str]) -> bool:
    before = match.string[max(match.start() - 2, 0) : match.start()]
    return not re.search(r"[\w./-]\Z|[0-9] \Z", before)


def _is_international(match: re.Match[str]) -> bool:
    return _stands_alone(match) and 8 <= sum(map(str.isdigit, match[0])) <= 15
