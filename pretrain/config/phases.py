"""Phases of a run: sizes, positions, data, learning rate and frozen parts of each."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from data_pipeline.config import Mixture
from pretrain.config.schedules import PhaseSchedule
from pretrain.core.registry import OneOf
from pretrain.core.section import Section, Sequences, SequenceTokens, Tokens
from pretrain.model.positions.config import Position


class PhaseConfig(Section):
    """One phase. What it leaves out is as in the other sections of the recipe."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]
    tokens: Tokens | None = Field(
        None,
        description="rounded up to whole steps, or to whole blocks if others are longer "
        "(longest / own length steps each); "
        "the last phase may leave it out and takes the rest of the run",
    )
    # Null: as in the recipe's train section.
    global_batch_size: Sequences | None = Field(
        None, description="sequences a step, over all ranks"
    )
    micro_batch_size: Sequences | None = Field(None, description="sequences a rank holds at once")
    sequence_length: SequenceTokens | None = Field(
        None, description="tokens; a divisor of the longest of the run"
    )
    position: Annotated[Position, OneOf()] | None = Field(
        None, description="the whole section, such as {kind: rope, rope_theta: 500000}"
    )
    mixture: Mixture | None = None
    schedule: Annotated[PhaseSchedule, OneOf()] | None = Field(
        None,
        description=(
            "over this phase alone; without it the recipe's schedule, which runs over all steps"
        ),
    )
    frozen: list[str] = Field(
        [],
        description="what stays as it is: embedding, head, attention, router, experts, "
        "shared_experts, feed_forward (dense ones), norm, "
        "or patterns of parameter names such as layers.0.*",
    )
