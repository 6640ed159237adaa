"""The same model, loss and optimizer step a second time, in plain PyTorch and straight from the
formulas: the oracle of the numerics tests.

Written without a look at ``pretrain`` and without importing from it, for reading and not for speed:
every score stands in memory, every expert sees every token and a mask picks its own. It computes in
the dtype it is given; float64 makes its own rounding vanish, so that what remains is the rounding
of the program under test.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

# Input ids, next tokens (-100: no loss) and, where attention stays inside documents, their numbers;
# all [B, S] int64.
MicroBatch = tuple[Tensor, Tensor, Tensor | None]


@dataclass(frozen=True)
class PlainSettings:
    """The numbers of the formulas.

    Attributes:
        global_balance: f_e is counted over the global batch, not over each micro batch.
        num_steps: optimizer steps of the whole run.
        final_ratio: last learning rate / peak.
    """

    num_layers: int
    head_dim: int
    rope_theta: float
    norm_eps: float
    vocab_size: int
    top_k: int
    aux_loss_weight: float
    z_loss_weight: float
    global_balance: bool
    learning_rate: float
    beta1: float
    beta2: float
    adam_eps: float
    weight_decay: float
    max_norm: float
    warmup_steps: int
    num_steps: int
    final_ratio: float


@dataclass(frozen=True)
class PlainStep:
    """One optimizer step: mean cross-entropy (nats a token), the loss that was minimised, and the
    gradient norm before clipping.
    """

    cross_entropy: float
    loss: float
    grad_norm: float


class PlainMoE:
    """A decoder-only mixture-of-experts model with its AdamW state, trained one global batch at a
    time.

    Args:
        weights: by the names of ``DecoderLM.state_dict()`` with the dropless layer:
            ``embedding.weight`` [V, D], ``layers.<l>.attention_norm.weight``,
            ``layers.<l>.attention.{q,k,v,o}_proj.weight``,
            ``layers.<l>.attention.{q,k}_norm.weight``, ``layers.<l>.feed_forward_norm.weight``,
            ``layers.<l>.feed_forward.router.gate.weight`` [E, D],
            ``layers.<l>.feed_forward.experts.{w1,w3}`` [E, F, D] (gate, up) and ``.w2`` [E, D, F]
            (down), ``final_norm.weight``, ``head.weight``. They are copied.
    """

    def __init__(
        self,
        weights: Mapping[str, Tensor],
        settings: PlainSettings,
        dtype: torch.dtype = torch.float64,
    ) -> None:
        self.settings = settings
        self.weights = {
            name: weight.detach().to(dtype, copy=True).requires_grad_()
            for name, weight in weights.items()
        }
        self.first_moments = {
            name: torch.zeros_like(weight) for name, weight in self.weights.items()
        }
        self.second_moments = {
            name: torch.zeros_like(weight) for name, weight in self.weights.items()
        }

    def visible(self, S: int, documents_BS: Tensor | None) -> Tensor:
        """True where query position i may see key position j: j <= i and in the same document, [B
        or 1, 1, S, S].
        """
        causal = torch.ones(1, 1, S, S, dtype=torch.bool).tril()
        return (
            causal
            if documents_BS is None
            else causal & (documents_BS[:, None, :, None] == documents_BS[:, None, None, :])
        )

    def is_decayed(self, name: str) -> bool:
        """Every matrix but the embedding; norms are vectors."""
        return "norm" not in name and not name.startswith("embedding.")

    def gradients(self) -> dict[str, Tensor]:
        """The accumulated gradient of each weight."""
        return {
            name: weight.grad for name, weight in self.weights.items() if weight.grad is not None
        }

    def _norm(self, x: Tensor, name: str) -> Tensor:
        return (
            x
            / (x.square().mean(-1, keepdim=True) + self.settings.norm_eps).sqrt()
            * self.weights[name]
        )

    def _rotate(self, x_BNSH: Tensor) -> Tensor:
        """RoPE: the complex number x_i + j x_{i + H/2} of position t is rotated by the angle t *
        theta^(-2i/H).
        """
        half, S = self.settings.head_dim // 2, x_BNSH.shape[2]
        frequencies = self.settings.rope_theta ** (-torch.arange(half, dtype=x_BNSH.dtype) / half)
        angles = torch.outer(torch.arange(S, dtype=x_BNSH.dtype), frequencies)
        turned = torch.complex(x_BNSH[..., :half], x_BNSH[..., half:]) * torch.polar(
            torch.ones_like(angles), angles
        )
        return torch.cat((turned.real, turned.imag), dim=-1)

    def _attention(self, x_BSD: Tensor, documents_BS: Tensor | None, prefix: str) -> Tensor:
        B, S, _ = x_BSD.shape

        def heads(kind: str) -> Tensor:
            return (
                (x_BSD @ self.weights[f"{prefix}.{kind}_proj.weight"].T)
                .view(B, S, -1, self.settings.head_dim)
                .transpose(1, 2)
            )

        queries = self._rotate(self._norm(heads("q"), f"{prefix}.q_norm.weight"))
        keys, values = self._rotate(self._norm(heads("k"), f"{prefix}.k_norm.weight")), heads("v")
        groups = queries.shape[1] // keys.shape[1]  # query head n reads key/value head n // groups
        keys, values = (
            keys.repeat_interleave(groups, dim=1),
            values.repeat_interleave(groups, dim=1),
        )
        scores = (queries @ keys.transpose(2, 3) / math.sqrt(self.settings.head_dim)).masked_fill(
            ~self.visible(S, documents_BS), -math.inf
        )
        return (scores.softmax(-1) @ values).transpose(1, 2).flatten(2) @ self.weights[
            f"{prefix}.o_proj.weight"
        ].T

    def _experts(
        self, x_TD: Tensor, prefix: str, fractions_E: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The layer's output, its weighted router losses, and f_e, the share of these tokens that
        chose each expert [E].

        The load-balance loss E/k * sum_e f_e p_e takes ``fractions_E`` where it is given.
        """
        settings = self.settings
        logits_TE = x_TD @ self.weights[f"{prefix}.router.gate.weight"].T
        probs_TE = logits_TE.softmax(-1)
        num_experts = probs_TE.shape[1]
        chosen_TE = torch.zeros_like(probs_TE).scatter(
            1, probs_TE.argsort(dim=1, descending=True)[:, : settings.top_k], 1.0
        )
        weights_TE = probs_TE * chosen_TE
        weights_TE = weights_TE / weights_TE.sum(dim=1, keepdim=True)
        gate, down, up = (self.weights[f"{prefix}.experts.{name}"] for name in ("w1", "w2", "w3"))
        y_TD = torch.zeros_like(x_TD)
        for expert in range(num_experts):
            hidden_TF = functional.silu(x_TD @ gate[expert].T) * (x_TD @ up[expert].T)
            y_TD = y_TD + weights_TE[:, expert, None] * (hidden_TF @ down[expert].T)
        own_E = chosen_TE.mean(0)
        balance = (
            num_experts
            / settings.top_k
            * ((own_E if fractions_E is None else fractions_E) * probs_TE.mean(0)).sum()
        )
        z_loss = logits_TE.logsumexp(-1).square().mean()
        return y_TD, settings.aux_loss_weight * balance + settings.z_loss_weight * z_loss, own_E

    def forward(
        self,
        input_ids_BS: Tensor,
        documents_BS: Tensor | None = None,
        fractions_LE: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Logits [T, V] over the unpadded vocabulary, the weighted router losses summed over the
        layers, and each layer's f_e [L, E].
        """
        x_BSD = self.weights["embedding.weight"][input_ids_BS]
        router_loss, chosen = x_BSD.new_zeros(()), []
        for index in range(self.settings.num_layers):
            layer = f"layers.{index}"
            x_BSD = x_BSD + self._attention(
                self._norm(x_BSD, f"{layer}.attention_norm.weight"),
                documents_BS,
                f"{layer}.attention",
            )
            hidden_TD = self._norm(x_BSD, f"{layer}.feed_forward_norm.weight").flatten(0, 1)
            fractions_E = None if fractions_LE is None else fractions_LE[index]
            y_TD, layer_loss, own_E = self._experts(hidden_TD, f"{layer}.feed_forward", fractions_E)
            x_BSD = x_BSD + y_TD.view_as(x_BSD)
            router_loss = router_loss + layer_loss
            chosen.append(own_E)
        x_TD = self._norm(x_BSD, "final_norm.weight").flatten(0, 1)
        return (
            x_TD @ self.weights["head.weight"][: self.settings.vocab_size].T,
            router_loss,
            torch.stack(chosen),
        )

    @torch.no_grad()
    def global_fractions(self, micro_batches: Sequence[MicroBatch]) -> Tensor | None:
        """f_e over all tokens of the global batch [L, E].

        None where each micro batch counts its own.
        """
        if not self.settings.global_balance:
            return None
        return torch.stack(
            [self.forward(inputs, documents)[2] for inputs, _, documents in micro_batches]
        ).mean(0)

    def counted_tokens(self, micro_batches: Sequence[MicroBatch]) -> list[float]:
        """What each micro batch's summed cross-entropy is divided by: the counted tokens of the
        whole global batch.
        """
        return [float(sum((labels >= 0).sum().item() for _, labels, _ in micro_batches))] * len(
            micro_batches
        )

    def clip_factor(self, norm: float) -> float:
        """The factor for every gradient that keeps their common norm at most ``max_norm``."""
        return min(1.0, self.settings.max_norm / (norm + 1e-6))

    def learning_rate(self, step: int) -> float:
        """Linear warm-up, then half a cosine down to ``final_ratio``; ``step`` counts from 0."""
        settings = self.settings
        if step < settings.warmup_steps:
            return settings.learning_rate * (step + 1) / (settings.warmup_steps + 1)
        progress = (step - settings.warmup_steps) / (settings.num_steps - settings.warmup_steps)
        return settings.learning_rate * (
            settings.final_ratio
            + (1 - settings.final_ratio) * (1 + math.cos(math.pi * progress)) / 2
        )

    def train_step(self, micro_batches: Sequence[MicroBatch], step: int) -> PlainStep:
        """One optimizer step over the global batch; ``step`` counts from 0."""
        cross_entropy = loss = 0.0
        for weight in self.weights.values():
            weight.grad = None
        fractions_LE = self.global_fractions(micro_batches)
        for (inputs, labels, documents), tokens in zip(
            micro_batches, self.counted_tokens(micro_batches), strict=True
        ):
            logits_TV, router_loss, _ = self.forward(inputs, documents, fractions_LE)
            share = (
                functional.cross_entropy(
                    logits_TV, labels.flatten(), ignore_index=-100, reduction="sum"
                )
                / tokens
            )
            micro_loss = share + router_loss / len(micro_batches)
            micro_loss.backward()
            cross_entropy, loss = cross_entropy + share.item(), loss + micro_loss.item()
        gradients = self.gradients()
        norm = math.sqrt(sum(gradient.square().sum().item() for gradient in gradients.values()))
        clip = self.clip_factor(norm)
        self._adamw({name: gradient * clip for name, gradient in gradients.items()}, step)
        return PlainStep(cross_entropy, loss, norm)

    @torch.no_grad()
    def _adamw(self, gradients: Mapping[str, Tensor], step: int) -> None:
        """Loshchilov & Hutter 2019, algorithm 2: bias-corrected moments, and a decay that does not
        pass through them.
        """
        settings, rate = self.settings, self.learning_rate(step)
        for name, gradient in gradients.items():
            first, second, weight = (
                self.first_moments[name],
                self.second_moments[name],
                self.weights[name],
            )
            first.copy_(settings.beta1 * first + (1 - settings.beta1) * gradient)
            second.copy_(settings.beta2 * second + (1 - settings.beta2) * gradient**2)
            direction = (
                first
                / (1 - settings.beta1 ** (step + 1))
                / ((second / (1 - settings.beta2 ** (step + 1))).sqrt() + settings.adam_eps)
            )
            decay = settings.weight_decay * weight if self.is_decayed(name) else 0.0
            weight -= rate * (direction + decay)
