"""Sparse upcycling: a dense model's feed-forwards become experts of an equal mixture.

Experts are whole copies (Komatsuzaki et al. 2022, "Sparse upcycling") or, with a granularity g,
copies of each of g shards of the feed-forward's hidden units (He et al. 2024, "Upcycling large
language models into mixture of experts", section 3.2). There expert e holds shard e % g, and the g
experts of a virtual group have the same router row: a token chooses whole groups, which have each
shard once.

If the weights w of a token's experts add up to s, and they have each shard equally often, then
sum w_i f_i(x) is s / g times the output of the dense feed-forward, except for its output bias,
which comes s times. So the last matrix is multiplied by g / s and that bias by 1 / s. This needs
the same s for every token: :func:`weight_sum` checks it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from pretrain.checkpoint.experts import (
    DOWN,
    GATE,
    UP,
    Expert,
    moe_prefixes,
    routed_moe,
)
from pretrain.core.errors import CheckpointError, ConfigError
from pretrain.merging.assembly import (
    RouterStart,
    check_overrides,
    moe_layer,
    random_normal,
    random_stream,
)
from pretrain.model.config import ModelConfig
from pretrain.model.moe.config import RoutedMoE


@dataclass(frozen=True)
class Upcycling:
    """How a dense model becomes a mixture.

    Attributes:
        granularity: shards that a feed-forward is split into; 1 copies it whole.
        router_std: standard deviation of the router's matrix; 0 makes it zero, so that all experts
            score the same.
        noise_std: normal noise on every matrix of every expert, as a share of the matrix' own
            standard deviation.
        reinit_share: share of each expert's hidden units whose rows and columns are drawn anew,
            with mean and standard deviation of their matrix (Nakamura et al. 2025,
            "Drop-upcycling").
        seed: of router, noise and drawing.
    """

    granularity: int = 1
    router_std: float = 0.02
    noise_std: float = 0.0
    reinit_share: float = 0.0
    seed: int = 0

    @property
    def is_exact(self) -> bool:
        """Whether the mixture should compute the same as the dense model."""
        return self.noise_std == 0 and self.reinit_share == 0


def weight_sum(moe: RoutedMoE, options: Upcycling) -> float:
    """The sum of the weights of a token's experts, which must be the same for every token.

    Raises:
        ConfigError: if it depends on the token, or if the chosen shards are not computed equally
            often.
    """
    router = moe.router
    even = options.router_std == 0 and not moe.router.learned_noise
    if moe.drops_tokens:
        raise ConfigError(
            "a full expert would drop tokens that the dense feed-forward computes: upcycle with"
            " --set model.moe.drop_tokens=false; the training that follows may set it otherwise"
        )
    all_chosen = router.scores_add_up_to_one and moe.top_k == moe.num_experts
    if not (router.norm_topk_prob or even or all_chosen):
        raise ConfigError(
            "the weights of a token's experts add up to another number for each token, because"
            " model.moe.router.norm_topk_prob is false: take --router zero, with which they are"
            f" all alike{', or set it to true' if moe.top_k > 1 else ''}"
        )
    if options.granularity > 1:
        _check_whole_groups(moe, options)
    if all_chosen:
        return router.routed_scaling_factor
    # The sum is the same for all logits here, so that zeros are as good as any.
    scores_1K = router.scores(torch.zeros(1, moe.num_experts))[:, : moe.top_k]
    return float(router.weights(scores_1K.double()).sum())


def _check_whole_groups(moe: RoutedMoE, options: Upcycling) -> None:
    """A token must choose every shard equally often."""
    g = options.granularity
    reason = ""
    if moe.num_experts % g or moe.top_k % g:
        raise ConfigError(
            f"num_experts ({moe.num_experts}) and top_k ({moe.top_k}) must be multiples of"
            f" --granularity ({g}): change one of them"
        )
    if moe.has_residual_expert:
        reason = "the residual expert can hold one shard only (model.moe.use_residual)"
    elif moe.top_k == moe.num_experts:
        return
    elif options.router_std == 0:
        reason = "--router zero scores all experts the same, and a token would choose any of them"
    elif moe.router.learned_noise:
        reason = "the router's noise scores the shards of a group differently"
    elif moe.router.groups is not None:
        reason = "model.moe.router.groups may divide a group of shards"
    elif moe.draws_experts:
        reason = "DeepSpeed's gate draws experts at random"
    if reason:
        raise ConfigError(
            f"--granularity {g} needs a token to choose all {g} shards of a feed-forward together,"
            f" but {reason}: leave one out"
        )


def check_sizes(dense: ModelConfig, target: ModelConfig, options: Upcycling) -> None:
    """Raises an error if the experts of ``target`` cannot hold the feed-forwards of ``dense``."""
    if dense.routed_layers:
        raise CheckpointError(
            f"layer {dense.routed_layers[0]} of the checkpoint is a mixture of experts already:"
            " give a dense model"
        )
    check_overrides(dense, target)
    moe = routed_moe(target)
    g = options.granularity
    width = dense.intermediate_size
    if moe.moe_intermediate_size * g != width:
        raise ConfigError(
            f"model.moe.moe_intermediate_size ({moe.moe_intermediate_size}) times --granularity"
            f" ({g}) must be the dense model's intermediate_size ({width}): change one of them"
        )


def upcycled_tensors(
    stored: Mapping[str, Tensor], target: ModelConfig, options: Upcycling
) -> Iterator[tuple[str, Tensor]]:
    """Every tensor of the mixture, made from those of the dense model a layer at a time.

    Raises:
        ConfigError: as :func:`weight_sum`.
    """
    moe = routed_moe(target)
    share = weight_sum(moe, options)
    router = RouterStart(options.router_std, options.granularity, options.seed)
    taken: set[str] = set()
    for prefix in moe_prefixes(target):
        dense = {name: stored[f"{prefix}.{name}"] for name in target.feed_forward.parameter_names}
        taken |= {f"{prefix}.{name}" for name in dense}
        shards = split(dense, options.granularity, share)
        experts = [
            _varied(shards[e % len(shards)], target, options, f"{prefix}.{e}")
            for e in range(moe.num_experts)
        ]
        yield from moe_layer(experts, dense, prefix, target, router)
    yield from ((name, stored[name]) for name in stored if name not in taken)


def split(dense: Expert, granularity: int, share: float) -> list[Expert]:
    """Splits a feed-forward into shards of neighbouring hidden units.

    They are scaled so that experts whose weights add up to ``share`` give the dense output.
    """
    shards: list[Expert] = [{} for _ in range(granularity)]
    for name, tensor in dense.items():
        if name == f"{DOWN}.bias":
            # The output bias is added once by each expert, weighted like its output.
            parts = [tensor / share] * granularity
        elif name.startswith(DOWN):
            parts = [part * (granularity / share) for part in tensor.chunk(granularity, dim=1)]
        else:
            parts = list(tensor.chunk(granularity))
        for shard, part in zip(shards, parts, strict=True):
            shard[name] = part
    return shards


def _varied(shard: Expert, model: ModelConfig, options: Upcycling, name: str) -> Expert:
    """The shard with noise and redrawn units, as the options ask; biases stay the same."""
    if options.is_exact:
        return shard
    expert = dict(shard)
    if options.noise_std:
        for key, matrix in shard.items():
            if matrix.dim() == 2:
                expert[key] = matrix + options.noise_std * matrix.std() * random_normal(
                    matrix.shape, options.seed, f"{name}.{key}.noise"
                )
    if options.reinit_share:
        width = shard[f"{DOWN}.weight"].shape[1]
        expansion = model.feed_forward.expansion
        order = torch.randperm(width, generator=random_stream(options.seed, f"{name}.units"))
        units = order[: round(options.reinit_share * width)]
        # Some activations take several rows of the first matrices for one hidden unit.
        rows = (units[:, None] * expansion + torch.arange(expansion)).flatten()
        for key, indices, dimension in (
            (f"{GATE}.weight", rows, 0),
            (f"{UP}.weight", rows, 0),
            (f"{DOWN}.weight", units, 1),
        ):
            if key in shard:
                shape = list(shard[key].shape)
                shape[dimension] = len(indices)
                drawn = (
                    random_normal(shape, options.seed, f"{name}.{key}.drawn") * shard[key].std()
                    + shard[key].mean()
                )
                expert[key] = expert[key].index_copy(dimension, indices, drawn)
    return expert
