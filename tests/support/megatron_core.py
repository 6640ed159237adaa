"""Megatron-Core's own GPTModel on a CPU: loads checkpoints and computes logits, and saves others.

Run as a program, in a process of its own: Megatron keeps process groups and other state in globals,
and its writer starts processes that import the main module again.

Megatron-Core 0.16 asks for a GPU in places that no computation on a CPU needs. What is replaced
here is only that, and the arguments that its own attention (``local``) does not know:

- ``torch.cuda.current_device`` (rotary_pos_embedding.py, router.py) and ``synchronize``
  (filesystem_async.py);
- the tracker of CUDA's random states around dropout (dot_product_attention.py), and the alltoall
  dispatcher, which needs a CUDA stream: ``allgather`` computes the same;
- ``te_general_gemm`` (moe_utils.py:1192) and ``TELinear`` (multi_latent_attention.py:185), which
  are looked for although there is no Transformer Engine;
- ``k_channels`` and ``v_channels`` of DotProductAttention, which latent attention passes on.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

warnings.filterwarnings("ignore")


def adapt_to_cpu() -> None:
    """Replaces what is listed above, in this process."""
    from megatron.core.tensor_parallel.random import CudaRNGStatesTracker
    from megatron.core.transformer import multi_latent_attention
    from megatron.core.transformer.dot_product_attention import DotProductAttention
    from megatron.core.transformer.moe import moe_utils

    changed: Any = torch.cuda
    changed.current_device = lambda: "cpu"
    changed.synchronize = lambda *_: None
    changed = CudaRNGStatesTracker
    changed.fork = lambda *_: contextlib.nullcontext()
    changed = moe_utils
    changed.te_general_gemm = None
    changed = multi_latent_attention
    changed.HAVE_TE = False
    initialize = DotProductAttention.__init__

    def without_widths(self: Any, *args: Any, **options: Any) -> None:
        # The width of the output is kv_channels, which the arguments set to that of the values.
        options = {k: v for k, v in options.items() if k not in ("k_channels", "v_channels")}
        initialize(self, *args, **options)

    changed = DotProductAttention
    changed.__init__ = without_widths


def build(arguments: Any) -> Any:
    """GPTModel in fp32, as Megatron-LM's ``core_transformer_config_from_args`` builds it."""
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec
    from megatron.core.transformer.transformer_config import (
        MLATransformerConfig,
        TransformerConfig,
    )

    kind = MLATransformerConfig if arguments.multi_latent_attention else TransformerConfig
    known = {field.name for field in dataclasses.fields(kind)}
    given = {name: value for name, value in vars(arguments).items() if name in known}
    given |= {
        "layernorm_epsilon": arguments.norm_epsilon,
        "num_moe_experts": arguments.num_experts,
        "gated_linear_unit": arguments.swiglu,
        "activation_func": torch.nn.functional.silu,
        "params_dtype": torch.float32,
        "use_cpu_initialization": True,
        # How the same is computed.
        "moe_token_dispatcher_type": "allgather",
        "moe_grouped_gemm": False,
        "apply_rope_fusion": False,
        "bias_activation_fusion": False,
        "bias_dropout_fusion": False,
        "masked_softmax_fusion": False,
        "gradient_accumulation_fusion": False,
        "persist_layer_norm": False,
    }
    config = kind(**given)
    spec = get_gpt_decoder_block_spec(config, False, normalization=arguments.normalization)
    return GPTModel(
        config,
        spec,
        vocab_size=arguments.padded_vocab_size,
        max_sequence_length=arguments.max_position_embeddings,
        position_embedding_type=arguments.position_embedding_type,
        rotary_percent=arguments.rotary_percent,
        rotary_base=arguments.rotary_base,
        rope_scaling=arguments.use_rope_scaling,
        rope_scaling_factor=arguments.rope_scaling_factor,
        share_embeddings_and_output_weights=not arguments.untie_embeddings_and_output_weights,
    ).eval()


@torch.inference_mode()
def logits_of(model: Any, ids_BS: Tensor) -> Any:
    """Logits [B, S, V] of causal attention."""
    length = ids_BS.shape[1]
    masked = torch.ones(length, length, dtype=torch.bool).triu(1)[None, None]
    positions_BS = torch.arange(length).expand_as(ids_BS)
    return model(ids_BS, positions_BS, masked)


def run_case(case: dict[str, str], ids_BS: Tensor) -> dict[str, Any]:
    """Loads a folder and computes logits; then saves the model with random weights, and its."""
    from megatron.core import dist_checkpointing
    from megatron.core.dist_checkpointing.validation import StrictHandling

    folder = case["folder"]
    common = dist_checkpointing.load_common_state_dict(folder)
    model = build(common["args"])
    metadata = dist_checkpointing.load_content_metadata(preloaded_state_dict=common)
    wanted = {"model": model.sharded_state_dict(metadata=dict(metadata))}
    # Megatron calls "missing" what the files have and the model does not ask for.
    loaded, left_alone, lacking = dist_checkpointing.load(
        wanted, folder, strict=StrictHandling.RETURN_ALL
    )
    model.load_state_dict(loaded["model"])
    torch.save(logits_of(model, ids_BS), case["logits"])
    torch.manual_seed(1)
    with torch.no_grad():
        for name, value in model.state_dict().items():
            if value is not None:
                value.normal_(1.0 if "norm" in name else 0.0, 0.2)
    torch.save(logits_of(model, ids_BS), case["random_logits"])
    saved = Path(case["random"], "iter_0000042")
    saved.mkdir(parents=True)
    sharded = model.sharded_state_dict(metadata={"singleton_local_shards": False})
    state = {key: common[key] for key in ("args", "checkpoint_version")}
    dist_checkpointing.save({**state, "iteration": 42, "model": sharded}, str(saved))
    Path(case["random"], "latest_checkpointed_iteration.txt").write_text("42")
    return {
        "left_alone": sorted(left_alone),
        "lacking": sorted(lacking),
        "iteration": common["iteration"],
    }


def main() -> None:
    """Runs the cases of a JSON file, and writes what they found next to it."""
    cases = Path(sys.argv[1])
    adapt_to_cpu()
    from megatron.core import parallel_state
    from megatron.core.safe_globals import register_safe_globals

    register_safe_globals()
    torch.distributed.init_process_group(
        "gloo", store=torch.distributed.HashStore(), rank=0, world_size=1
    )
    parallel_state.initialize_model_parallel()
    ids_BS = torch.load(cases.with_name("ids.pt"))
    found = {case["name"]: run_case(case, ids_BS) for case in json.loads(cases.read_text())}
    cases.with_name("found.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main()
