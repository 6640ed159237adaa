"""Attention over sequences that ranks share: this project's, DeepSpeed's and torch's own.

A case has "name", "run" (a function below), and what that reads: "key_heads", "documents".
"""

from __future__ import annotations

from typing import Any

import torch
from deepspeed.sequence.layer import DistributedAttention
from torch import Tensor, distributed
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor.experimental import context_parallel
from torch.nn import functional
from torch.nn.attention.flex_attention import flex_attention

from pretrain.engine.topology import connect
from pretrain.model.attention.kernels.base import attention_kernel
from pretrain.model.attention.mask import AttentionMask
from pretrain.model.attention.scores import Scores
from pretrain.model.attention.split_heads import attend
from pretrain.model.token_parallel import SequenceParallel

B, N, S, H = 2, 4, 24, 8
Tensors = list[Tensor]


def tensors(key_heads: int) -> Tensors:
    """Queries, keys, values and the output's gradient of whole sequences; equal on all ranks."""
    generator = torch.Generator().manual_seed(3)
    heads = (N, key_heads, key_heads, N)
    return [torch.randn(B, count, S, H, generator=generator) for count in heads]


def own(x_BNSH: Tensor) -> Tensor:
    """This rank's tokens."""
    return x_BNSH.chunk(distributed.get_world_size(), 2)[distributed.get_rank()].clone()


def document_ids(case: dict[str, Any]) -> Tensor | None:
    # Two documents that end in the first and in the second rank's part.
    return (torch.arange(S) // 10).expand(B, S) if case.get("documents") else None


def plain(q_BNSH: Tensor, k_BMSH: Tensor, v_BMSH: Tensor, ids_BS: Tensor | None) -> Tensor:
    """The definition, in loops over queries: fp32, no kernel."""
    rows = []
    group = N // k_BMSH.shape[1]
    k_BNSH, v_BNSH = (x.repeat_interleave(group, 1) for x in (k_BMSH, v_BMSH))
    for query in range(S):
        scores_BNU = (q_BNSH[:, :, query, None] * k_BNSH[:, :, : query + 1]).sum(-1) * H**-0.5
        if ids_BS is not None:
            other = ids_BS[:, None, : query + 1] != ids_BS[:, None, query, None]
            scores_BNU = scores_BNU.masked_fill(other, -torch.inf)
        weights_BNU = scores_BNU.softmax(-1)
        rows.append((weights_BNU[..., None] * v_BNSH[:, :, : query + 1]).sum(2))
    return torch.stack(rows, 2)


def expected(case: dict[str, Any]) -> Tensors:
    """Output, and gradients of queries, keys and values, of one process that has all tokens."""
    *inputs, gradient = tensors(case["key_heads"])
    for x in inputs:
        x.requires_grad_()
    output = plain(*inputs, document_ids(case))
    output.backward(gradient)
    return [output.detach(), *(x.grad for x in inputs if x.grad is not None)]


def ours(case: dict[str, Any], inputs: Tensors, compiled: bool) -> Tensor:
    world_size = distributed.get_world_size()
    group = distributed.new_group(list(range(world_size)))
    sequence = SequenceParallel(group.group_name, distributed.get_rank(), world_size)
    mask = AttentionMask(document_ids_BS=document_ids(case), sequence=sequence)
    kernel = attention_kernel("sdpa", torch.device("cpu"))

    def call(q_BNSH: Tensor, k_BMSH: Tensor, v_BMSH: Tensor) -> Tensor:
        return attend(kernel, q_BNSH, k_BMSH, v_BMSH, Scores(mask, H**-0.5))

    if compiled:
        call = torch.compile(call, backend="aot_eager", dynamic=False, fullgraph=True)
    return call(*inputs)


def deepspeeds(inputs: Tensors) -> Tensor:
    """DeepSpeed has tokens before heads: [B, S, N, H]."""

    def local(q_BUnH: Tensor, k_BUmH: Tensor, v_BUmH: Tensor) -> Tensor:
        heads = (x.transpose(1, 2) for x in (q_BUnH, k_BUmH, v_BUmH))
        output_BnUH = functional.scaled_dot_product_attention(
            *heads, is_causal=True, enable_gqa=True
        )
        return output_BnUH.transpose(1, 2)

    group = distributed.new_group(list(range(distributed.get_world_size())))
    shared = DistributedAttention(local, group, scatter_idx=2, gather_idx=1)
    q_BSNH, k_BSMH, v_BSMH = (x.transpose(1, 2) for x in inputs)
    output: Tensor = shared(q_BSNH, k_BSMH, v_BSMH, batch_dim_idx=0)
    return output.transpose(1, 2)


def compare(case: dict[str, Any]) -> dict[str, Any]:
    """The largest distance of output and gradients of this rank's tokens from the definition."""
    *inputs, gradient = map(own, tensors(case["key_heads"]))
    for x in inputs:
        x.requires_grad_()
    if case["form"] == "deepspeed":
        output = deepspeeds(inputs)
    else:
        output = ours(case, inputs, compiled=case["form"] == "compiled")
    output.backward(gradient)
    found = [output.detach(), *(x.grad for x in inputs if x.grad is not None)]
    pairs = zip(found, map(own, expected(case)), strict=True)
    apart = torch.stack([(one - other).abs().max() for one, other in pairs])
    distributed.all_reduce(apart, distributed.ReduceOp.MAX)
    return {"apart": apart.tolist()}


def refusal(case: dict[str, Any]) -> dict[str, Any]:
    """What DeepSpeed's or torch's own form says to what it does not compute."""
    *inputs, _ = map(own, tensors(case["key_heads"]))
    calls = {"deepspeed": deepspeeds, "torch ring": torchs_ring, "torch flex": torchs_flex}
    try:
        calls[case["form"]](inputs)
    except (AssertionError, NotImplementedError) as error:
        return {"refusal": f"{type(error).__name__}: {error}"}
    return {"refusal": ""}


def torchs_ring(inputs: Tensors) -> Tensor:
    mesh = init_device_mesh("cpu", (distributed.get_world_size(),))
    whole = tensors(inputs[1].shape[1])[:3]
    with context_parallel(mesh, buffers=whole, buffer_seq_dims=[2, 2, 2]):
        # By its module: context_parallel replaces the function there.
        return functional.scaled_dot_product_attention(*whole, is_causal=True)


def torchs_flex(inputs: Tensors) -> Tensor:
    """What torch's form with document masks is built on, in training."""
    output: Tensor = flex_attention(*(x.requires_grad_() for x in inputs))
    return output


def run_case(case: dict[str, Any]) -> dict[str, Any]:
    connect(1)
    return {"name": case["name"], **globals()[case["run"]](case)}
