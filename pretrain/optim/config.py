"""The optimizer section of a recipe: each kind with its numbers, and what its state costs."""

from __future__ import annotations

from abc import abstractmethod
from typing import Annotated, ClassVar, Literal

from pydantic import Field

from pretrain.core.registry import Component
from pretrain.core.section import Positive

Rate = Annotated[float, Field(gt=0)]
Beta = Annotated[float, Field(ge=0, lt=1)]
Decay = Annotated[float, Field(ge=0)]


class Optimizer(Component):
    """What every kind has. ``implementation`` builds the optimizer from parameter groups and this section."""

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
        """Bytes of optimizer state for one parameter of a hidden matrix, experts included."""

    @property
    def other_state_bytes(self) -> float:
        """Bytes of optimizer state for one parameter of anything else."""
        return self.matrix_state_bytes

    @property
    def row_optimizer(self) -> AdamW | SGD | None:
        """What trains the rows of PEER's tables, of which a step uses few; None where the kind cannot."""
        return None


class AdamW(Optimizer):
    """AdamW (Loshchilov & Hutter 2019), torch's fused kernel."""

    implementation: ClassVar[str] = "pretrain.optim.optimizers:adamw"
    kind: Literal["adamw"] = "adamw"
    beta1: Beta = 0.9
    beta2: Beta = 0.95
    eps: Rate = 1e-8

    @property
    def matrix_state_bytes(self) -> float:
        return 8.0

    @property
    def row_optimizer(self) -> AdamW | SGD | None:
        return self


class SGD(Optimizer):
    """Plain stochastic gradient descent: for numerical comparisons."""

    implementation: ClassVar[str] = "pretrain.optim.optimizers:sgd"
    kind: Literal["sgd"]
    momentum: Beta = 0.0
    weight_decay: Decay = 0.0

    @property
    def matrix_state_bytes(self) -> float:
        return 4.0 if self.momentum else 0.0

    @property
    def row_optimizer(self) -> AdamW | SGD | None:
        return self


class AdamW8bit(Optimizer):
    """AdamW with both moments in 8 bits (Dettmers et al. 2022): blocks of 256 numbers, each with its largest one in fp32. By bitsandbytes.

    Tensors of fewer than 4,096 numbers keep fp32 moments. A ZeRO stage quantises its flat partitions, whose blocks begin elsewhere: runs of
    different layouts agree to the error of 8 bits, not to that of fp32.
    """

    implementation: ClassVar[str] = "pretrain.optim.optimizers:adamw_8bit"
    kind: Literal["adamw_8bit"]
    beta1: Beta = 0.9
    beta2: Beta = 0.95
    eps: Rate = 1e-8

    @property
    def matrix_state_bytes(self) -> float:
        return 2.0 * (1.0 + 4.0 / 256.0)


class Lion(Optimizer):
    """Lion (Chen et al. 2023): the sign of an average of the momentum and the gradient.

    Every weight moves by the learning rate, so that takes a third to a tenth of AdamW's, and as much more weight decay. As published, also those
    whose gradient is zero: an expert that gets no tokens any more goes on by the sign of its momentum, step by step as far as before.
    """

    implementation: ClassVar[str] = "pretrain.optim.lion:lion"
    kind: Literal["lion"]
    beta1: Beta = 0.9
    beta2: Beta = 0.99

    @property
    def matrix_state_bytes(self) -> float:
        return 4.0


class Muon(Optimizer):
    """Muon (Jordan et al. 2024) for hidden matrices, every expert's by itself; AdamW for embeddings, head, routers and vectors.

    An update has the root mean square of AdamW's, 0.2, whatever a matrix's shape (Liu et al. 2025, "Muon is scalable"): both share a learning
    rate and a decay. A matrix whose gradient is zero, that of an expert without tokens, does not move but for its decay.
    """

    implementation: ClassVar[str] = "pretrain.optim.muon:muon"
    kind: Literal["muon"]
    momentum: Beta = 0.95
    nesterov: bool = True
    newton_schulz_steps: Positive = 5
    newton_schulz_precision: Literal["auto", "fp32", "bf16"] = Field(
        "auto",
        description="of the orthogonalisation; 'auto': bf16 on GPUs, as it was published, else fp32",
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

    @property
    def row_optimizer(self) -> AdamW | SGD | None:
        shared = set(AdamW.model_fields) & set(Muon.model_fields) - {"kind"}
        return AdamW(**{name: getattr(self, name) for name in sorted(shared)})
