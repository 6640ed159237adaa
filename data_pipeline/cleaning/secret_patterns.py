"""What secrets look like: formats that issuers document, and assignments of passwords.

Every pattern needs a literal, which keeps the search fast, and repeats only a bounded number of
times, which keeps it linear.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable
from typing import NamedTuple

WORD = "A-Za-z0-9_-"


TURN = re.compile(r"(?<=[A-Za-z])(?=[0-9])|(?<=[0-9])(?=[A-Za-z])")
MIN_ENTROPY_BITS = 3.2
PLACEHOLDERS = (
    "example",
    "placeholder",
    "changeme",
    "password",
    "secret",
    "your",
    "xxxx",
    "1234567",
    "abcdef",
    "token",
    "...",
    "://",
    "***",
)


def looks_random(value: str) -> bool:
    """Whether a quoted value is a generated secret, not a word, a name, a path or a placeholder.

    It goes from letters to digits or back at least twice, has no placeholder's word, and more than
    3.2 bits of Shannon entropy a character.
    """
    lowered = value.lower()
    if any(word in lowered for word in PLACEHOLDERS) or len(TURN.findall(value)) < 2:
        return False
    counts = Counter(value).values()
    entropy = -sum(count / len(value) * math.log2(count / len(value)) for count in counts)
    return entropy > MIN_ENTROPY_BITS


def _holds_key(value: str) -> bool:
    """Whether base64 is between the delimiters, which code often names without a key."""
    return re.search(r"[A-Za-z0-9+/]{40}", value) is not None


class SecretPattern(NamedTuple):
    """A pattern whose whole match, or group ``secret`` where it has one, is replaced.

    Attributes:
        literal: every match holds it; a text without it is not searched.
        is_real: judges the value if the pattern alone proves nothing.
    """

    literal: str
    pattern: re.Pattern[str]
    is_real: Callable[[str], bool] | None = None


def _issued(prefix: str, rest: str, literal: str | None = None) -> SecretPattern:
    """A token that its prefix gives away; it must not be inside a longer word.

    The prefix has one length, so that a look-behind can hold it.
    """
    return SecretPattern(
        literal or prefix, re.compile(f"{prefix}(?<![{WORD}]{prefix}){rest}(?![{WORD}])")
    )


def _assigned(ending: str, after: str = "") -> SecretPattern:
    """A quoted value after a name with this part in it.

    Such as ``db_password = "..."`` or ``"apiKey": "..."``.
    """
    value = r"""["'](?P<secret>[^\s"'<>{}()\[\]$%\\]{12,256})["']"""
    return SecretPattern(
        ending,
        re.compile(rf"""{ending}{after}\w{{0,16}}["']?\s{{0,4}}(?:=>|:=|[=:])\s{{0,4}}{value}"""),
        looks_random,
    )


ISSUED = (
    # AWS access key ids: AKIA for users, ASIA for temporary ones, then 16 base32 characters (IAM
    # user guide, "unique identifiers").
    _issued("A[KS]IA", "[A-Z0-9]{16}", "IA"),
    # GitHub: personal, OAuth, user-to-server, server-to-server and refresh tokens (docs, "About
    # authentication to GitHub").
    _issued("gh[pousr]_", "[A-Za-z0-9]{36,255}", "gh"),
    _issued("github_pat_", "[A-Za-z0-9]{22}_[A-Za-z0-9]{59}"),
    # GitLab: personal, deploy, trigger, runner, OAuth, feed, job and agent tokens (docs, "Token
    # overview").
    _issued("gl", "(?:pat|dt|ptt|rt|oas|soat|ft|cbt|agent)-[A-Za-z0-9_.-]{20,300}"),
    # Slack: bot, user, legacy, refresh and app-level tokens; incoming webhooks (docs, "Tokens",
    # "Sending messages using incoming webhooks").
    _issued("xox[abeprs]-", f"[{WORD}]{{10,250}}", "xox"),
    _issued("xapp-", f"[{WORD}]{{10,250}}"),
    _issued("hooks.slack.com/services/", "T[A-Z0-9]{8,12}/B[A-Z0-9]{8,12}/[A-Za-z0-9]{20,30}"),
    # Stripe: live secret and restricted keys, webhook signing secrets (docs, "API keys"). Test keys
    # reach no money.
    _issued("[rs]k_live_", "[A-Za-z0-9]{20,247}", "k_live_"),
    _issued("whsec_", "[A-Za-z0-9]{20,247}"),
    # OpenAI: project, service and admin keys, user keys of 48 characters. Anthropic: API and admin
    # keys.
    _issued("sk-", f"(?:(?:proj|svcacct|admin|ant)-[{WORD}]{{40,200}}|[A-Za-z0-9]{{48}})"),
    # Hugging Face user and organisation tokens (docs, "User access tokens").
    _issued("hf_", "[A-Za-z]{34}"),
    _issued("api_org_", "[A-Za-z]{34}"),
    # Google API keys; OAuth client secrets (docs, "Using API keys", "OAuth client ID").
    _issued("AIza", f"[{WORD}]{{35}}"),
    _issued("GOCSPX-", f"[{WORD}]{{28}}"),
    # npm; PyPI (a macaroon for pypi.org in base64); SendGrid; DigitalOcean: prefixes that the
    # issuers gave to GitHub's secret scanning.
    _issued("npm_", "[A-Za-z0-9]{36}"),
    _issued("pypi-AgEIcHlwaS5vcmc", f"[{WORD}]{{50,1000}}"),
    _issued("SG[.]", f"[{WORD}]{{22}}[.][{WORD}]{{43}}", "SG."),
    _issued("dop_v1_", "[a-f0-9]{64}"),
    # JSON web tokens (RFC 7519): three parts in base64url, the first two JSON objects, so they
    # begin with '{"'.
    _issued("eyJ", f"[{WORD}]{{10,4000}}[.]eyJ[{WORD}]{{10,4000}}[.][{WORD}]{{10,4000}}"),
)

PRIVATE_KEY = SecretPattern(
    # PEM (RFC 7468) and OpenPGP armour (RFC 9580), with their header lines.
    "-----BEGIN ",
    re.compile(
        r"-----BEGIN (?:[A-Z0-9]{1,10} ){0,3}PRIVATE KEY(?: BLOCK)?-----"
        r"(?P<secret>[^-]{1,20000}(?:-[^-]{1,20000}){0,8})"
        r"-----END (?:[A-Z0-9]{1,10} ){0,3}PRIVATE KEY(?: BLOCK)?-----"
    ),
    _holds_key,
)

ASSIGNED = (
    # Without their first letter, names are found in both ways to write it.
    *map(
        _assigned,
        (
            "assword",
            "ASSWORD",
            "asswd",
            "ASSWD",
            "ecret",
            "ECRET",
            "oken",
            "OKEN",
            "pikey",
            "PIKEY",
        ),
    ),
    _assigned("_key", "(?:(?<=api_key)|(?<=auth_key)|(?<=access_key)|(?<=private_key))"),
    _assigned("_KEY", "(?:(?<=API_KEY)|(?<=AUTH_KEY)|(?<=ACCESS_KEY)|(?<=PRIVATE_KEY))"),
    _assigned("Key", "(?:(?<=piKey)|(?<=uthKey)|(?<=ccessKey)|(?<=rivateKey))"),
    # An AWS secret access key is 40 base64 characters, in ini files without quotes (AWS CLI user
    # guide, "Configuration and credential files").
    *(
        SecretPattern(
            name,
            re.compile(
                rf"""{name}["']?\s{{0,4}}[=:]\s{{0,4}}["']?"""
                r"""(?P<secret>[A-Za-z0-9/+]{40})(?![A-Za-z0-9/+=])"""
            ),
            looks_random,
        )
        for name in ("secret_access_key", "SECRET_ACCESS_KEY", "ecretAccessKey")
    ),
    # A password in a URL (RFC 3986, section 3.2.1).
    SecretPattern(
        "://",
        re.compile(
            r"://[^\s/:@'\"<>{}]{1,64}:(?P<secret>[^\s/:@'\"<>{}$%]{12,128})@(?=[A-Za-z0-9])"
        ),
        looks_random,
    ),
)

SECRETS = (*ISSUED, PRIVATE_KEY, *ASSIGNED)
