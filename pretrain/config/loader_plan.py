"""What the data loader needs of a recipe."""

from __future__ import annotations

from data_pipeline.loading.plan import LoaderPhase, LoaderPlan
from pretrain.config.recipe import Recipe
from pretrain.config.timeline import Timeline


def loader_plan(recipe: Recipe, timeline: Timeline | None = None) -> LoaderPlan:
    """Return the recipe's phases, sample length and seed as the data loader takes them.

    Args:
        timeline: of this recipe, if the caller has it already.
    """
    timeline = timeline or Timeline(recipe)
    phases = []
    for phase in timeline.phases:
        # For sentences: the field of the recipe that the mixture comes from.
        has_own_mixture = phase.recipe.data.mixture != recipe.data.mixture
        phases.append(
            LoaderPhase(
                mixture=phase.recipe.data.mixture,
                global_batch_size=phase.recipe.train.global_batch_size,
                micro_batch_size=phase.recipe.train.micro_batch_size,
                first_step=phase.first_step,
                first_block=phase.first_block,
                slices=phase.slices,
                mixture_key=f"phases.{phase.name}.mixture" if has_own_mixture else "data.mixture",
            )
        )
    return LoaderPlan(
        phases,
        timeline.block_tokens,
        recipe.seed,
        num_samples=phases[-1].first_block_of(timeline.num_steps),
        origin_steps=recipe.logging.interval_steps,
    )
