"""tools/trace_routing.py on real checkpoints and exports: what it records is computed by hand."""

from __future__ import annotations

import json
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch
from deepspeed.moe.sharded_moe import TopKGate
from torch.nn import functional

from data_pipeline.shards.token_stream import open_split
from pretrain.core.errors import BAD_DATA, DONE, USAGE, run_command
from pretrain.export.convert import export_hf
from pretrain.model.block import Block
from pretrain.model.moe.product_keys import ProductKeys
from pretrain.model.moe.router import TopKRouter
from tests.support.model_kinds import PEER
from tests.support.paths import TOOLS
from tests.support.tiny_checkpoint import Trained, make_trained
from tools.trace_routing import main

TEXT = "3 + 4 = 7\n12 + 30 = 42\n"
KINDS = {
    "router": ("model.moe.kind=deepspeed", "model.moe.gate=router", "model.moe.drop_tokens=true",
               "model.moe.eval_capacity_factor=0.5", "model.moe.min_capacity=1"),
    "own_gate": ("model.moe.kind=deepspeed", "model.moe.drop_tokens=false"),
    "peer": (f"model.moe={{kind: peer, {PEER}}}",),
}  # fmt: skip


@pytest.fixture(scope="module")
def models(trained: Trained, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Trained]:
    """The debug recipe's model, and those of other kinds of layers."""
    others = {name: make_trained(tmp_path_factory.mktemp(name), KINDS[name]) for name in KINDS}
    return {"dropless": trained, **others}


def call(monkeypatch: pytest.MonkeyPatch, *arguments: str | Path) -> int:
    monkeypatch.setenv("COLUMNS", "160")
    monkeypatch.setattr(sys, "argv", [str(TOOLS / "trace_routing.py"), *map(str, arguments)])
    with pytest.raises(SystemExit) as ended:
        run_command(main)
    return int(ended.value.code or 0)


def traced(monkeypatch: pytest.MonkeyPatch, model: Path, out: Path) -> dict[str, Any]:
    assert call(monkeypatch, "--model", model, "--text", TEXT, "--out", out) == DONE
    trace: dict[str, Any] = json.loads(out.read_text())
    return trace


def by_hand(
    trained: Trained, token_ids: list[int]
) -> tuple[dict[int, list[list[tuple[int, float]]]], float]:
    """Each layer's choices with weights, from the inputs of its router, and the loss."""
    inputs: dict[int, torch.Tensor] = {}
    routers: dict[int, Any] = {}
    handles = []
    for number, block in enumerate(trained.model.layers):
        assert isinstance(block, Block)
        for module in block.modules():
            if isinstance(module, TopKRouter | ProductKeys | TopKGate):
                routers[number] = module
                handles.append(
                    module.register_forward_pre_hook(
                        lambda _, given, number=number: inputs.update({number: given[0]})
                    )
                )
    ids = torch.tensor([token_ids])
    with torch.no_grad():
        logits = trained.model.logits(ids)
    for handle in handles:
        handle.remove()
    loss = functional.cross_entropy(logits[0, :-1], ids[0, 1:]).item()
    chosen = {}
    for number, router in routers.items():
        with torch.no_grad():
            rows = inputs[number]
            if isinstance(router, ProductKeys):
                chosen[number] = [product_choice(router, row) for row in rows]
            else:
                chosen[number] = [top_choice(router, row) for row in rows]
    return chosen, loss


def top_choice(router: TopKRouter | TopKGate, x: torch.Tensor) -> list[tuple[int, float]]:
    matrix: Any = router.gate if isinstance(router, TopKRouter) else router.wg
    top_k = int(router.top_k if isinstance(router, TopKRouter) else router.k)
    probs = (matrix.weight @ x).softmax(dim=0).tolist()
    best = sorted(range(len(probs)), key=lambda expert: -probs[expert])[:top_k]
    # Both renormalise the weights of two experts.
    total = sum(probs[expert] for expert in best)
    return [(expert, probs[expert] / total) for expert in best]


def product_choice(keys: ProductKeys, x: torch.Tensor) -> list[tuple[int, float]]:
    """Every product of sub-keys is scored, which the layer itself never does."""
    found = []
    for parts in zip(*(scores[0] for scores in keys.scores(x[None])), strict=True):
        sums = torch.zeros(1)
        for part in parts:
            sums = (sums[:, None] + part[None, :]).flatten()
        best = sorted(range(len(sums)), key=lambda expert: -sums[expert].item())[: keys.top_k]
        found += list(zip(best, sums[best].softmax(dim=0).tolist(), strict=True))
    return found


@pytest.mark.parametrize("kind", ["dropless", "peer", "router", "own_gate"])
def test_choices_weights_and_loss_are_those_that_are_computed_by_hand(
    kind: str,
    models: dict[str, Trained],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    trained = models[kind]
    trace = traced(monkeypatch, trained.latest, tmp_path / "trace.json")
    chosen, loss = by_hand(trained, trace["token_ids"])
    assert [layer["layer"] for layer in trace["layers"]] == list(chosen) != []
    assert trace["loss"] == pytest.approx(loss, rel=1e-6)
    assert trace["tokens"] == [trained_token(trained, one) for one in trace["token_ids"]]
    assert "".join(trace["tokens"][1:]) == TEXT and trace["step"] == 100
    dropped = 0
    for layer in trace["layers"]:
        expected = chosen[layer["layer"]]
        assert layer["experts"] == [[expert for expert, _ in token] for token in expected]
        for token, weights in zip(expected, layer["weights"], strict=True):
            for (_, right), weight in zip(token, weights, strict=True):
                assert weight == pytest.approx(right, abs=1e-6) or (kind == "router" and not weight)
                dropped += weight == 0
    assert (dropped > 0) == (kind == "router")


def trained_token(trained: Trained, token: int) -> str:
    from data_pipeline.tokenizer.tokenizer import load_tokenizer

    path = trained.checkpoint / "tokenizer.json"
    return load_tokenizer(path, trained.recipe.data.tokenizer).decode([token])


@pytest.mark.parametrize("kind", ["dropless", "peer", "router"])
def test_a_replay_of_ones_own_routing_changes_nothing_and_of_another_s_does(
    kind: str,
    models: dict[str, Trained],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out, other = tmp_path / "trace.json", tmp_path / "other.json"
    trace = traced(monkeypatch, models[kind].latest, out)
    capsys.readouterr()
    replay = ("--model", models[kind].latest, "--json", "-", "--replay")
    assert call(monkeypatch, *replay, out) == DONE
    same = json.loads(capsys.readouterr().out)
    assert same["own_loss"] == same["replayed_loss"] == same["recorded_loss"] == trace["loss"]
    assert all(layer["tokens"] == layer["choices"] == 0 for layer in same["layers"])

    # Every expert is exchanged for the one with the mirrored number.
    for layer in trace["layers"]:
        layer["experts"] = [
            [trace["num_experts"] - 1 - one for one in token] for token in layer["experts"]
        ]
    other.write_text(json.dumps(trace))
    assert call(monkeypatch, *replay, other) == DONE
    mirrored = json.loads(capsys.readouterr().out)
    assert mirrored["own_loss"] == trace["loss"]
    assert abs(mirrored["replayed_loss"] - trace["loss"]) > 1e-4
    assert all(layer["choices"] > 0.1 for layer in mirrored["layers"])

    assert call(monkeypatch, *replay[:2], "--replay", other, "--dtype", "bf16") == DONE
    assert "this model, the recorded routing: " in capsys.readouterr().out


def test_forced_choices_are_what_the_layers_compute_with(
    models: dict[str, Trained], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The loss of a replay is that of a router which can choose nothing else."""
    out = tmp_path / "trace.json"
    trace = traced(monkeypatch, models["dropless"].latest, out)
    for layer in trace["layers"]:
        layer["experts"] = [[2, 0] for _ in layer["experts"]]
    out.write_text(json.dumps(trace))
    result = tmp_path / "replay.json"
    assert (
        call(monkeypatch, "--model", models["dropless"].latest, "--replay", out, "--json", result)
        == DONE
    )
    model = models["dropless"].model
    ids = torch.tensor([trace["token_ids"]])
    with monkeypatch.context() as patched, torch.no_grad():
        patched.setattr(
            TopKRouter, "_choose", lambda self, scores: torch.tensor([[2, 0]] * len(scores))
        )
        logits = model.logits(ids)
    expected = functional.cross_entropy(logits[0, :-1], ids[0, 1:]).item()
    assert json.loads(result.read_text())["replayed_loss"] == pytest.approx(expected, rel=1e-6)


def test_an_export_is_traced_as_its_checkpoint_and_replays_nothing(
    models: dict[str, Trained],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for kind in ("dropless", "peer"):
        folder = tmp_path / kind
        texts = open_split(models[kind].manifest, "validation")
        export_hf(models[kind].checkpoint, folder, texts, torch.float32, overwrite=False)
        theirs = traced(monkeypatch, folder, tmp_path / "export.json")
        ours = traced(monkeypatch, models[kind].latest, tmp_path / "ours.json")
        assert theirs["token_ids"] == ours["token_ids"]
        assert theirs["loss"] == pytest.approx(ours["loss"], rel=1e-4)
        assert len(theirs["layers"]) == len(ours["layers"])
        assert (theirs["num_experts"], theirs["heads"]) == (ours["num_experts"], ours["heads"])
        for one, other in zip(theirs["layers"], ours["layers"], strict=True):
            assert one["layer"] == other["layer"] and one["experts"] == other["experts"]
            torch.testing.assert_close(
                torch.tensor(one["weights"]), torch.tensor(other["weights"]), atol=1e-4, rtol=1e-3
            )
    capsys.readouterr()
    assert call(monkeypatch, "--model", folder, "--replay", tmp_path / "ours.json") == USAGE
    assert "cannot repeat recorded choices: give --replay" in capsys.readouterr().err


class Page(HTMLParser):
    """What a page holds: its text, and every tag."""

    def __init__(self, content: str) -> None:
        super().__init__()
        self.words: list[str] = []
        self.tags: list[str] = []
        self.feed(content)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        assert not any(name.startswith("on") or name in ("src", "href") for name, _ in attrs)

    def handle_data(self, data: str) -> None:
        self.words.append(data)


def test_the_page_and_the_table_show_hostile_text_as_text(
    models: dict[str, Trained],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    source, page = tmp_path / "text.txt", tmp_path / "routing.html"
    hostile = "<script>alert(1)</script> [bold]\x1b[31m\" onload='x' &amp; 3 + 4\n"
    source.write_text(hostile)
    lines = tmp_path / "expert_routing.txt"
    options: list[str | Path] = ["--text-file", source, "--html", page, "--layer", "1"]
    options += ["--rows", "99", "--lines", lines]
    assert call(monkeypatch, "--model", models["dropless"].latest, *options) == DONE
    printed = capsys.readouterr().out
    assert "\x1b[31m" not in printed and "\\x1b" in printed and "layer 1" in printed
    assert "layer 0" not in printed
    found = Page(page.read_text(encoding="utf-8"))
    assert "script" not in found.tags and {"svg", "rect", "pre"} <= set(found.tags)
    assert "alert" in "".join(found.words) and "\x1b" not in page.read_text()
    rows = [line.split("\t") for line in lines.read_text().splitlines()]
    assert [int(row[0]) for row in rows] == list(range(len(rows))) and "\x1b" not in str(rows)
    assert {row[2] for row in rows} == {"layer 1"}
    for row in rows:
        weights = [float(choice.split(":")[1]) for choice in row[3].split()]
        assert len(weights) == 2 and sum(weights) == pytest.approx(1.0, abs=2e-4)
    # One field for each token and choice.
    tokens = found.tags.count("span")
    assert tokens > 20 and found.tags.count("rect") == 2 * tokens


def test_what_cannot_be_done_is_said_in_a_sentence(
    models: dict[str, Trained],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    latest, out = models["dropless"].latest, tmp_path / "trace.json"
    trace = traced(monkeypatch, latest, out)

    def refused(code: int, sentence: str, *arguments: str | Path) -> None:
        capsys.readouterr()
        assert call(monkeypatch, *arguments) == code
        assert sentence in capsys.readouterr().err

    def damaged(sentence: str, **changes: object) -> None:
        bad = tmp_path / "bad.json"
        bad.write_text(json.dumps(trace | changes))
        refused(BAD_DATA, sentence, "--model", latest, "--replay", bad)

    layer = trace["layers"][0]
    damaged("a wrong 'version'", version=2)
    damaged("a wrong 'token_ids.0'", token_ids=["1"])
    damaged("texts of another number of tokens", tokens=trace["tokens"][1:])
    damaged("other numbers of choices than tokens", layers=[layer | {"experts": [[0, 1]]}])
    damaged("experts in layer 0 that do not exist", num_experts=1)
    cut = tmp_path / "cut.json"
    cut.write_text(out.read_text()[:99])
    refused(BAD_DATA, "record it again with --out", "--model", latest, "--replay", cut)
    out_of_form = tmp_path / "form.json"
    out_of_form.write_text(json.dumps(trace | {"layers": trace["layers"][:1]}))
    refused(USAGE, "a model of the same form", "--model", latest, "--replay", out_of_form)
    other_tokens = tmp_path / "tokens.json"
    other_tokens.write_text(json.dumps(trace | {"tokens": ["?"] * len(trace["tokens"])}))
    refused(USAGE, "a model of the same tokenizer", "--model", latest, "--replay", other_tokens)
    gate = models["own_gate"].latest
    assert call(monkeypatch, "--model", gate, "--text", TEXT, "--out", cut) == DONE
    refused(
        USAGE, "DeepSpeed's own gate takes no recorded choice", "--model", gate, "--replay", cut
    )
    long = ("--model", latest, "--text", "1 + 2 = 3\n" * 200)
    refused(USAGE, "give --max-tokens 256", *long)
    assert call(monkeypatch, *long, "--max-tokens", "256") == DONE
    refused(
        USAGE, "layer 7 has no routed experts", "--model", latest, "--text", "1", "--layer", "7"
    )
    refused(USAGE, "--html is for a text", "--model", latest, "--replay", out, "--html", "x")
    refused(BAD_DATA, "the text is empty", "--model", latest, "--text", "")
