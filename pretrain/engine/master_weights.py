"""The fp32 weights that an optimizer updates, wherever DeepSpeed's ZeRO stage keeps them."""

from __future__ import annotations

from typing import Any

import torch
from deepspeed.utils import safe_get_full_fp32_param
from torch import nn

from pretrain.engine.workarounds.stage0_master_weights import stage0_masters


class MasterWeights:
    """Reads fp32 weights of single parameters.

    Args:
        optimizer: the one that ``deepspeed.initialize`` returned.
    """

    def __init__(self, optimizer: Any, zero_stage: int, precision: str) -> None:
        self._optimizer = optimizer
        self._zero_stage = zero_stage
        self._precision = precision

    def whole(self, parameter: nn.Parameter) -> torch.Tensor:
        """The whole weight of one parameter, fp32 (of an expert parameter, this rank's experts).

        Every rank must call it for the same parameters in the same order: ZeRO gathers them.
        """
        if self._zero_stage == 0:
            masters = stage0_masters(self._optimizer, self._precision)
            return masters.get(id(parameter), parameter).detach()
        full = safe_get_full_fp32_param(parameter)
        assert full is not None, "every trainable parameter is in the optimizer"
        return full.detach()

    def local_part(self, parameter: nn.Parameter) -> torch.Tensor | None:
        """The part of a parameter in this rank's optimizer, as a view; None if there is none."""
        if self._zero_stage == 0:
            return stage0_masters(self._optimizer, self._precision).get(id(parameter), parameter)
        if self._zero_stage == 3:
            part: torch.Tensor = self._optimizer._get_fp32_opt_state_partition(
                parameter, release_swap_buffers=False
            )[0]
            return part
        # Stages 1 and 2: DeepSpeed links each bf16 parameter to its fragment of the flat fp32
        # partition.
        mapping = parameter._hp_mapping  # type: ignore[attr-defined]
        return None if mapping is None else mapping.get_hp_fragment()
