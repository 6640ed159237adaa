"""Greedy text of the quickstart's model in fp32: 64 tokens after prompts of 64."""

from __future__ import annotations

from collections.abc import Callable

import torch

from peers.measure import Measured, timed
from peers.models import VOCABULARY, recipe_of, transformers_model

PROMPT, NEW = 64, 64


def _prompts(batch: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(3)
    return torch.randint(VOCABULARY, (batch, PROMPT), generator=generator).tolist()


def our_side(batch: int) -> Callable[[], Measured]:
    """A side that generates with this project's model."""

    def side() -> Measured:
        from pretrain.evaluation.generation.generate import continue_prompts, native_next_logits
        from pretrain.evaluation.generation.sampling import Sampling
        from pretrain.model.decoder import DecoderLM
        from pretrain.model.init import initialize

        model = DecoderLM(recipe_of("train.precision=fp32").model)
        initialize(model, 0)
        model.eval()
        prompts = _prompts(batch)

        def call() -> None:
            next_logits = native_next_logits(
                model, PROMPT + NEW, torch.device("cpu"), padding=[0] * batch
            )
            tokens = continue_prompts(next_logits, prompts, Sampling(greedy=True))
            for _ in range(NEW):
                next(tokens)

        return timed(call, warm_up=1, repeats=3)

    return side


def transformers_side(batch: int) -> Callable[[], Measured]:
    """A side that generates with transformers."""

    def side() -> Measured:
        model = transformers_model(recipe_of("train.precision=fp32"), torch.float32).eval()
        model.generation_config.eos_token_id = None
        model.generation_config.pad_token_id = 0
        ids_BS = torch.tensor(_prompts(batch))
        attention = torch.ones_like(ids_BS)

        def call() -> None:
            out = model.generate(
                ids_BS, attention_mask=attention, do_sample=False, max_new_tokens=NEW
            )
            assert out.shape[1] == PROMPT + NEW

        return timed(call, warm_up=1, repeats=3)

    return side
