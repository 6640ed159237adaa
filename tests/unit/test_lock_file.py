"""requirements.lock pins every requirement, at a version that its range allows."""

from __future__ import annotations

import pytest
from packaging.requirements import Requirement

from tests.support.paths import ROOT


def requirements(name: str) -> list[Requirement]:
    """The requirements of a file that apply to this machine."""
    lines = (line.partition("#")[0].strip() for line in (ROOT / name).read_text().splitlines())
    found = [Requirement(line) for line in lines if line]
    return [one for one in found if one.marker is None or one.marker.evaluate()]


LOCKED = {one.name.lower().replace("_", "-"): one for one in requirements("requirements.lock")}


@pytest.mark.parametrize("requirement", requirements("requirements.txt"), ids=lambda one: one.name)
def test_the_lock_file_has_a_version_in_the_range(requirement: Requirement) -> None:
    (pin,) = LOCKED[requirement.name.lower().replace("_", "-")].specifier
    assert pin.operator == "==" and requirement.specifier.contains(pin.version)
