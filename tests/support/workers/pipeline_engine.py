"""Trains our blocks by DeepSpeed's PipelineEngine, which the product does not use: what it can do.

A case has "name", "stages" (of the pipeline), "ep_size", "zero", and optionally "own_groups"
(False: DeepSpeed makes the expert groups alone) and "carried" (the router loss gives its gradient
where it arises, and does not travel from stage to stage).
"""

from __future__ import annotations

import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import deepspeed
import torch
from deepspeed.moe.utils import split_params_into_different_moe_groups_for_optimizer
from deepspeed.pipe import LayerSpec, PipelineModule
from deepspeed.utils import groups
from torch import distributed, nn

from pretrain.config.load import load_recipe
from pretrain.engine.workarounds.shared_memory_all_reduce import avoid_shared_memory_all_reduce
from pretrain.model.attention.mask import AttentionMask
from pretrain.model.block import Block
from pretrain.model.decoder import DecoderLM
from pretrain.model.init import initialize
from pretrain.model.moe.losses import loss_weights
from tests.support.rank_worker import forget_expert_groups
from tests.support.training_cases import KINDS, SIZES

STEPS, MICRO_BATCHES, B, S, MAX_NORM = 4, 4, 2, 32, 0.3
# The hidden states, and the sum of the router losses so far if it travels with them.
Travelling = torch.Tensor | tuple[torch.Tensor, torch.Tensor]


def unpacked(inputs: Travelling) -> tuple[torch.Tensor, torch.Tensor | None]:
    return inputs if isinstance(inputs, tuple) else (inputs, None)


def packed(x_BSD: torch.Tensor, loss: torch.Tensor | None) -> Travelling:
    return x_BSD if loss is None else (x_BSD, loss)


class Carried(torch.autograd.Function):
    """Gives a router loss its gradient where it arises (Megatron's MoEAuxLossAutoScaler)."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, loss: torch.Tensor, share: float) -> torch.Tensor:
        ctx.share = share
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, None]:
        return grad, torch.tensor(ctx.share), None


class Embedding(nn.Module):
    def __init__(self, model: DecoderLM, carried: float | None) -> None:
        super().__init__()
        self.embedding, self.position, self.carried = model.embedding, model.position, carried

    def forward(self, input_ids_BS: torch.Tensor) -> Travelling:
        x_BSD = self.position.add(self.embedding(input_ids_BS), torch.arange(S))
        return packed(x_BSD, torch.zeros(()) if self.carried is None else None)


class Stage(nn.Module):
    """One block; only tensors may travel to the next one, so it makes positions and mask anew."""

    def __init__(self, model: DecoderLM, block: Block, carried: float | None) -> None:
        super().__init__()
        self.block, self.position, self.carried = block, model.position, carried
        self.weights = list(loss_weights(model.config.routing).values())

    def forward(self, inputs: Travelling) -> Travelling:
        x_BSD, loss = unpacked(inputs)
        terms = self.position.terms(torch.arange(S))
        x_BSD, statistics = self.block(x_BSD, terms, AttentionMask(0, None, None))
        pairs = zip(self.weights, statistics.losses_J.unbind(), strict=True)
        own = torch.stack([weight * value for weight, value in pairs if weight]).sum()
        if self.carried is not None:
            return Carried.apply(x_BSD, own, self.carried)
        return x_BSD, loss + own


class Norm(nn.Module):
    def __init__(self, model: DecoderLM) -> None:
        super().__init__()
        self.norm, self.head = model.final_norm, model.head

    def forward(self, inputs: Travelling) -> Travelling:
        x_BSD, loss = unpacked(inputs)
        return packed(self.norm(x_BSD), loss)


def batch_of(step: int, number: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens and next tokens, [B, S] each, of a micro batch of the global batch."""
    generator = torch.Generator().manual_seed(1000 * step + number)
    tokens = torch.randint(0, 128, (B, S + 1), generator=generator)
    tokens[:, 1::2] = (tokens[:, :-1:2] * 7 + 3) % 128
    return tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()


def plain(model: DecoderLM) -> list[tuple[float, float]]:
    """Loss and gradient norm of each step, of one process without DeepSpeed."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    results = []
    for step in range(STEPS):
        optimizer.zero_grad()
        total = 0.0
        for number in range(MICRO_BATCHES):
            loss = model(*batch_of(step, number), float(B * S)).loss / MICRO_BATCHES
            loss.backward()
            total += loss.item()
        norm = nn.utils.clip_grad_norm_(model.parameters(), MAX_NORM)
        optimizer.step()
        results.append((total, norm.item()))
    return results


def pipeline(model: DecoderLM, case: dict[str, Any], accumulation: int) -> PipelineModule:
    carried = 1 / accumulation if case.get("carried") else None
    blocks = [LayerSpec(Stage, model, block, carried) for block in model.layers]

    def loss_of(outputs: Travelling, labels_BS: torch.Tensor) -> torch.Tensor:
        x_BSD, router_loss = unpacked(outputs)
        loss = model.head(x_BSD, labels_BS)[0] / (B * S)
        return loss if router_loss is None else loss + router_loss

    return PipelineModule(
        [LayerSpec(Embedding, model, carried), *blocks, LayerSpec(Norm, model)],
        num_stages=case["stages"],
        loss_fn=loss_of,
        partition_method="uniform",
    )


def train(model: DecoderLM, case: dict[str, Any], world_size: int) -> dict[str, Any]:
    replicas = world_size // case["stages"]
    accumulation = MICRO_BATCHES // replicas
    net = pipeline(model, case, accumulation)
    if case.get("own_groups", True):
        # DeepSpeed takes the stages of its pipeline for a tensor-parallel group.
        groups._create_expert_and_data_parallel(case["ep_size"], pp_size=case["stages"])
    parameters = split_params_into_different_moe_groups_for_optimizer(
        {"params": list(net.parameters()), "name": "all"}
    )
    engine, _, _, _ = deepspeed.initialize(
        model=net,
        optimizer=torch.optim.SGD(parameters, lr=0.5),
        config={
            "train_batch_size": MICRO_BATCHES * B,
            "train_micro_batch_size_per_gpu": B,
            "gradient_accumulation_steps": accumulation,
            "gradient_clipping": MAX_NORM,
            "zero_optimization": {"stage": case["zero"]},
            "zero_allow_untested_optimizer": True,
            "steps_per_print": 10**9,
        },
    )
    passes = [0]
    first = next(value for name, value in net.named_parameters() if name.endswith("experts.w1"))
    first.register_hook(lambda _: passes.__setitem__(0, passes[0] + 1))
    mine = engine.grid.get_data_parallel_rank()

    def batches(step: int) -> Iterator[Any]:
        return (batch_of(step, mine + replicas * number) for number in range(accumulation))

    curve = [
        (engine.train_batch(batches(step)).item(), float(engine.get_global_grad_norm()))
        for step in range(STEPS)
    ]
    try:
        engine.forward(torch.zeros(()))
    except Exception as error:
        refused = f"{type(error).__name__}: {error}"
    return {"curve": curve, "passes": passes[0] / (STEPS * accumulation), "forward": refused}


def run_case(case: dict[str, Any]) -> dict[str, Any]:
    forget_expert_groups()
    ep_size = case["ep_size"]
    if not distributed.is_initialized():
        # Without the watchdog, whose signs of life come from the engine that is not used here.
        avoid_shared_memory_all_reduce()
        deepspeed.init_distributed(dist_backend="gloo", auto_mpi_discovery=False, verbose=False)
    rank, world_size = distributed.get_rank(), distributed.get_world_size()
    recipe = load_recipe(
        "debug", [*SIZES, KINDS["dropless"], "model.num_hidden_layers=4", "train.precision=fp32"]
    )

    def new_model(parts: int) -> DecoderLM:
        model = DecoderLM(recipe.model, parts, rank % parts)
        initialize(model, recipe.seed)
        return model

    result: dict[str, Any] = {"name": case["name"], "plain": plain(new_model(1))}
    try:
        return result | train(new_model(ep_size), case, world_size)
    except Exception as error:
        frames = traceback.extract_tb(error.__traceback__)
        places = [Path(frame.filename).name for frame in frames]
        return result | {"error": f"{type(error).__name__}: {error}", "places": places}
