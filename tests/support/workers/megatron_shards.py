"""Products and losses of tensors that two ranks share, ours and Megatron-Core's.

Megatron-Core's form with whole tokens on each rank is compared: its form with tokens cut allocates
on ``torch.cuda.current_device()`` (``tensor_parallel/mappings.py``), which a CPU does not have.
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core import parallel_state, tensor_parallel
from megatron.core.model_parallel_config import ModelParallelConfig
from torch import distributed, nn
from torch.nn import functional

from pretrain.engine.topology import connect
from pretrain.model.sharded_loss import sharded_chunk_losses
from pretrain.model.tensor_shards import cut_columns, cut_rows, embed_shard
from pretrain.model.token_parallel import TensorParallel

B, S, D, F, V = 2, 6, 8, 12, 20


def whole_values() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = {"x": (B, S, D), "up": (F, D), "down": (D, F), "table": (V, D), "dy": (B, S, D)}
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def megatron_products(values: dict[str, torch.Tensor], rank: int) -> dict[str, torch.Tensor]:
    config = ModelParallelConfig(tensor_model_parallel_size=2, use_cpu_initialization=True)
    options = {"config": config, "init_method": nn.init.zeros_, "bias": False}
    up = tensor_parallel.ColumnParallelLinear(D, F, **options)
    down = tensor_parallel.RowParallelLinear(
        F, D, input_is_parallel=True, skip_bias_add=False, **options
    )
    table = tensor_parallel.VocabParallelEmbedding(V, D, init_method=nn.init.zeros_, config=config)
    with torch.no_grad():
        up.weight.copy_(values["up"].chunk(2)[rank])
        down.weight.copy_(values["down"].chunk(2, dim=1)[rank])
        table.weight.copy_(values["table"].chunk(2)[rank])
    x_SBD = values["x"].transpose(0, 1).contiguous().requires_grad_()
    y_SBD = down(functional.silu(up(x_SBD)[0]))[0]
    y_SBD.backward(values["dy"].transpose(0, 1).contiguous())
    ids = torch.arange(B * S).view(B, S) % V
    return {
        "y": y_SBD.detach().transpose(0, 1),
        "dx": x_SBD.grad.transpose(0, 1),
        "dup": up.weight.grad,
        "ddown": down.weight.grad,
        "embedded": table(ids).detach(),
    }


def our_products(
    values: dict[str, torch.Tensor], tensor: TensorParallel
) -> dict[str, torch.Tensor]:
    up, down = nn.Linear(D, F, bias=False), nn.Linear(F, D, bias=False)
    up.weight, down.weight = (nn.Parameter(values[name].clone()) for name in ("up", "down"))
    cut_columns(tensor, up)
    cut_rows(tensor, down)
    x_BSD = tensor.own(values["x"]).clone().requires_grad_()
    hidden = functional.silu(up(tensor.gather(x_BSD, dim=1)))
    y_BSD = tensor.scatter_sum(down(hidden), dim=1)
    y_BSD.backward(tensor.own(values["dy"]))
    rows = tensor.own(values["table"], dim=0)
    ids = torch.arange(B * S).view(B, S) % V
    # Put together again: a rank has its tokens only.
    return {
        "y": tensor.gather(y_BSD.detach(), dim=1),
        "dx": tensor.gather(x_BSD.grad, dim=1),
        "dup": up.weight.grad,
        "ddown": down.weight.grad,
        "embedded": tensor.gather(embed_shard(rows, tensor.own(ids), tensor), dim=1),
    }


def losses(tensor: TensorParallel) -> dict[str, float]:
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(B * S, V, generator=generator) * 3
    labels = torch.randint(V, (B * S,), generator=generator)
    mine = tensor.own(logits).contiguous()
    theirs = mine.clone().requires_grad_()
    expected = tensor_parallel.vocab_parallel_cross_entropy(theirs * 1.0, labels).sum()
    expected.backward()
    nll, _, gradient = sharded_chunk_losses(mine, labels, 0.0, tensor, tensor.part * (V // 2))
    return {
        "loss": abs(float(nll * 2 - expected)) / float(expected),
        "dlogits": float((gradient - theirs.grad).abs().max()),
    }


def run_case(case: dict[str, Any]) -> dict[str, Any]:
    connect(1)
    rank = distributed.get_rank()
    parallel_state.initialize_model_parallel(2)
    group = distributed.new_group([0, 1])
    tensor = TensorParallel(group.group_name, rank, 2)
    values = whole_values()
    ours, theirs = our_products(values, tensor), megatron_products(values, rank)
    differences = {
        name: float((ours[name] - theirs[name]).abs().max() / theirs[name].abs().max())
        for name in theirs
    }
    return {"name": case["name"], "differences": differences | losses(tensor)}
