"""The optimizer section of a recipe: the fields of each kind, and what its state costs."""

from __future__ import annotations

from abc import abstractmethod
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from pydantic import Field

from pretrain.core.registry import Component

if TYPE_CHECKING:
    from torch import Tensor

Rate = Annotated[float, Field(gt=0)]
Beta = Annotated[float, Field(ge=0, lt=1)]
Decay = Annotated[float, Field(ge=0)]


class Optimizer(Component):
    """What every kind has; ``implementation`` builds it from parameter groups and this section.

    Attributes:
        needs_whole_matrices: its update of a matrix differs from that of the matrix' parts.
        has_codes: its state is of codes whose scales are of blocks of elements.
        scales_with_width: muP has learning rates for it: as in Adam, its step does not grow with
            the gradient, and every element moves about equally far.
        has_universal_checkpoints: its state is Adam's two moments in fp32, which DeepSpeed loads.
    """

    needs_whole_matrices: ClassVar[bool] = False
    has_codes: ClassVar[bool] = False
    scales_with_width: ClassVar[bool] = False
    has_universal_checkpoints: ClassVar[bool] = False

    kind: str
    learning_rate: Rate
    weight_decay: Decay = Field(
        0.1, description="of matrices; norms and embeddings are never decayed"
    )
    router_learning_rate: Rate | None = None
    embedding_learning_rate: Rate | None = None

    @property
    @abstractmethod
    def matrix_state_bytes(self) -> float:
        """Bytes of optimizer state per parameter of a hidden matrix, experts included."""

    @property
    def other_state_bytes(self) -> float:
        """Bytes of optimizer state per parameter of anything else."""
        return self.matrix_state_bytes

    @property
    def sparse_optimizer(self) -> SparseOptimizerConfig | None:
        """The section that trains tables of which a step uses few rows; None if it cannot."""
        return None

    def rule_for(self, is_hidden_matrix: bool) -> str | None:
        """The name of the rule that trains a parameter; None for kinds with one rule for all."""
        return None


class SparseOptimizerConfig(Optimizer):
    """A kind that can also train single rows of a table, each as if it were a parameter."""

    @property
    @abstractmethod
    def row_moments(self) -> tuple[str, ...]:
        """Names of the fp32 tensors that it keeps per row, each of the row's size."""

    @abstractmethod
    def row_direction(
        self, gradient_UD: Tensor, moments_UD: dict[str, Tensor], steps_U: Tensor
    ) -> Tensor:
        """The update of rows at a learning rate of 1, without weight decay.

        Args:
            gradient_UD: fp32 gradients of the rows.
            moments_UD: :attr:`row_moments` of the rows; changed in place.
            steps_U: int32, how many steps have used each row, this one included.
        """

    @property
    def sparse_optimizer(self) -> SparseOptimizerConfig | None:
        return self


class AdamWConfig(SparseOptimizerConfig):
    """AdamW (Loshchilov & Hutter 2019), torch's fused kernel."""

    scales_with_width: ClassVar[bool] = True
    implementation: ClassVar[str] = "pretrain.optim.optimizers:adamw"
    has_universal_checkpoints: ClassVar[bool] = True
    kind: Literal["adamw"] = "adamw"
    beta1: Beta = 0.9
    beta2: Beta = 0.95
    eps: Rate = 1e-8

    @property
    def matrix_state_bytes(self) -> float:
        # Two moments in fp32.
        return 8.0

    @property
    def row_moments(self) -> tuple[str, ...]:
        return ("exp_avg", "exp_avg_sq")

    def row_direction(
        self, gradient_UD: Tensor, moments_UD: dict[str, Tensor], steps_U: Tensor
    ) -> Tensor:
        """Loshchilov & Hutter 2019, algorithm 2, with each row's own step count."""
        first_UD = moments_UD["exp_avg"]
        second_UD = moments_UD["exp_avg_sq"]
        first_UD.lerp_(gradient_UD, 1.0 - self.beta1)
        second_UD.mul_(self.beta2).addcmul_(gradient_UD, gradient_UD, value=1.0 - self.beta2)
        # In fp64: beta2 to the power of a large step is too close to 1 for fp32.
        steps_U1 = steps_U[:, None].double()
        correction1_U1 = (1.0 - self.beta1**steps_U1).float()
        correction2_U1 = (1.0 - self.beta2**steps_U1).float()
        size_UD = second_UD.sqrt().div_(correction2_U1.sqrt()).add_(self.eps)
        return first_UD.div(correction1_U1).div_(size_UD)


class SGDConfig(SparseOptimizerConfig):
    """Plain stochastic gradient descent, for numerical comparisons."""

    implementation: ClassVar[str] = "pretrain.optim.optimizers:sgd"
    kind: Literal["sgd"]
    momentum: Beta = 0.0
    weight_decay: Decay = 0.0

    @property
    def matrix_state_bytes(self) -> float:
        return 4.0 if self.momentum else 0.0

    @property
    def row_moments(self) -> tuple[str, ...]:
        return ("momentum",) if self.momentum else ()

    def row_direction(
        self, gradient_UD: Tensor, moments_UD: dict[str, Tensor], steps_U: Tensor
    ) -> Tensor:
        """As torch's SGD: the first step of a row starts its momentum."""
        if not self.momentum:
            return gradient_UD
        # As torch without dampening: momentum * buffer + gradient, in place.
        return moments_UD["momentum"].mul_(self.momentum).add_(gradient_UD)


class AdamW8bitConfig(Optimizer):
    """AdamW with both moments in 8 bits (Dettmers et al. 2022), by bitsandbytes.

    Blocks of 256 elements share a scale, their largest one in fp32. Tensors of fewer than 4,096
    elements keep fp32 moments. A ZeRO stage quantises its flat partitions, whose blocks begin
    elsewhere: runs of different layouts agree to the error of 8 bits, not to that of fp32.
    """

    scales_with_width: ClassVar[bool] = True
    implementation: ClassVar[str] = "pretrain.optim.optimizers:adamw_8bit"
    has_codes: ClassVar[bool] = True
    kind: Literal["adamw_8bit"]
    beta1: Beta = 0.9
    beta2: Beta = 0.95
    eps: Rate = 1e-8

    @property
    def matrix_state_bytes(self) -> float:
        # Two moments of one byte, and a 4-byte scale per block of 256.
        return 2.0 * (1.0 + 4.0 / 256.0)


class LionConfig(Optimizer):
    """Lion (Chen et al. 2023): the sign of an average of the momentum and the gradient.

    Every weight moves by the learning rate, which is therefore a third to a tenth of AdamW's, with
    the weight decay larger by the same factor. As published, weights with a zero gradient move as
    well: an expert that gets no more tokens continues by the sign of its momentum, step by step as
    far as before.
    """

    scales_with_width: ClassVar[bool] = True
    implementation: ClassVar[str] = "pretrain.optim.lion:lion"
    kind: Literal["lion"]
    beta1: Beta = 0.9
    beta2: Beta = 0.99

    @property
    def matrix_state_bytes(self) -> float:
        return 4.0


class MuonConfig(Optimizer):
    """Muon (Jordan et al. 2024) for hidden matrices, each expert's on its own; AdamW for the rest.

    The rest are embeddings, head, routers and vectors. An update has AdamW's root mean square, 0.2,
    for every shape of a matrix (Liu et al. 2025, "Muon is scalable"), so both share a learning rate
    and a decay. A matrix with a zero gradient, that of an expert without tokens, moves by its decay
    alone.
    """

    implementation: ClassVar[str] = "pretrain.optim.muon:muon"
    needs_whole_matrices: ClassVar[bool] = True
    # scales_with_width stays false: muP's table for Adam does not hold for orthogonal updates.
    kind: Literal["muon"]
    momentum: Beta = 0.95
    nesterov: bool = True
    newton_schulz_steps: Annotated[int, Field(ge=1, le=100)] = 5
    newton_schulz_precision: Literal["auto", "fp32", "bf16"] = Field(
        "auto",
        description="of the orthogonalisation; 'auto': bf16 on GPUs, as it was published, else "
        "fp32",
    )
    beta1: Beta = Field(0.9, description="of AdamW, as beta2 and eps")
    beta2: Beta = 0.95
    eps: Rate = 1e-8

    @property
    def matrix_state_bytes(self) -> float:
        return 4.0

    @property
    def other_state_bytes(self) -> float:
        return 8.0

    def rule_for(self, is_hidden_matrix: bool) -> str | None:
        return "muon" if is_hidden_matrix else "adamw"

    @property
    def sparse_optimizer(self) -> SparseOptimizerConfig | None:
        # Tables are no hidden matrices: Muon's AdamW trains them, with its own betas and eps.
        shared = set(AdamWConfig.model_fields) & set(MuonConfig.model_fields) - {"kind"}
        return AdamWConfig(**{name: getattr(self, name) for name in sorted(shared)})
