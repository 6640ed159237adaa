"""Each fused kernel against the plain code: differences, time, and bytes per second.

Both sides are the same functions of the model, with fused kernels off and on, in bf16. Bytes are
those that no form can avoid: inputs and outputs once in the forward pass, and inputs and gradients
of both once in the backward pass. On a CPU Triton's interpreter computes: TRITON_INTERPRET=1.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import nn

from gpu.models import recipe_of
from gpu.timing import Bench, timed
from pretrain.core.errors import ConfigError
from pretrain.core.files import JsonObject
from pretrain.model.attention.config import GroupedQueryAttentionConfig
from pretrain.model.config import ModelConfig
from pretrain.model.feed_forward import SwiGLU
from pretrain.model.kernels.selection import Mode, set_fused_kernels
from pretrain.model.loss import LanguageModelHead
from pretrain.model.moe.dispatch import combine, gather_tokens, group_rows
from pretrain.model.moe.experts import ExpertForm
from pretrain.model.moe.losses import router_statistics
from pretrain.model.moe.router import TopKRouter
from pretrain.model.positions.rope import apply_rope_to_both, inverse_frequencies, rope_tables

# Of the norm of plain values: what rounding to bf16 in another order may change.
TOLERANCE = 0.02


@dataclass(frozen=True)
class Case:
    """One function of the model.

    Attributes:
        inputs: those that need gradients come back with them; at least one does.
        call: returns the outputs.
    """

    inputs: Sequence[torch.Tensor]
    call: Callable[[], Sequence[torch.Tensor]]


@dataclass(frozen=True)
class Sizes:
    """Of the tensors: the layer of a model, with so many tokens."""

    config: ModelConfig
    tokens: int
    device: torch.device

    @property
    def top_k(self) -> int:
        """Experts of a token."""
        return self.config.moe.experts_per_token if self.config.moe else 1

    @property
    def experts(self) -> int:
        """All routed experts of the layer."""
        return self.config.total_experts

    def draw(self, *shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
        """Random values that need a gradient."""
        return torch.randn(shape, device=self.device).to(dtype).requires_grad_()

    def choices(self) -> torch.Tensor:
        """Random experts of all tokens [T * K], int64."""
        scores_TE = torch.rand(self.tokens, self.experts, device=self.device)
        return scores_TE.topk(self.top_k, dim=1).indices.reshape(-1)


def _rows(sizes: Sizes) -> Case:
    x_TD = sizes.draw(sizes.tokens, sizes.config.hidden_size)
    order_R, inverse_R, _ = group_rows(sizes.choices(), sizes.experts)
    return Case([x_TD], lambda: [gather_tokens(x_TD, order_R, inverse_R, sizes.top_k)])


def _weighted_sum(sizes: Sizes) -> Case:
    rows_RD = sizes.draw(sizes.tokens * sizes.top_k, sizes.config.hidden_size)
    weights_TK = sizes.draw(sizes.tokens, sizes.top_k, dtype=torch.float32)
    order_R, inverse_R, _ = group_rows(sizes.choices(), sizes.experts)
    return Case(
        [rows_RD, weights_TK],
        lambda: [combine(rows_RD, order_R=order_R, inverse_R=inverse_R, weights_TK=weights_TK)],
    )


def _activation(sizes: Sizes) -> Case:
    moe = sizes.config.moe
    assert moe is not None
    shape = sizes.tokens * sizes.top_k, moe.moe_intermediate_size
    gate, up = sizes.draw(*shape), sizes.draw(*shape)
    form = ExpertForm(SwiGLU, sizes.config.feed_forward)
    return Case([gate, up], lambda: [form.hidden(gate, up)])


def _router(sizes: Sizes) -> Case:
    from pretrain.model.moe.config import DroplessMoEConfig

    moe = sizes.config.moe
    assert isinstance(moe, DroplessMoEConfig)
    gate = nn.Linear(sizes.config.hidden_size, sizes.experts, bias=False, device=sizes.device)
    router = TopKRouter(moe.router, gate, sizes.top_k, balanced_by_bias=False)
    x_TD = sizes.draw(sizes.tokens, sizes.config.hidden_size)
    counts_E = torch.full((sizes.experts,), sizes.tokens * sizes.top_k / sizes.experts)
    counts_E = counts_E.to(sizes.device)
    dropped = torch.zeros((), device=sizes.device)

    def call() -> Sequence[torch.Tensor]:
        routing = router(x_TD)
        statistics = router_statistics(moe, routing, counts_E, 1, dropped)
        return [routing.topk_weights_TK, statistics.losses_J]

    return Case([x_TD, gate.weight], call)


def _rotation(sizes: Sizes) -> Case:
    attention = sizes.config.attention
    assert isinstance(attention, GroupedQueryAttentionConfig)
    length, head = min(sizes.tokens, 4096), attention.head_dim
    batch = sizes.tokens // length
    q_BNSH = sizes.draw(batch, attention.num_attention_heads, length, head)
    k_BMSH = sizes.draw(batch, attention.num_key_value_heads, length, head)
    places = torch.arange(length, device=sizes.device)
    tables = rope_tables(places, inverse_frequencies(head, 10_000.0, sizes.device))
    return Case([q_BNSH, k_BMSH], lambda: apply_rope_to_both(q_BNSH, k_BMSH, tables))


def _loss(sizes: Sizes) -> Case:
    vocabulary = sizes.config.vocab_size or 0
    head = LanguageModelHead(
        sizes.config.hidden_size,
        padded_vocab_size=vocabulary,
        vocab_size=vocabulary,
        chunk_tokens=sizes.config.loss_chunk_tokens,
        z_loss_weight=sizes.config.output_z_loss_weight,
    )
    nn.init.normal_(head.weight, std=0.02)
    head.to(sizes.device, torch.bfloat16)
    x_1TD = sizes.draw(1, sizes.tokens, sizes.config.hidden_size)
    labels_1T = torch.randint(vocabulary, (1, sizes.tokens), device=sizes.device)
    return Case([x_1TD, head.weight], lambda: [head(x_1TD, labels_1T)[0]])


CASES: dict[str, Callable[[Sizes], Case]] = {
    "rows of tokens": _rows,
    "weighted sum": _weighted_sum,
    "activation": _activation,
    "router and its losses": _router,
    "rotation": _rotation,
    "head and loss": _loss,
}


def jobs() -> list[tuple[str, str]]:
    """The model whose sizes each process uses, and what it computes."""
    return [(model, "all kernels") for model in ("coarse", "fine")]


def measure(bench: Bench, model: str, _: str) -> dict[str, JsonObject]:
    """All cases at the sizes of a model, by their names.

    Raises:
        ConfigError: on a CPU without Triton's interpreter.
    """
    if bench.device.type == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        raise ConfigError(
            "fused kernels compute on a CPU in Triton's interpreter alone: set TRITON_INTERPRET=1"
        )
    tokens = 64 if bench.quick else 16_384
    sizes = Sizes(recipe_of(model, tiny=bench.quick).model, tokens, bench.device)
    return {name: _compared(bench, make, sizes) for name, make in CASES.items()}


def _compared(bench: Bench, make: Callable[[Sizes], Case], sizes: Sizes) -> JsonObject:
    """One case in both forms, on the same values."""
    fused: Mode = "auto" if bench.device.type == "cuda" else "always"
    values: dict[str, list[torch.Tensor]] = {}
    found: JsonObject = {}
    modes: dict[str, Mode] = {"plain": "none", "fused": fused}
    for name, mode in modes.items():
        set_fused_kernels(mode)
        torch.manual_seed(0)
        case = make(sizes)
        ones = [torch.ones_like(each) for each in case.call() if each.requires_grad]
        both_ways = partial(_both_ways, case, ones)
        values[name] = [each.detach().clone() for each in both_ways()]
        # Freed by the next call: the bytes are counted from the first.
        count = _moved_bytes(case)
        result = timed(bench, both_ways)
        found |= {
            f"{name}_us": result.seconds * 1e6,
            f"{name}_gb_per_s": count / result.seconds / 1e9,
        }
    set_fused_kernels("auto")
    differences = [
        _difference(*pair) for pair in zip(values["plain"], values["fused"], strict=True)
    ]
    equal = all(map(torch.equal, values["plain"], values["fused"]))
    return found | {
        "speed_up": found["plain_us"] / found["fused_us"],
        "same_bits": equal,
        "difference": max(differences),
        "close": max(differences) <= TOLERANCE,
    }


def _trained(case: Case) -> list[torch.Tensor]:
    return [each for each in case.inputs if each.requires_grad]


def _both_ways(case: Case, gradients: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Outputs, and gradients of the inputs for those of the outputs that need one."""
    for each in _trained(case):
        each.grad = None
    outputs = list(case.call())
    torch.autograd.backward([each for each in outputs if each.requires_grad], gradients)
    return outputs + [each.grad for each in _trained(case) if each.grad is not None]


def _moved_bytes(case: Case) -> int:
    """Inputs and outputs once each way, and gradients of the inputs."""
    inputs = sum(each.nbytes for each in case.inputs)
    outputs = sum(each.nbytes for each in case.call())
    gradients = sum(each.nbytes for each in _trained(case))
    return 2 * (inputs + outputs) + gradients


def _difference(plain: torch.Tensor, fused: torch.Tensor) -> float:
    """The norm of the difference over that of the plain values."""
    size = plain.double().norm().item()
    return float((fused.double() - plain.double()).norm().item()) / max(size, 1e-30)
