"""How large a checkpoint will be, before the first one exists."""

from __future__ import annotations

from pretrain.config.recipe import Recipe
from pretrain.model.sizes import model_size

# The fp32 weights that every tool reads, and the fp32 master weights of ZeRO and of low precision.
WEIGHTS_BYTES = MASTER_BYTES = 4
# Headers, pickled names and alignment, as a share of the tensors and in bytes: of each rank (its
# random state), of each expert of a layer (a file of its own), of each entry of the vocabulary.
MARGIN = 0.03
BYTES_BY_RANK = 64 << 10
BYTES_BY_EXPERT = 4 << 10
BYTES_BY_TOKEN = 64
FIXED_BYTES = 128 << 10


def checkpoint_bytes(recipe: Recipe, world_size: int = 1, zero_stage: int = 1) -> int:
    """Return an upper bound of the bytes of a checkpoint, a few percent above the real size.

    Args:
        recipe: resolved, so that its precision and vocabulary are known.
    """
    size = model_size(recipe.model, recipe.train.sequence_length)
    optimizer, is_fp32 = recipe.optimizer, recipe.train.precision == "fp32"
    # DeepSpeed's copy is in the number format of the computation.
    copy = 4 if is_fp32 else 2
    master = 0 if is_fp32 and zero_stage == 0 else MASTER_BYTES
    # Tables of experts are no parameters of DeepSpeed: fp32 weights, and moments of used rows.
    rows = size.parameters_rows
    matrices = size.parameters_matrices + size.parameters_sharded - rows
    others = size.parameters_stored - matrices - rows
    tensors = (matrices + others) * (WEIGHTS_BYTES + copy + master)
    state = matrices * optimizer.matrix_state_bytes + others * optimizer.other_state_bytes
    # Without ZeRO, DeepSpeed writes it next to the model and once more with the experts.
    tensors += state * (2 if zero_stage == 0 else 1)
    sparse = optimizer.sparse_optimizer
    tensors += rows * (WEIGHTS_BYTES + (0 if sparse is None else sparse.matrix_state_bytes))
    experts = recipe.model.total_experts * recipe.model.num_hidden_layers
    files = experts * BYTES_BY_EXPERT * (1 if rows == 0 else 0) + world_size * BYTES_BY_RANK
    vocabulary = (recipe.model.vocab_size or 0) * BYTES_BY_TOKEN
    return int(tensors * (1 + MARGIN)) + files + vocabulary + FIXED_BYTES
