"""What the readers of saved objects share: they check every type, the file may be anybody's."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, ValidationError

Count = Annotated[int, Field(ge=0, lt=2**63)]


def first_fault(error: ValidationError) -> str:
    """Which value was refused first, and why, in a few words."""
    detail = error.errors(include_url=False, include_input=False)[0]
    where = ".".join(map(str, detail["loc"]))[:120]
    return f"a wrong '{where}': {detail['msg'][:120]}"
