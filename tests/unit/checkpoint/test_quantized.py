"""8-bit states between topologies; bitsandbytes is the oracle."""

from __future__ import annotations

import pytest
import torch

from pretrain.checkpoint.quantized import (
    BLOCK,
    PADDING,
    Dequantized,
    expand,
    never_quantized,
    quantize,
)

functional = pytest.importorskip("bitsandbytes.functional")


@pytest.fixture(params=[True, False], ids=["signed", "unsigned"])
def levels(request: pytest.FixtureRequest) -> torch.Tensor:
    found: torch.Tensor = functional.create_dynamic_map(signed=request.param)
    return found


def state(levels: torch.Tensor, elements: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes and scales as bitsandbytes makes them of random moments of very different sizes."""
    values = torch.randn(elements) * 10.0 ** torch.randint(-6, 3, (elements,))
    values = values if levels[0] < 0 else values.abs()
    codes, found = functional.quantize_blockwise(values, code=levels, blocksize=BLOCK)
    return codes, found.absmax


def joined(parts: list[Dequantized]) -> Dequantized:
    return Dequantized(*(torch.cat(tensors) for tensors in zip(*parts, strict=True)))


@pytest.mark.parametrize("elements", [1, 255, 256, 257, 1000, 4096])
def test_blocks_that_are_cut_as_before_keep_codes_and_scales(
    levels: torch.Tensor, elements: int
) -> None:
    codes, scales = state(levels, elements)
    found_codes, found_scales = quantize(expand(codes, scales, levels, 0), levels)
    assert torch.equal(found_codes, codes) and torch.equal(found_scales, scales)


def test_a_part_of_a_block_keeps_its_values(levels: torch.Tensor) -> None:
    """A rank that takes over the middle of another one's blocks, cut at a block's boundary."""
    codes, scales = state(levels, 2048)
    whole = expand(codes, scales, levels, 0)
    part = expand(codes[100:200], scales[:1], levels, 100)
    found, scale = quantize(part, levels)
    assert torch.equal(levels[found.long()] * scale[0], whole.values[100:200])


def test_mixed_blocks_are_quantised_as_bitsandbytes_does(levels: torch.Tensor) -> None:
    codes, scales = state(levels, 2048)
    moved = Dequantized(*(tensor[100:-156] for tensor in expand(codes, scales, levels, 0)))
    found, scale = quantize(moved, levels)
    expected, blocks = functional.quantize_blockwise(moved.values, code=levels, blocksize=BLOCK)
    torch.testing.assert_close(scale, blocks.absmax)
    values, theirs = (
        levels[numbers.long()] * sizes.repeat_interleave(BLOCK)[: numbers.numel()]
        for numbers, sizes in ((found, scale), (expected, blocks.absmax))
    )
    # Halfway between two levels either one is the nearest.
    assert ((values - moved.values).abs() <= (theirs - moved.values).abs() * (1 + 1e-5)).all()


def test_values_that_were_never_quantised_are(levels: torch.Tensor) -> None:
    codes, scales = state(levels, 600)
    values = expand(codes, scales, levels, 0).values
    found, scale = quantize(never_quantized(values), levels)
    assert torch.equal(scale, torch.stack([part.abs().max() for part in values.split(BLOCK)]))
    assert found.shape == values.shape


def test_padding_has_no_say_and_is_zero(levels: torch.Tensor) -> None:
    codes, scales = state(levels, 300)
    padding = Dequantized(
        torch.zeros(40), torch.zeros(40, dtype=torch.uint8), torch.full((40,), PADDING)
    )
    elements = joined([expand(codes, scales, levels, 0), padding])
    found, scale = quantize(elements, levels)
    assert torch.equal(found[:300], codes) and torch.equal(scale, scales)
    assert (levels[found[300:].long()].abs() == levels.abs().min()).all()
    # A block of nothing else: a partition that is longer than its parameters.
    found, scale = quantize(padding, levels)
    assert scale.tolist() == [0.0]
