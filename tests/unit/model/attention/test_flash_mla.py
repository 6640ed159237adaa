"""The dispatch to FlashMLA, with a module in the package's place that computes its definition.

No GPU takes part: what is tested is which calls are made, in which layout, and what else decides.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from types import ModuleType

import pytest
import torch

from pretrain.config.load import load_recipe
from pretrain.core.accelerators import accelerator
from pretrain.core.errors import ConfigError
from pretrain.model.attention.kernels import base
from pretrain.model.attention.kernels.base import AttentionKernel, attention_kernel
from pretrain.model.attention.kernels.config import FlashMLA
from pretrain.model.attention.kernels.sdpa import sdpa_attention
from pretrain.model.attention.mask import AttentionMask
from pretrain.model.attention.scores import Scores
from pretrain.run.estimate import Hardware
from tests.support.tiny_model import random_tensor, random_tokens, tiny_model

B, N, KEY, VALUE, PAGE = 2, 4, 576, 512, 64
LATENTS = (
    "model.attention={kind: mla, num_attention_heads: 2, kv_lora_rank: 512, qk_rope_head_dim: 64,"
    " qk_nope_head_dim: 16, v_head_dim: 16, kernel: KERNEL}"
)
MODULE = "pretrain.model.attention.kernels.flash_mla"


class Fake:
    """The package: asserts what FlashMLA demands of its arguments, and counts its calls."""

    def __init__(self) -> None:
        self.calls = 0
        self.schedules = 0
        self.storages: set[int] = set()

    def get_mla_metadata(
        self, lengths_B: torch.Tensor, heads_per_key_head: int, key_heads: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        assert lengths_B.dtype == torch.int32 and key_heads == 1
        self.schedules += 1
        return torch.tensor([heads_per_key_head]), torch.tensor([0])

    def flash_mla_with_kvcache(
        self,
        q_BSNH: torch.Tensor,
        pages: torch.Tensor,
        table_Bp: torch.Tensor,
        lengths_B: torch.Tensor,
        value_size: int,
        metadata: torch.Tensor,
        splits: torch.Tensor,
        softmax_scale: float | None = None,
        causal: bool = False,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        batch_size, num_queries, num_heads, size = q_BSNH.shape
        assert q_BSNH.is_contiguous() and q_BSNH.dtype in (torch.bfloat16, torch.float16)
        assert (size, value_size) == (KEY, VALUE) and pages.shape[1:] == (PAGE, 1, KEY)
        assert table_Bp.dtype == lengths_B.dtype == torch.int32 and causal
        assert int(metadata) == num_queries * num_heads
        self.calls += 1
        self.storages.add(pages.untyped_storage().data_ptr())
        outputs = []
        for index in range(batch_size):
            length = int(lengths_B[index])
            keys_UH = pages[table_Bp[index].long()].flatten(0, 2)[:length].float()
            logits_SNU = q_BSNH[index].float() @ keys_UH.T * softmax_scale
            later = torch.arange(length) > torch.arange(length - num_queries, length)[:, None]
            weights = logits_SNU.masked_fill(later[:, None], float("-inf")).softmax(dim=-1)
            outputs.append(weights @ keys_UH[:, :value_size])
        return torch.stack(outputs).to(q_BSNH.dtype), torch.empty(0)


@pytest.fixture
def package(monkeypatch: pytest.MonkeyPatch) -> Iterator[Fake]:
    """The package is installed, and the GPU is a Hopper."""
    fake = Fake()
    module = ModuleType("flash_mla")
    module.__spec__ = importlib.machinery.ModuleSpec("flash_mla", None)
    module.get_mla_metadata = fake.get_mla_metadata  # type: ignore[attr-defined]
    module.flash_mla_with_kvcache = fake.flash_mla_with_kvcache  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "flash_mla", module)
    monkeypatch.setattr(base, "gpu_capability", lambda: (9, 0))
    monkeypatch.delitem(sys.modules, MODULE, raising=False)
    yield fake
    sys.modules.pop(MODULE, None)


def kernel() -> AttentionKernel:
    return attention_kernel("flash_mla", torch.device("cpu"))


def both(
    one: AttentionKernel, room: int, num_keys: int, num_queries: int, **terms: object
) -> tuple[torch.Tensor, torch.Tensor]:
    """What a kernel and sdpa make of a cache with room for ``room`` tokens."""
    cache = random_tensor(B, 1, room, KEY, seed=1, dtype=torch.bfloat16).detach()
    # What is beyond the last token must not count.
    cache[:, :, num_keys:] = float("nan")
    latents = cache[:, :, :num_keys]
    q = random_tensor(B, N, num_queries, KEY, seed=2, dtype=torch.bfloat16).detach()
    results = []
    for each in (one, sdpa_attention):
        mask = AttentionMask(offset=num_keys - num_queries)
        scores = Scores(mask, 0.05, **terms)  # type: ignore[arg-type]
        results.append(each(q, latents, latents, scores)[..., :VALUE].float())
    return results[0], results[1]


@pytest.mark.parametrize("num_keys,num_queries", [(1, 1), (64, 1), (65, 1), (100, 3), (128, 2)])
@pytest.mark.parametrize("room", [128, 130])
def test_steps_over_a_paged_cache_equal_sdpa(
    package: Fake, room: int, num_keys: int, num_queries: int
) -> None:
    found, expected = both(kernel(), room, num_keys, num_queries)
    torch.testing.assert_close(found, expected, atol=2e-2, rtol=2e-2)
    assert package.calls == 1


def test_another_scale_is_seen(package: Fake) -> None:
    found, _ = both(lambda q, k, v, s: kernel()(q, k, v, Scores(s.mask, 0.5)), 128, 100, 1)
    _, expected = both(sdpa_attention, 128, 100, 1)
    assert (found - expected).abs().max() > 0.1


def test_what_flash_mla_does_not_know_is_computed_by_sdpa(package: Fake) -> None:
    flash_mla = kernel()
    for terms in ({"window": 5}, {"sinks_N": torch.ones(N, dtype=torch.bfloat16)}):
        found, expected = both(flash_mla, 128, 100, 1, **terms)
        assert torch.equal(found, expected)
    # Training: full heads, with gradients, in any dtype.
    q, k = (random_tensor(B, N, 7, 16, seed=seed) for seed in (1, 2))
    scores = Scores(AttentionMask(), 0.25)
    assert torch.equal(flash_mla(q, k, k, scores), sdpa_attention(q, k, k, scores))
    latents = random_tensor(B, 1, 7, KEY, seed=3, dtype=torch.float32)
    wide = random_tensor(B, N, 1, KEY, seed=4, dtype=torch.float32)
    scores = Scores(AttentionMask(offset=6), 0.25)
    expected = sdpa_attention(wide, latents, latents, scores)
    assert torch.equal(flash_mla(wide, latents, latents, scores), expected)
    assert package.calls == 0


@torch.no_grad()
def test_a_model_decodes_through_it_without_a_copy_of_its_cache(package: Fake) -> None:
    dense = ("model.moe=null", "model.layer_pattern.kind=all_dense", "model.intermediate_size=24")
    models = {
        name: tiny_model(*dense, LATENTS.replace("KERNEL", name), "train.precision=bf16").eval()
        for name in ("flash_mla", "sdpa")
    }
    models["flash_mla"].load_state_dict(models["sdpa"].state_dict())
    ids_BS = random_tokens(2, 12)
    logits = {}
    for name, model in models.items():
        model = model.to(torch.bfloat16)
        cache = model.new_cache(2, 12, "cpu", torch.bfloat16)
        parts = ids_BS.split([6, 1, 1, 2, 2], dim=1)
        logits[name] = torch.cat([model.logits(part, cache=cache) for part in parts], dim=1)
        if name == "flash_mla":
            layers = len(model.layers)
            assert package.calls >= 2 * layers and package.calls % layers == 0
            # One schedule a step, shared by the layers, and the pages of the caches themselves.
            assert package.schedules == package.calls // layers
            assert len(package.storages) == layers
    torch.testing.assert_close(logits["flash_mla"], logits["sdpa"], atol=5e-2, rtol=5e-2)


def test_without_package_or_hopper_it_is_refused_in_a_sentence(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for capability, told in (
        (None, r"needs a GPU of compute capability 9\.0, but there is no GPU: use --set"),
        ((8, 0), r"needs a GPU of compute capability 9\.0, but this one has 8\.0: use --set"),
        ((9, 0), r"needs the package flash_mla, which is not installed: use --set"),
    ):
        monkeypatch.setattr(base, "gpu_capability", lambda found=capability: found)
        with pytest.raises(ConfigError, match=told):
            attention_kernel("flash_mla", torch.device("cpu"))
    # A plan for another machine asks its GPU alone.
    Hardware(accelerator("H200")).check_kernel("flash_mla")
    Hardware(accelerator("A100")).check_kernel("sdpa")
    for name in ("A100", "B200", "MI300X"):
        with pytest.raises(ConfigError, match=f"capability 9.0, and {name} has another"):
            Hardware(accelerator(name)).check_kernel("flash_mla")


@pytest.mark.parametrize(
    "overrides,told",
    [
        ((), "anything_but_latents_of_512"),
        ((LATENTS.replace("KERNEL", "flash_mla").replace("512", "256"),), "anything_but_latents"),
        ((LATENTS.replace("KERNEL", "flash_mla, decode: plain"),), "anything_but_latents"),
        ((LATENTS.replace("KERNEL", "flash_mla, sliding_window: 8"),), "sliding_window"),
        ((LATENTS.replace("KERNEL", "flash_mla, sinks: true"),), "sinks"),
    ],
)
def test_a_recipe_that_it_cannot_decode_is_refused(overrides: tuple[str, ...], told: str) -> None:
    kernel = () if overrides else ("model.attention.kernel=flash_mla",)
    with pytest.raises(ConfigError, match=rf"kernel=flash_mla cannot compute .*{told}"):
        load_recipe("debug", ["train.precision=bf16", *overrides, *kernel])


def test_the_published_recipe_is_one_that_it_decodes() -> None:
    recipe = load_recipe("peer_mla_16b", ["model.attention.kernel=flash_mla"])
    assert recipe.model.attention.attended_latents == FlashMLA.latents
    assert FlashMLA.capability == (9, 0)
