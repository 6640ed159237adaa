"""Multiplies out a factorised embedding, for architectures that have none.

The export is then larger: vocabulary x hidden size elements.
"""

from __future__ import annotations

from torch import Tensor

from pretrain.checkpoint.tensor_headers import TensorForm
from pretrain.export.name_map import Tensors
from pretrain.model.config import ModelConfig

PROJECTION = "embedding.projection"
FOLDED = ("embedding.weight", "head.weight")


class FoldedEmbedding:
    """The tensors of a model with W P^T for each matrix W [V, e], without the projection P [D, e].

    An embedding is P w, and a logit w (P^T x): both are the row P w of W P^T.
    """

    def __init__(self, tensors: Tensors) -> None:
        self._tensors = tensors
        self._hidden_size = tensors.form(PROJECTION).shape[0]

    @property
    def names(self) -> list[str]:
        """All names but the projection's."""
        return [name for name in self._tensors.names if name != PROJECTION]

    def form(self, name: str) -> TensorForm:
        """A tensor's dtype and shape."""
        form = self._tensors.form(name)
        return (
            TensorForm(form.dtype, (form.shape[0], self._hidden_size)) if name in FOLDED else form
        )

    def read(self, name: str, index: int | None = None) -> Tensor:
        """A tensor, multiplied out if it is factorised."""
        tensor = self._tensors.read(name, index)
        # Multiplied in fp32, and rounded only when it is written.
        return tensor @ self._tensors.read(PROJECTION).T if name in FOLDED else tensor


def without_factors(model: ModelConfig, tensors: Tensors) -> tuple[ModelConfig, Tensors]:
    """The model and its tensors with a plain embedding."""
    if model.embedding_size is None:
        return model, tensors
    return model.model_copy(update={"embedding_size": None}), FoldedEmbedding(tensors)
