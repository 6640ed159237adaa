"""Models without values: shapes alone until each part is computed."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from pretrain.core.errors import ConfigError
from pretrain.model import init
from pretrain.model.decoder import DecoderLM
from pretrain.model.deferred import places_of, without_values
from pretrain.model.init import (
    Piece,
    initial_pieces,
    initialize,
    keep_initial_value,
    write_pieces,
)
from tests.support.tiny_model import KINDS, tiny_config, tiny_model

NARROW = "model.feed_forward={kind: gelu}"


@pytest.mark.parametrize("kind", KINDS)
def test_parameters_have_shapes_alone_and_buffers_are_real(kind: str) -> None:
    config = tiny_config(KINDS[kind], "model.tie_word_embeddings=true")
    with without_values():
        model = DecoderLM(config, ep_size=2, ep_rank=1)
    plain = DecoderLM(config, ep_size=2, ep_rank=1)
    wanted = dict(plain.named_parameters())
    for name, parameter in model.named_parameters():
        assert parameter.is_meta and parameter.shape == wanted.pop(name).shape
    assert not wanted
    assert model.head.weight is model.embedding.weight
    assert len(places_of(model)[id(model.head.weight)]) == 2
    assert all(
        torch.equal(mine, other)
        for mine, other in zip(model.buffers(), plain.buffers(), strict=True)
    )
    marks = {name: vars(parameter) for name, parameter in model.named_parameters()}
    assert marks == {name: vars(parameter) for name, parameter in plain.named_parameters()}


def test_afterwards_modules_have_values_again() -> None:
    with pytest.raises(ValueError, match="stopped"), without_values():
        raise ValueError("stopped")
    assert not nn.Linear(2, 2).weight.is_meta


@pytest.mark.parametrize("settings", [(KINDS["dropless"],), (KINDS["dropless"], NARROW)])
def test_a_range_of_a_parameter_is_that_of_the_whole(settings: tuple[str, ...]) -> None:
    with without_values():
        model = DecoderLM(tiny_config(*settings))
    whole = dict(tiny_model(*settings, seed=3).named_parameters())
    for name, parameter, pieces in initial_pieces(model, 3):
        size = parameter.numel()
        first, last = size // 3, size - size // 5
        found = torch.zeros(last - first)
        write_pieces(found, first, last, pieces)
        assert torch.equal(found, whole[name].detach().view(-1)[first:last]), name


def test_only_what_is_asked_for_is_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    with without_values():
        model = DecoderLM(tiny_config(KINDS["dropless"]))
    drawn: list[str] = []
    normal = init._normal
    monkeypatch.setattr(
        init, "_normal", lambda stream, *rest: (drawn.append(stream.name), normal(stream, *rest))[1]
    )
    every = {name: (parameter, pieces) for name, parameter, pieces in initial_pieces(model, 1)}
    assert not drawn
    parameter, pieces = next(found for name, found in every.items() if name.endswith("experts.w1"))
    half = parameter.numel() // 2
    # The second half of four experts, and one element of the second expert.
    write_pieces(torch.empty(half + 1), half - 1, 2 * half, pieces)
    assert [name.split(".")[-3] for name in drawn] == ["1", "2", "3"]


class Kept(nn.Module):
    def __init__(self, marked_before: bool) -> None:
        super().__init__()
        alpha = nn.Parameter(torch.full((2,), 0.5))
        self.alpha = keep_initial_value(alpha) if marked_before else alpha
        if not marked_before:
            keep_initial_value(self.alpha)


def test_a_kept_value_is_kept_if_it_is_marked_before_its_module_has_it() -> None:
    with without_values():
        model = DecoderLM(tiny_config())
        model.extra = Kept(marked_before=True)
    found = {name: pieces for name, _, pieces in initial_pieces(model, 1)}
    values = torch.empty(2)
    write_pieces(values, 0, 2, found["extra.alpha"])
    assert values.tolist() == [0.5, 0.5]
    with without_values():
        model.extra = Kept(marked_before=False)
    with pytest.raises(ConfigError, match="the value of 'extra.alpha' is lost"):
        list(initial_pieces(model, 1))


def test_a_model_that_is_filled_in_place_keeps_them_too() -> None:
    model = DecoderLM(tiny_config())
    model.extra = Kept(marked_before=False)
    initialize(model, 1)
    assert model.extra.alpha.tolist() == [0.5, 0.5]


def test_pieces_outside_of_the_range_are_not_computed() -> None:
    def refuse(start: int, stop: int) -> torch.Tensor:
        raise AssertionError((start, stop))

    values = torch.zeros(4)
    pieces = [Piece(0, 10, refuse), Piece(10, 20, lambda *place: torch.arange(*place).float())]
    write_pieces(values, 12, 16, pieces)
    assert values.tolist() == [2.0, 3.0, 4.0, 5.0]
