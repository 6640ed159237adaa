"""Which tensors of ours are which tensors of Megatron-Core's GPTModel.

A tensor of Megatron's checkpoints holds all layers, and all experts of them, in its leading
dimensions, unless the layers differ: then each layer has tensors of its own. One layer, or one
expert, of such a tensor is a block. Blocks are made one by one in either direction, so that neither
model is ever in memory as a whole.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from pretrain.export.architectures.llama_like import (
    SHARED,
    balance_bias_name,
    expert_names,
    router_name,
)
from pretrain.export.architectures.sections import grouped_query, latent, routed
from pretrain.export.name_map import RotaryRows, Tensors
from pretrain.model.config import ModelConfig

# Megatron's default of --make-vocab-size-divisible-by; it loads any other padding, too.
VOCABULARY_MULTIPLE = 128
EMBEDDING = "embedding.word_embeddings.weight"
HEAD = "output_layer.weight"
FINAL_NORM = "decoder.final_layernorm"
QKV = ("q_proj", "k_proj", "v_proj")

Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True)
class Piece:
    """A tensor of ours, or one ``expert`` of it, with its rotary rows in the order of ``heads``."""

    ours: str
    expert: int | None = None
    heads: RotaryRows | None = None

    def shape(self, shapes: Shapes) -> tuple[int, ...]:
        """Its shape, without the dimension of experts."""
        return shapes[self.ours][0 if self.expert is None else 1 :]

    def read(self, ours: Tensors) -> Tensor:
        """Its values, in their order."""
        tensor = ours.read(self.ours, self.expert)
        return tensor if self.heads is None else self.heads.to_theirs(tensor)


@dataclass(frozen=True)
class Block:
    """One layer, or one expert of a layer, of a tensor of Megatron's.

    Its rows are those of the pieces, one piece behind the other in each of ``groups``: the gate
    before the up projection, and the queries, keys and values of each group of heads.

    Attributes:
        key: of the tensor.
        index: of the layer and of the expert in its leading dimensions, which are ``counts`` long.
        rows: of ours that are no padding of the vocabulary; None for all.
        exact: whether it is fp32 whatever dtype is written.
        other_keys: what further kinds of layer call the same: those of Transformer Engine, which
            Megatron-LM builds by default, come first, and Megatron's own (``local``) behind them.
    """

    key: str
    pieces: tuple[Piece, ...]
    index: tuple[int, ...] = ()
    counts: tuple[int, ...] = ()
    groups: int = 1
    rows: int | None = None
    exact: bool = False
    other_keys: tuple[str, ...] = ()

    def shape(self, shapes: Shapes) -> tuple[int, ...]:
        """Its shape in Megatron's tensor, which a vocabulary is padded in."""
        first, *others = (piece.shape(shapes) for piece in self.pieces)
        if self.rows is not None:
            return (-(-self.rows // VOCABULARY_MULTIPLE) * VOCABULARY_MULTIPLE, *first[1:])
        return (first[0] + sum(shape[0] for shape in others), *first[1:])

    def join(self, ours: Tensors) -> Tensor:
        """Its values from ours, in our dtype."""
        if self.rows is not None:
            tensor = self.pieces[0].read(ours)[: self.rows]
            padding = -self.rows % VOCABULARY_MULTIPLE
            return torch.cat((tensor, tensor.new_zeros(padding, *tensor.shape[1:])))
        if len(self.pieces) == 1:
            return self.pieces[0].read(ours)
        parts = [piece.read(ours).unflatten(0, (self.groups, -1)) for piece in self.pieces]
        return torch.cat(parts, dim=1).flatten(0, 1)

    def split(self, tensor: Tensor, piece: Piece, shapes: Shapes) -> Tensor:
        """The values of one of its pieces, from its own."""
        if self.rows is not None:
            return tensor[: self.rows]
        sizes = [each.shape(shapes)[0] // self.groups for each in self.pieces]
        parts = tensor.unflatten(0, (self.groups, -1)).split(sizes, dim=1)
        share = parts[self.pieces.index(piece)].flatten(0, 1)
        return share if piece.heads is None else piece.heads.to_ours(share)


class Layout:
    """The blocks of a model, and the further objects that its modules look for.

    Args:
        model: with a plain embedding, of a kind that ``arguments.py`` takes.
    """

    def __init__(self, model: ModelConfig) -> None:
        self.model = model
        self.layers = model.num_hidden_layers
        # As TransformerBlock.sharded_state_dict decides by moe_layer_freq, which is a list then.
        self.stacked = len(model.moe_layers) in (0, self.layers)

    def blocks(self) -> Iterator[Block]:
        """Every block of the model, layer by layer."""
        rows = self.model.vocab_size
        yield Block(EMBEDDING, (Piece("embedding.weight"),), rows=rows)
        for layer in range(self.layers):
            yield from self._attention(layer)
            if layer in self.model.moe_layers:
                yield from self._experts(layer)
            else:
                yield from self._dense(layer)
        yield Block(f"{FINAL_NORM}.weight", (Piece("final_norm.weight"),))
        if not self.model.tie_word_embeddings:
            yield Block(HEAD, (Piece("head.weight"),), rows=rows)

    def extra_states(self) -> Iterator[str]:
        """The names of Transformer Engine's states of fp8 scales, which are empty.

        Modules of either kind ask for them while they load, and Megatron does not load a checkpoint
        without them by default. A name that no module asks for is left alone.
        """
        for layer in range(self.layers):
            is_moe = layer in self.model.moe_layers
            for module in self._modules(is_moe):
                yield self._object(module, layer)
            if is_moe:
                for expert in range(routed(self.model).num_experts):
                    for matrix in ("linear_fc1", "linear_fc2"):
                        yield self._object(f"mlp.experts.experts.{matrix}", layer, expert)
        yield f"{FINAL_NORM}._extra_state/shard_0_1"

    def _modules(self, is_moe: bool) -> list[str]:
        attention = self.model.attention
        names = ["linear_proj", "core_attention"]
        if attention.has_latents:
            names += ["linear_kv_down_proj", "linear_kv_up_proj"]
            has_query_latent = latent(self.model).q_lora_rank is not None
            names += (
                ["linear_q_down_proj", "linear_q_up_proj"]
                if has_query_latent
                else ["linear_q_proj"]
            )
        else:
            names += ["linear_qkv", "q_layernorm", "k_layernorm"]
        modules = [f"self_attention.{name}" for name in names] + ["input_layernorm"]
        inner = "mlp.shared_experts" if is_moe else "mlp"
        return [*modules, "pre_mlp_layernorm", f"{inner}.linear_fc1", f"{inner}.linear_fc2"]

    def _object(self, module: str, layer: int, expert: int | None = None) -> str:
        index, counts = self._place(layer, expert)
        offsets = ".".join(map(str, index or (0,)))
        sizes = ".".join(map(str, counts or (1,)))
        return f"{self._key(f'{module}._extra_state', layer)}/shard_{offsets}_{sizes}"

    def _key(self, name: str, layer: int) -> str:
        return f"decoder.layers.{name}" if self.stacked else f"decoder.layers.{layer}.{name}"

    def _place(
        self, layer: int, expert: int | None = None
    ) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """The index in leading dimensions, and how long these are."""
        index, counts = ((layer,), (self.layers,)) if self.stacked else ((), ())
        if expert is None:
            return index, counts
        return (*index, expert), (*counts, routed(self.model).num_experts)

    def _block(
        self,
        layer: int,
        name: str,
        *pieces: Piece,
        others: tuple[str, ...] = (),
        expert: int | None = None,
        groups: int = 1,
        exact: bool = False,
    ) -> Block:
        index, counts = self._place(layer, expert)
        other_keys = tuple(self._key(other, layer) for other in others)
        key = self._key(name, layer)
        return Block(key, pieces, index, counts, groups, exact=exact, other_keys=other_keys)

    def _attention(self, layer: int) -> Iterator[Block]:
        ours = f"layers.{layer}.attention."
        norm = Piece(f"layers.{layer}.attention_norm.weight")
        if self.model.attention.has_latents:
            yield self._block(layer, "input_layernorm.weight", norm)
            yield from self._latents(layer, ours)
        else:
            attention = grouped_query(self.model)
            yield self._block(layer, "self_attention.linear_qkv.layer_norm_weight", norm)
            for part in ("weight", "bias")[: 1 + (attention.bias == "qkv")]:
                pieces = (Piece(f"{ours}{name}.{part}") for name in QKV)
                groups = attention.num_key_value_heads
                yield self._block(
                    layer, f"self_attention.linear_qkv.{part}", *pieces, groups=groups
                )
            for letter in "qk" if attention.qk_norm == "head" else "":
                piece = Piece(f"{ours}{letter}_norm.weight")
                yield self._block(layer, f"self_attention.{letter}_layernorm.weight", piece)
        yield self._block(layer, "self_attention.linear_proj.weight", Piece(f"{ours}o_proj.weight"))

    def _latents(self, layer: int, ours: str) -> Iterator[Block]:
        attention = latent(self.model)
        rotated = attention.qk_rope_head_dim
        queries = RotaryRows(attention.num_attention_heads, attention.qk_nope_head_dim, rotated)
        keys = RotaryRows(1, attention.kv_lora_rank, rotated)
        matrices: dict[str, Piece] = {
            "linear_kv_down_proj": Piece(f"{ours}kv_a_proj.weight", heads=keys),
            "linear_kv_up_proj": Piece(f"{ours}kv_b_proj.weight"),
        }
        norms = ["kv"]
        if attention.q_lora_rank is None:
            matrices["linear_q_proj"] = Piece(f"{ours}q_proj.weight", heads=queries)
        else:
            matrices["linear_q_down_proj"] = Piece(f"{ours}q_a_proj.weight")
            matrices["linear_q_up_proj"] = Piece(f"{ours}q_b_proj.weight", heads=queries)
            norms.append("q")
        for name, piece in matrices.items():
            yield self._block(layer, f"self_attention.{name}.weight", piece)
        for name in norms:
            yield self._block(
                layer,
                f"self_attention.linear_{name}_up_proj.layer_norm_weight",
                Piece(f"{ours}{name}_a_norm.weight"),
                others=(f"self_attention.{name}_layernorm.weight",),
            )

    def _dense(self, layer: int) -> Iterator[Block]:
        ours = f"layers.{layer}.feed_forward."
        yield self._block(
            layer,
            "mlp.linear_fc1.layer_norm_weight",
            Piece(f"layers.{layer}.feed_forward_norm.weight"),
            others=("pre_mlp_layernorm.weight",) if self.model.attention.has_latents else (),
        )
        gate_and_up = (Piece(f"{ours}{name}_proj.weight") for name in ("gate", "up"))
        yield self._block(layer, "mlp.linear_fc1.weight", *gate_and_up)
        yield self._block(layer, "mlp.linear_fc2.weight", Piece(f"{ours}down_proj.weight"))

    def _experts(self, layer: int) -> Iterator[Block]:
        moe = routed(self.model)
        yield self._block(
            layer,
            "pre_mlp_layernorm.weight",
            Piece(f"layers.{layer}.feed_forward_norm.weight"),
            others=()
            if self.model.attention.has_latents
            else ("mlp.linear_fc1.layer_norm_weight",),
        )
        router = Piece(router_name(moe).format(layer=layer) + ".weight")
        yield self._block(layer, "mlp.router.weight", router)
        if moe.bias_balancing is not None:
            bias = Piece(balance_bias_name(moe).format(layer=layer))
            yield self._block(layer, "mlp.router.expert_bias", bias, exact=True)
        if moe.shared_width:
            shared = f"{SHARED.format(layer=layer)}feed_forward."
            gate_and_up = (Piece(f"{shared}{name}_proj.weight") for name in ("gate", "up"))
            yield self._block(layer, "mlp.shared_experts.linear_fc1.weight", *gate_and_up)
            down = Piece(f"{shared}down_proj.weight")
            yield self._block(layer, "mlp.shared_experts.linear_fc2.weight", down)
        names = expert_names(self.model)
        for expert in range(moe.num_experts):
            gate, up, down = (
                Piece(
                    name.format(layer=layer, expert=expert),
                    # A tensor of one expert alone has no dimension of experts.
                    None if "{expert}" in name else expert,
                )
                for name in names
            )
            matrices = {"linear_fc1": (gate, up), "linear_fc2": (down,)}
            for matrix, pieces in matrices.items():
                name = f"mlp.experts.experts.{matrix}.weight"
                yield self._block(layer, name, *pieces, expert=expert)
