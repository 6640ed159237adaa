"""Cases of :mod:`tests.support.workers.training_steps`, and how near their results have to be."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tests.support.ranks import Case, Results

SIZES = [
    "model.vocab_size=128", "train.global_batch_size=8", "train.micro_batch_size=2",
    "train.sequence_length=32", "train.grad_clip=0.3",
    # with the default tiny weights the experts have next to no gradient, and faults in it would not
    # show
    "model.initializer_range=0.15",
]  # fmt: skip
LOSSES = "aux_loss_weight: 0.05, z_loss_weight: 0.01"
KINDS = {
    "dropless": (
        "model.moe={kind: dropless, num_experts: 4, top_k: 2, moe_intermediate_size: 32,"
        f" {LOSSES}}}"
    ),
    "deepspeed": (
        "model.moe={kind: deepspeed, num_experts: 4, top_k: 2, moe_intermediate_size: 32,"
        f" drop_tokens: false, {LOSSES}}}"
    ),
}
# Everything of a MoE layer that is not in the plain one, at a rate of balancing that changes
# choices within a few steps.
EVERYTHING = (
    "num_experts: 4, top_k: 2, moe_intermediate_size: 32, num_shared_experts: 1,"
    " shared_expert_gate: true, bias_balancing: {update_rate: 0.02}, sequence_loss_weight: 0.02,"
    " cv_loss_weight: 0.02, entropy_loss_weight: 0.02, router: {kind: sigmoid_topk, bias: true,"
    " routed_scaling_factor: 1.5, groups: {num_groups: 2, top_k_groups: 1, score: top2_sum}}"
)
KINDS |= {
    "dropless_full": f"model.moe={{kind: dropless, {EVERYTHING}, {LOSSES}}}",
    "deepspeed_full": (
        f"model.moe={{kind: deepspeed, gate: router, drop_tokens: false, {EVERYTHING}, {LOSSES}}}"
    ),
}
# Three dimensions, experts of two hidden units, and few enough of them that each step uses some
# more than others.
KINDS["peer"] = (
    "model.moe={kind: peer, product_key_sizes: [4, 4, 2], query_dim: 24, num_heads: 2, top_k: 3,"
    " moe_intermediate_size: 2, num_shared_experts: 1, shared_intermediate_size: 8}"
)
OPTIMIZERS = {
    kind: f"optimizer={{kind: {kind}, learning_rate: {rate}}}"
    for kind, rate in {
        "sgd": "0.5",
        "adamw": "3.0e-3",
        "muon": "3.0e-3",
        "lion": "1.0e-3",
        "adamw_8bit": "3.0e-3",
    }.items()
}
SGD, ADAMW, MUON, LION, EIGHT_BIT = OPTIMIZERS.values()


def case(
    kind: str,
    zero: int,
    ep_size: int,
    optimizer: str = SGD,
    overrides: tuple[str, ...] = (),
    sp_size: int = 1,
    tp_size: int = 1,
    **extra: Any,
) -> Case:
    label = "-".join(
        [
            kind,
            next(kind for kind in OPTIMIZERS if OPTIMIZERS[kind] == optimizer),
            *(f"{key}={value}" for key, value in extra.items()),
            *overrides,
        ]
    )
    return {
        "name": f"{label}/zero{zero}/ep{ep_size}"
        + f"/sp{sp_size}" * (sp_size > 1)
        + f"/tp{tp_size}" * (tp_size > 1),
        "label": label,
        "zero": zero,
        # Enough that a wrong step shows in all later ones. Low precision is compared by the mean
        # loss of more of AdamW's; a balance bias needs more to move.
        "steps": 10 if optimizer == ADAMW or kind.endswith("_full") else 6,
        "overrides": [
            *SIZES,
            KINDS[kind],
            optimizer,
            f"parallel={{ep_size: {ep_size}, sp_size: {sp_size}, tp_size: {tp_size}}}",
            *overrides,
        ],
        **extra,
    }


def difference(row: dict[str, Any], reference: dict[str, Any]) -> float:
    """Largest relative difference of losses, gradient norms and the validation loss."""
    pairs = [(row["validation"], reference["validation"])]
    for key in ("nll", "loss", "grad_norm"):
        pairs += zip(row[key], reference[key], strict=True)
    return max(abs(a - b) / abs(b) for a, b in pairs)


def tolerance(label: str) -> float:
    if "adamw_8bit" in label:
        # blocks of 256 numbers begin elsewhere in ZeRO's partitions, and small tensors stay fp32 at
        # stage 0
        return 5e-3
    if label == "peer-adamw":
        # Two ranks add their shares of an output in another order. AdamW's first steps divide each
        # gradient by its own size, so an element whose gradient nearly cancels moves by its
        # rounding; trained by SGD the same ranks agree to 1e-6.
        return 3e-5
    return 1e-5 if "adamw" in label or label == "peer-muon" else 1e-6  # AdamW trains PEER's rows


def check_all(
    matrix: dict[int, Results],
    cases: dict[int, list[Case]],
    skip: Callable[[Case], bool] = lambda _: False,
) -> int:
    """Compares every case with the single-process ZeRO 0 run of the same kind; returns how many
    were compared.
    """
    compared = 0
    for world_size, entries in cases.items():
        for entry in entries:
            reference = f"{entry['label']}/zero0/ep1"
            if skip(entry) or (world_size == 1 and entry["name"] == reference):
                continue
            found = difference(matrix[world_size][entry["name"]], matrix[1][reference])
            assert found <= tolerance(entry["label"]), (
                f"{entry['name']} on {world_size} ranks differs by {found:.1e}"
            )
            compared += 1
    return compared
