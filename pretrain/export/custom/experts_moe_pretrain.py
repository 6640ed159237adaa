"""Dense feed-forwards, routers, and the kinds of mixtures of experts."""

from __future__ import annotations

import math
from collections.abc import Callable
from types import SimpleNamespace

import torch
from torch import Tensor, nn
from torch.nn import functional

from .configuration_moe_pretrain import MoePretrainConfig, Section

# --- feed-forwards --------------------------------------------------------------------------------


def clamped_swiglu(form: Section, gate: Tensor, up: Tensor) -> Tensor:
    """The activation of gpt-oss."""
    gate, up = gate.clamp(max=form["limit"]), up.clamp(-form["limit"], form["limit"])
    return gate * torch.sigmoid(form["alpha"] * gate) * (up + 1)


def product_swiglu(form: Section, gate: Tensor, up: Tensor) -> Tensor:
    """Project 828: gpt-oss's activation of the even and the odd elements of gate * up."""
    product = gate * up
    return clamped_swiglu(form, product[..., 0::2], product[..., 1::2])


GATED: dict[str, Callable[[Section, Tensor, Tensor], Tensor]] = {
    "swiglu": lambda form, gate, up: functional.silu(gate) * up,
    "clamped_swiglu": clamped_swiglu,
    "product_swiglu": product_swiglu,
}
UNGATED: dict[str, Callable[[Section, Tensor], Tensor]] = {
    "gelu": lambda form, up: functional.gelu(up, approximate=form["approximate"]),
    "silu": lambda form, up: functional.silu(up),
}


def rows_before(form: Section, width: int) -> int:
    """Rows of the matrices before the activation, for ``width`` hidden units after it."""
    return 2 * width if form["kind"] == "product_swiglu" else width


class FeedForward(nn.Module):
    """down(activation(gate(x), up(x))), or down(activation(up(x))) for the kinds without a gate."""

    def __init__(self, config: MoePretrainConfig, width: int) -> None:
        super().__init__()
        self.form = form = config.feed_forward
        sizes = config.hidden_size, rows_before(form, width), form["bias"]
        self.gate_proj = nn.Linear(*sizes) if form["kind"] in GATED else None
        self.up_proj = nn.Linear(*sizes)
        self.down_proj = nn.Linear(width, config.hidden_size, form["bias"])

    def forward(self, x: Tensor) -> Tensor:
        """[..., D] -> [..., D]."""
        kind = self.form["kind"]
        if self.gate_proj is None:
            return self.down_proj(UNGATED[kind](self.form, self.up_proj(x)))
        return self.down_proj(GATED[kind](self.form, self.gate_proj(x), self.up_proj(x)))


class Experts(nn.Module):
    """E feed-forwards, with the matrices of all experts in one tensor.

    ``gate_proj`` and ``up_proj`` are [E, F, D], ``down_proj`` is [E, D, F].
    """

    def __init__(self, config: MoePretrainConfig) -> None:
        super().__init__()
        assert config.moe is not None
        self.form = form = config.feed_forward
        E = config.moe["num_experts"]
        D = config.hidden_size
        width = config.moe["moe_intermediate_size"]
        rows = rows_before(form, width)
        gated = form["kind"] in GATED
        biased = form["bias"]
        self.gate_proj = nn.Parameter(torch.empty(E, rows, D)) if gated else None
        self.up_proj = nn.Parameter(torch.empty(E, rows, D))
        self.down_proj = nn.Parameter(torch.empty(E, D, width))
        self.gate_bias = nn.Parameter(torch.zeros(E, rows)) if gated and biased else None
        self.up_bias = nn.Parameter(torch.zeros(E, rows)) if biased else None
        self.down_bias = nn.Parameter(torch.zeros(E, D)) if biased else None

    def one(self, expert: int, x_RD: Tensor) -> Tensor:
        """The output of one expert for R tokens, [R, D]."""

        def product(x: Tensor, matrix: Tensor, bias: Tensor | None) -> Tensor:
            return functional.linear(x, matrix[expert], None if bias is None else bias[expert])

        up_RF = product(x_RD, self.up_proj, self.up_bias)
        if self.gate_proj is None:
            hidden_RF = UNGATED[self.form["kind"]](self.form, up_RF)
        else:
            hidden_RF = GATED[self.form["kind"]](
                self.form, product(x_RD, self.gate_proj, self.gate_bias), up_RF
            )
        return product(hidden_RF, self.down_proj, self.down_bias)

    def forward(self, x_TD: Tensor, weights_TK: Tensor, experts_TK: Tensor) -> Tensor:
        """The weighted sum of the chosen experts' outputs, accumulated in fp32 [T, D].

        The index -1 is a choice that exceeded the expert's capacity.
        """
        # index_add_ in bf16 would round after each expert.
        y_TD = torch.zeros_like(x_TD, dtype=torch.float32)
        for expert in experts_TK[experts_TK >= 0].unique().tolist():
            tokens, choices = (experts_TK == expert).nonzero(as_tuple=True)
            y_TD.index_add_(
                0,
                tokens,
                self.one(expert, x_TD[tokens]).float() * weights_TK[tokens, choices, None],
            )
        return y_TD.to(x_TD.dtype)


# --- routers --------------------------------------------------------------------------------------

SCORES: dict[str, Callable[[SimpleNamespace, Tensor], Tensor]] = {
    "softmax_topk": lambda form, logits_TE: (logits_TE / form.temperature).softmax(dim=-1),
    "sigmoid_topk": lambda form, logits_TE: logits_TE.sigmoid(),
    # Its noise is for training only.
    "noisy_topk": lambda form, logits_TE: logits_TE.softmax(dim=-1),
}


class Router(nn.Module):
    """Chooses K of E experts for each token; fp32 whatever the model's precision."""

    def __init__(self, config: MoePretrainConfig) -> None:
        super().__init__()
        assert config.moe is not None
        self.form = SimpleNamespace(**config.moe["router"])
        self.top_k = config.moe["top_k"]
        self.gate = nn.Linear(config.hidden_size, config.moe["num_experts"], bias=self.form.bias)
        # Chooses experts and never weighs them (Wang et al. 2024; DeepSeek-V3, section 2.1.2).
        balanced = config.moe["bias_balancing"]
        self.balance_bias = (
            nn.Parameter(torch.zeros(config.moe["num_experts"]), requires_grad=False)
            if balanced
            else None
        )

    def logits(self, x_TD: Tensor) -> Tensor:
        """[T, D] -> fp32 [T, E]. Near ties are decided by rounding: bf16 would choose others."""
        bias = None if self.gate.bias is None else self.gate.bias.float()
        return functional.linear(x_TD.float(), self.gate.weight.float(), bias)

    def forward(self, x_TD: Tensor) -> tuple[Tensor, Tensor]:
        """[T, D] -> weights, fp32 [T, K], and indices of the chosen experts [T, K]."""
        scores_TE = SCORES[self.form.kind](self.form, self.logits(x_TD))
        chosen_by_TE = (
            scores_TE if self.balance_bias is None else scores_TE + self.balance_bias.float()
        )
        if self.form.groups is not None:
            chosen_by_TE = self._in_best_groups(chosen_by_TE, **self.form.groups)
        experts_TK = chosen_by_TE.topk(self.top_k, dim=-1).indices
        # Weights come from the scores without the balancing bias, which only chooses.
        weights_TK = scores_TE.gather(1, experts_TK)
        if self.form.norm_topk_prob:
            # Sigmoid scores may all be 0 in fp32; softmax scores never add up to so little.
            weights_TK = weights_TK / weights_TK.sum(dim=-1, keepdim=True).clamp_min(1e-20)
        return weights_TK * self.form.routed_scaling_factor, experts_TK

    @staticmethod
    def _in_best_groups(
        scores_TE: Tensor, num_groups: int, top_k_groups: int, score: str
    ) -> Tensor:
        """Scores, -inf for experts outside of the best groups (DeepSeek-V2, section 2.1.3)."""
        scores_TGe = scores_TE.unflatten(1, (num_groups, -1))
        group_scores_TG = (
            scores_TGe.amax(dim=-1)
            if score == "max"
            else scores_TGe.topk(2, dim=-1).values.sum(dim=-1)
        )
        best_TG = torch.zeros_like(group_scores_TG, dtype=torch.bool).scatter(
            1, group_scores_TG.topk(top_k_groups, dim=-1).indices, True
        )
        return scores_TGe.masked_fill(~best_TG[..., None], -math.inf).flatten(1)


class LimitedRouter(Router):
    """A router whose experts take at most ``capacity`` tokens; later tokens are dropped."""

    def __init__(self, config: MoePretrainConfig) -> None:
        super().__init__(config)
        assert config.moe is not None
        self.moe = SimpleNamespace(**config.moe)

    def capacity(self, T: int) -> int:
        """Tokens that each expert takes of T."""
        return max(
            math.ceil(T * self.top_k / self.moe.num_experts * self.moe.eval_capacity_factor),
            self.moe.min_capacity,
        )

    def forward(self, x_TD: Tensor) -> tuple[Tensor, Tensor]:
        """As :class:`Router`, and -1 for a choice that exceeds the capacity."""
        weights_TK, experts_TK = super().forward(x_TD)
        if self.moe.drop_tokens:
            chosen_TE = torch.zeros(
                len(x_TD), self.moe.num_experts, dtype=torch.int64, device=x_TD.device
            ).scatter_(1, experts_TK, 1)
            # How many earlier tokens of the batch have chosen the same expert.
            before_TK = (chosen_TE.cumsum(dim=0) - chosen_TE).gather(1, experts_TK)
            experts_TK = experts_TK.masked_fill(before_TK >= self.capacity(len(x_TD)), -1)
        return weights_TK, experts_TK


class DeepSpeedRouter(LimitedRouter):
    """DeepSpeed 0.19's own gate in evaluation.

    Which tokens a full expert drops depends on K. K = 1 keeps the tokens that torch.topk finds
    first; K = 2 serves all first choices before all second ones; a larger K keeps the most
    probable. For K > 1 the weights of the kept choices are renormalised.
    """

    def capacity(self, T: int) -> int:
        """Tokens that each expert takes of T."""
        # In fp32 as in DeepSpeed: a product that is whole in one precision may be a little more in
        # another, and ceil makes it one token more.
        return max(
            int(
                torch.ceil(
                    T
                    / self.moe.num_experts
                    * torch.tensor(self.moe.eval_capacity_factor * self.top_k)
                )
            ),
            self.moe.min_capacity,
        )

    def forward(self, x_TD: Tensor) -> tuple[Tensor, Tensor]:
        logits_TE = self.logits(x_TD)
        probs_TE = logits_TE.softmax(dim=-1)
        experts_TK = self._choices(logits_TE, probs_TE)
        kept_TK = (
            self._kept(probs_TE, experts_TK)
            if self.moe.drop_tokens
            else torch.ones_like(experts_TK, dtype=torch.bool)
        )
        weights_TK = probs_TE.gather(1, experts_TK) * kept_TK
        if self.top_k > 1:
            weights_TK = weights_TK / weights_TK.sum(dim=1, keepdim=True).clamp_min(
                torch.finfo(torch.float32).eps
            )
        return weights_TK, experts_TK.masked_fill(~kept_TK, -1)

    def _choices(self, logits_TE: Tensor, probs_TE: Tensor) -> Tensor:
        if self.top_k > 2:
            return probs_TE.topk(self.top_k, dim=1).indices
        first_T1 = probs_TE.argmax(dim=1, keepdim=True)
        if self.top_k == 1:
            return first_T1
        return torch.cat(
            (first_T1, logits_TE.scatter(1, first_T1, -math.inf).argmax(dim=1, keepdim=True)), dim=1
        )

    def _kept(self, probs_TE: Tensor, experts_TK: Tensor) -> Tensor:
        """Which choices are within the capacity, bool [T, K]."""
        capacity = self.capacity(len(probs_TE))
        chosen_TKE = functional.one_hot(experts_TK, probs_TE.shape[1])
        if self.top_k == 2:
            # All first choices, then all second ones.
            queue_XE = chosen_TKE.transpose(0, 1).flatten(0, 1)
            before_XE = queue_XE.cumsum(dim=0) - queue_XE
            return ((before_XE < capacity) & queue_XE.bool()).any(dim=1).unflatten(0, (2, -1)).T
        ranked_TE = chosen_TKE[:, 0] if self.top_k == 1 else probs_TE * chosen_TKE.sum(dim=1)
        best_CE = ranked_TE.topk(
            min(capacity, len(ranked_TE)), dim=0, sorted=self.top_k == 1
        ).indices
        return (
            torch.zeros_like(probs_TE, dtype=torch.bool)
            .scatter(0, best_CE, True)
            .gather(1, experts_TK)
        )


# --- mixtures of experts --------------------------------------------------------------------------


class SharedExperts(nn.Module):
    """Experts that see every token, as one feed-forward of their joint width.

    With a gate, the output is multiplied by sigmoid(w x).
    """

    def __init__(self, config: MoePretrainConfig) -> None:
        super().__init__()
        assert config.moe is not None
        self.feed_forward = FeedForward(config, config.moe["shared_intermediate_size"])
        self.gate = (
            nn.Linear(config.hidden_size, 1, bias=False)
            if config.moe["shared_expert_gate"]
            else None
        )

    def forward(self, x: Tensor) -> Tensor:
        """[..., D] -> [..., D]."""
        y = self.feed_forward(x)
        return y if self.gate is None else y * torch.sigmoid(self.gate(x))


class DroplessMoE(nn.Module):
    """Every token reaches all of its K experts."""

    def __init__(self, config: MoePretrainConfig, router: type[Router] = Router) -> None:
        super().__init__()
        assert config.moe is not None
        self.router = router(config)
        self.experts = Experts(config)
        self.shared = SharedExperts(config) if config.moe["shared_intermediate_size"] else None

    def routed(self, x_TD: Tensor) -> Tensor:
        """The output of the routed experts, [T, D] -> [T, D]."""
        return self.experts(x_TD, *self.router(x_TD))

    def forward(self, x_BSD: Tensor) -> Tensor:
        """[B, S, D] -> [B, S, D]."""
        x_TD = x_BSD.flatten(0, 1)
        y_TD = self.routed(x_TD)
        return (y_TD if self.shared is None else y_TD + self.shared(x_TD)).view_as(x_BSD)


class DeepSpeedMoE(DroplessMoE):
    """DeepSpeed's layer: experts with a capacity, and a residual expert (PR-MoE).

    Rajbhandari et al. 2022. The capacity is for all tokens of a batch, so that with ``drop_tokens``
    a token's output depends on its neighbours: one by one with a cache, fewer tokens are dropped.
    """

    def __init__(self, config: MoePretrainConfig) -> None:
        assert config.moe is not None
        super().__init__(
            config, {"deepspeed": DeepSpeedRouter, "router": LimitedRouter}[config.moe["gate"]]
        )
        if config.moe["use_residual"]:
            self.residual = FeedForward(config, config.moe["moe_intermediate_size"])
            self.coefficient = nn.Linear(config.hidden_size, 2)

    def routed(self, x_TD: Tensor) -> Tensor:
        """The output of the routed experts and of the residual one, [T, D] -> [T, D]."""
        y_TD = super().routed(x_TD)
        if not hasattr(self, "residual"):
            return y_TD
        shares_T2 = self.coefficient(x_TD).softmax(dim=-1)
        return y_TD * shares_T2[:, :1] + self.residual(x_TD) * shares_T2[:, 1:]
