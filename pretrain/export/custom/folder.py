"""A Hugging Face model folder with the class that computes it."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from data_pipeline.tokenizer import Tokenizer
from pretrain.config.errors import CheckpointError, ConfigError
from pretrain.config.schema import Recipe
from pretrain.export.custom.target import CLASS_FILES, Custom, is_left_out
from pretrain.export.hf_folder import write_configs
from pretrain.export.parity import check_same_tensors
from pretrain.export.writer import dtype_name, read_weights, write_weights


def write_custom_folder(
    folder: Path, checkpoint_weights: Mapping[str, Tensor], recipe: Recipe, tokenizer: Tokenizer, max_shard_size: int | str = "5GB"
) -> tuple[str, ...]:
    """Writes weights, configs, tokenizer and the class into ``folder``, reads the weights back and compares them.

    Args:
        checkpoint_weights: what ``checkpoint.weights.load_state_dict`` gives, of one dtype; balancing biases may stay fp32.

    Returns:
        The names of our tensors that were left out, because nothing but training reads them.

    Raises:
        ConfigError: with every reason, when the class cannot compute what the recipe's model computes.
        CheckpointError: when the weights do not belong to the recipe, or a tensor does not read back as it was written.
    """
    target, model = Custom(), recipe.model
    if reasons := target.reasons_against(model):
        raise ConfigError(f"the model of '{recipe.name}' cannot be exported as {target.name}: {'; '.join(reasons)}")
    joins, left_out = target.joins(model), tuple(name for name in checkpoint_weights if is_left_out(name))
    if unknown := sorted(checkpoint_weights.keys() - {name for join in joins for name in join.ours} - set(left_out)):
        raise CheckpointError(
            f"the export has no name for the tensor '{unknown[0]}' ({len(unknown)} unknown): the checkpoint does not belong to its recipe"
        )
    theirs = {join.theirs: join.join(checkpoint_weights) for join in joins}
    write_weights(folder, theirs, max_shard_size)
    written = read_weights(folder)
    for join in joins:
        check_same_tensors({name: checkpoint_weights[name][: join.rows] for name in join.ours}, join.split(written[join.theirs]))
    for path in CLASS_FILES:
        shutil.copyfile(path, folder / path.name)
    dtype = dtype_name(theirs["embedding.weight"].dtype)
    config = {"architectures": [target.architecture], **target.config(model, tokenizer.eod_id), "dtype": dtype}
    write_configs(folder, config, tokenizer, model.max_position_embeddings)
    return left_out
