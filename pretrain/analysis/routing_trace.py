"""Which experts each token of a text chose in every layer, and a model run with such choices.

Native models are observed at their routers, and may be made to repeat a recorded choice there: the
weights of the experts are then the model's own for these experts. Models of transformers are
observed at their experts, where no choice can be repeated.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Any, Literal, NamedTuple, cast

import torch
from pydantic import BaseModel, ConfigDict, ValidationError
from torch import nn
from torch.nn import functional

from pretrain.core.errors import ConfigError, DataError
from pretrain.core.files import JsonObject
from pretrain.core.saved_types import Count, first_fault
from pretrain.core.strict_json import NotAnObject, read_object
from pretrain.evaluation.generation.generators import NativeGenerator, TransformersGenerator
from pretrain.model.block import Block
from pretrain.model.moe.base import RoutingRecord
from pretrain.model.moe.product_keys import ProductKeys, Retrieval
from pretrain.model.moe.router import Routing, TopKRouter

FORMAT = "moe-routing-trace"
VERSION = 1
# Logits of so many tokens are in memory at once.
CHUNK_TOKENS = 512


class LayerTrace(BaseModel):
    """The choices of one layer.

    Attributes:
        layer: its number in the model, from 0.
        experts: [tokens][choices], a token's experts; of PEER, the choices of all heads one head
            after the other.
        weights: the weight of each of these experts' outputs; 0 if the expert was full, and
            dropped the token.
    """

    model_config = ConfigDict(strict=True, extra="forbid")

    layer: Count
    experts: list[list[Count]]
    weights: list[list[float]]


class RoutingTrace(BaseModel):
    """The routing of one text by one model, as the file has it.

    Attributes:
        model: the checkpoint or export.
        step: of the checkpoint; None for an export.
        dtype: that the model ran in.
        num_experts: routed experts of a layer.
        heads: of PEER, each with its own choices; 1 for routers.
        token_ids: of the text, behind the token that begins a document.
        tokens: the text of each of them.
        loss: mean nats of a token from the second on; None for a single token.
    """

    model_config = ConfigDict(strict=True, extra="forbid")

    format: Literal["moe-routing-trace"] = "moe-routing-trace"
    version: Literal[1] = 1
    model: str
    step: Count | None
    dtype: str
    num_experts: Count
    heads: Count = 1
    token_ids: list[Count]
    tokens: list[str]
    loss: float | None
    layers: list[LayerTrace]


class Choice(NamedTuple):
    """One layer's choice on the CPU: ids int64 and weights fp32, both [T, choices]."""

    ids_TC: torch.Tensor
    weights_TC: torch.Tensor


class Pass(NamedTuple):
    """One forward pass: the mean loss in nats a token, and the choices by layer."""

    loss: float | None
    choices: dict[int, Choice]


@dataclass
class _Observer:
    """Collects choices, and forces recorded ones where ``forced`` has a layer."""

    forced: dict[int, torch.Tensor] = field(default_factory=dict)
    seen: dict[int, Choice] = field(default_factory=dict)

    def force(self, layer: int) -> Callable[..., Any]:
        def before(module: nn.Module, given: tuple[Any, ...]) -> tuple[Any, ...]:
            # Routers are called with (x_TD, record): a filled record repeats its choice.
            ids = self.forced[layer].to(given[0].device)
            if isinstance(module, ProductKeys):
                ids = ids.unflatten(1, (module.num_heads, -1))
            return given[0], RoutingRecord(ids)

        return before

    def note_router(self, layer: int) -> Callable[..., None]:
        def after(module: nn.Module, given: Any, decision: Routing | Retrieval) -> None:
            ids, weights = (
                (decision.topk_ids_TK, decision.topk_weights_TK)
                if isinstance(decision, Routing)
                else (decision.ids_ThK.flatten(1), decision.weights_ThK.flatten(1))
            )
            self.seen[layer] = _choice(ids, weights)

        return after

    def note_gate(self, layer: int) -> Callable[..., None]:
        def after(module: Any, given: Any, decision: tuple[Any, ...]) -> None:
            # See GateDecision: expert -1 is a dropped choice; choices come first.
            experts_TK, weights_TK = decision[3].T.long(), decision[5].T
            kept_TK = experts_TK >= 0
            wanted_TK = module.routing(given[0]).topk_ids_TK
            self.seen[layer] = _choice(
                torch.where(kept_TK, experts_TK, wanted_TK), weights_TK * kept_TK
            )

        return after

    def note_experts(self, layer: int) -> Callable[..., None]:
        def before(module: nn.Module, given: tuple[Any, ...], named: dict[str, Any]) -> None:
            # (hidden, ids, weights) in transformers, (hidden, weights, ids) in our export class.
            rows = [value for value in (*given, *named.values()) if isinstance(value, torch.Tensor)]
            pairs = [value for value in rows[1:] if value.dim() == 2]
            ids = [value for value in pairs if not value.is_floating_point()]
            weights = [value for value in pairs if value.is_floating_point()]
            if len(ids) == 1 and len(weights) == 1 and ids[0].shape == weights[0].shape:
                made = _choice(ids[0].clamp_min(0), weights[0] * (ids[0] >= 0))
                # PEER's experts are called once for each head.
                if (known := self.seen.get(layer)) is not None:
                    made = Choice(
                        *(torch.cat(pair, dim=1) for pair in zip(known, made, strict=True))
                    )
                self.seen[layer] = made

        return before


def _choice(ids: torch.Tensor, weights: torch.Tensor) -> Choice:
    return Choice(ids.detach().long().cpu(), weights.detach().float().cpu())


def run(
    opened: NativeGenerator | TransformersGenerator,
    token_ids: Sequence[int],
    forced: dict[int, torch.Tensor] | None = None,
) -> Pass:
    """One forward pass over a text, with its own choices or with ``forced`` ones.

    Args:
        forced: [T, choices] int64 by layer; all of them, or none.

    Raises:
        ConfigError: if the model has no routed layer that can be seen, or cannot repeat a choice.
    """
    observer = _Observer(forced or {})
    ids_1S = torch.tensor([list(token_ids)], device=opened.device)
    with ExitStack() as hooks, torch.no_grad():
        if isinstance(opened, NativeGenerator):
            _watch_native(opened, observer, hooks)
            hidden_BSD = opened.model.hidden(ids_1S)
            loss = _mean_loss(lambda rows: opened.model.project(hidden_BSD[:, rows]), ids_1S)
        else:
            if forced:
                raise ConfigError(
                    "a Hugging Face folder cannot repeat recorded choices: give --replay a "
                    "checkpoint of this project, such as the one that it was exported from"
                )
            _watch_transformers(opened, observer, hooks)
            logits_BSV = opened.model(ids_1S).logits
            loss = _mean_loss(lambda rows: logits_BSV[:, rows], ids_1S)
    if not observer.seen:
        raise ConfigError(
            "no choice of an expert was seen: the model has no routed experts, or its class hides "
            "them; give a checkpoint of this project with a mixture of experts"
        )
    return Pass(loss, dict(sorted(observer.seen.items())))


def _watch_native(opened: NativeGenerator, observer: _Observer, hooks: ExitStack) -> None:
    for layer, block in enumerate(opened.model.layers):
        if not (isinstance(block, Block) and block.is_moe):
            continue
        routers = [
            module for module in block.modules() if isinstance(module, TopKRouter | ProductKeys)
        ]
        for router in routers:
            if observer.forced:
                hooks.callback(router.register_forward_pre_hook(observer.force(layer)).remove)
            hooks.callback(router.register_forward_hook(observer.note_router(layer)).remove)
        gate = getattr(getattr(block.feed_forward, "deepspeed_moe", None), "gate", None)
        if gate is not None:
            if observer.forced and not routers:
                raise ConfigError(
                    "DeepSpeed's own gate takes no recorded choice: --replay needs "
                    "model.moe.gate=router, or kind dropless or peer"
                )
            hooks.callback(gate.register_forward_hook(observer.note_gate(layer)).remove)


def _watch_transformers(
    opened: TransformersGenerator, observer: _Observer, hooks: ExitStack
) -> None:
    for name, module in opened.model.named_modules():
        number = re.search(r"layers\.(\d+)\.", name)
        if number is not None and type(module).__name__.endswith("Experts"):
            seen = observer.note_experts(int(number[1]))
            hooks.callback(module.register_forward_pre_hook(seen, with_kwargs=True).remove)


def _mean_loss(logits_of: Callable[[slice], torch.Tensor], ids_1S: torch.Tensor) -> float | None:
    """Mean nats of the tokens from the second on, from the logits of slices of tokens."""
    last = ids_1S.shape[1] - 1
    total = 0.0
    for start in range(0, last, CHUNK_TOKENS):
        rows = slice(start, min(start + CHUNK_TOKENS, last))
        labels = ids_1S[0, rows.start + 1 : rows.stop + 1]
        logits = logits_of(rows)[0].float()
        total += functional.cross_entropy(logits, labels, reduction="sum").item()
    return total / last if last else None


def record(
    opened: NativeGenerator | TransformersGenerator,
    token_ids: Sequence[int],
    *,
    model: str,
    step: int | None,
    dtype: str,
) -> RoutingTrace:
    """Trace a text.

    Raises:
        ConfigError: see :func:`run`.
    """
    found = run(opened, token_ids)
    num_experts, heads = sizes(opened, found)
    return RoutingTrace(
        model=model,
        step=step,
        dtype=dtype,
        num_experts=num_experts,
        heads=heads,
        token_ids=list(token_ids),
        tokens=[opened.decode([token]) for token in token_ids],
        loss=found.loss,
        layers=[
            LayerTrace(
                layer=layer, experts=choice.ids_TC.tolist(), weights=choice.weights_TC.tolist()
            )
            for layer, choice in found.choices.items()
        ],
    )


def sizes(opened: NativeGenerator | TransformersGenerator, found: Pass) -> tuple[int, int]:
    """How many experts a layer has, and how many heads choose."""
    if isinstance(opened, NativeGenerator):
        moe = opened.model.config.moe
        assert moe is not None
        return moe.total_experts, getattr(moe, "num_heads", 1)
    config = opened.model.config
    for name in ("num_experts", "num_local_experts", "n_routed_experts"):
        if isinstance(getattr(config, name, None), int):
            return getattr(config, name), 1
    section = cast(JsonObject, getattr(config, "moe", None) or {})
    if "product_key_sizes" in section:
        return prod(section["product_key_sizes"]), int(section["num_heads"])
    highest = 1 + max(int(choice.ids_TC.max()) for choice in found.choices.values())
    return int(section.get("num_experts") or highest), 1


def read_trace(path: Path) -> RoutingTrace:
    """Read a recorded routing; the file may be anybody's.

    Raises:
        DataError: if it is no such file, or its parts do not fit together.
    """
    try:
        trace = RoutingTrace.model_validate(read_object(path))
    except NotAnObject as error:
        raise _damaged(path, str(error)) from None
    except ValidationError as error:
        raise _damaged(path, f"has {first_fault(error)}") from None
    count = len(trace.token_ids)
    if not count or len(trace.tokens) != count or not trace.layers:
        raise _damaged(path, "has no tokens, no layers, or texts of another number of tokens")
    for layer in trace.layers:
        lengths = {len(experts) for experts in layer.experts}
        lengths |= {len(weights) for weights in layer.weights}
        even = len(layer.experts) == len(layer.weights) == count and len(lengths) == 1
        if not even or 0 in lengths:
            raise _damaged(path, f"has other numbers of choices than tokens in layer {layer.layer}")
        if max(map(max, layer.experts)) >= trace.num_experts:
            raise _damaged(path, f"names experts in layer {layer.layer} that do not exist")
    return trace


def _damaged(path: Path, what: str) -> DataError:
    return DataError(f"{path} {what}: record it again with --out")


class LayerDifference(NamedTuple):
    """How far a model's own choices are from recorded ones, in one layer.

    Attributes:
        tokens: share of the tokens with another set of experts.
        choices: share of the recorded choices that the model would not make.
    """

    layer: int
    tokens: float
    choices: float


class Replay(NamedTuple):
    """A text through one model with its own routing, and with a recorded one.

    Attributes:
        recorded_loss: of the model that the routing was recorded from.
    """

    own_loss: float | None
    replayed_loss: float | None
    recorded_loss: float | None
    layers: list[LayerDifference]


def replay(opened: NativeGenerator | TransformersGenerator, trace: RoutingTrace) -> Replay:
    """Run the tokens of a trace through a model twice: freely, and with the recorded choices.

    Raises:
        ConfigError: if the model cannot repeat them: another class, tokenizer, or form.
    """
    _check_tokens(opened, trace)
    own = run(opened, trace.token_ids)
    forced = {layer.layer: torch.tensor(layer.experts) for layer in trace.layers}
    _check_form(opened, own, trace, forced)
    repeated = run(opened, trace.token_ids, forced)
    differences = []
    for layer, choice in own.choices.items():
        # A set of experts: their order is only that of their weights.
        same_TC = (choice.ids_TC[:, :, None] == forced[layer][:, None, :]).any(dim=1)
        differences.append(
            LayerDifference(
                layer,
                1 - same_TC.all(dim=1).float().mean().item(),
                1 - same_TC.float().mean().item(),
            )
        )
    return Replay(own.loss, repeated.loss, trace.loss, differences)


def _check_tokens(opened: NativeGenerator | TransformersGenerator, trace: RoutingTrace) -> None:
    if len(trace.token_ids) > opened.max_positions:
        raise ConfigError(
            f"the trace has {len(trace.token_ids)} tokens, and the model takes "
            f"{opened.max_positions}: record a shorter text"
        )
    size = (
        opened.model.config.vocab_size if isinstance(opened, NativeGenerator) else opened.vocab_size
    )
    known = max(trace.token_ids) < (size or 0)
    if not known or [opened.decode([token]) for token in trace.token_ids] != trace.tokens:
        raise ConfigError(
            f"the trace of {trace.model} has other tokens than this model's tokenizer makes: "
            "replay it with a model of the same tokenizer"
        )


def _check_form(
    opened: NativeGenerator | TransformersGenerator,
    own: Pass,
    trace: RoutingTrace,
    forced: dict[int, torch.Tensor],
) -> None:
    mine = {layer: choice.ids_TC.shape[1] for layer, choice in own.choices.items()}
    theirs = {layer: ids_TC.shape[1] for layer, ids_TC in forced.items()}
    if (mine, sizes(opened, own)) != (theirs, (trace.num_experts, trace.heads)):
        raise ConfigError(
            f"the trace of {trace.model} has {trace.num_experts} experts in layers {[*theirs]} "
            f"with {[*set(theirs.values())]} choices a token, and this model "
            f"{sizes(opened, own)[0]} in {[*mine]} with {[*set(mine.values())]}: replay it with a "
            "model of the same form"
        )
