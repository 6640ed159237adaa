"""The HTML form of a sheet: one file that needs no network and may send nothing anywhere."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections.abc import Mapping
from pathlib import Path

TEMPLATE = Path(__file__).with_name("form.html")
SCRIPT = re.compile(r"<script>(.*?)</script>", re.DOTALL)


def form(data: Mapping[str, object]) -> str:
    """The form of a sheet.

    Its content security policy runs the form's own script and nothing else, and connects nowhere.

    Args:
        data: study, sheet, mode, question, criteria, scale and items, as the script reads them.
    """
    template = TEMPLATE.read_text(encoding="utf-8")
    script = SCRIPT.search(template)
    assert script is not None
    digest = base64.b64encode(hashlib.sha256(script[1].encode()).digest()).decode()
    # The data last, so that no text of it is taken for a place of the template.
    return template.replace("%%HASH%%", digest).replace("%%DATA%%", script_json(data))


def script_json(data: Mapping[str, object]) -> str:
    """JSON that cannot end the element it is in, whatever the texts are."""
    text = json.dumps(data, ensure_ascii=True)
    for sign in "<>&":
        text = text.replace(sign, f"\\u{ord(sign):04x}")
    return text
