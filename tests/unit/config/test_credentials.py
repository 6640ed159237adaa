"""A recipe or a ds_config that holds a credential is refused by its place, and its value is printed
nowhere.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from pretrain.config.load import load_recipe
from pretrain.core.credentials import redact, refuse_credentials
from pretrain.core.errors import ConfigError
from pretrain.core.shipped import recipe_names
from pretrain.engine.ds_config import read_ds_config

HEX = "0123456789abcdef0123456789abcdef01234567"


@pytest.mark.parametrize(
    "override,place,value",
    [
        ("trackers.api_key=abc", "trackers.api_key", "abc"),
        (f"trackers={{kinds: [wandb], project: {HEX}}}", "trackers.project", HEX),
        (
            "trackers={kinds: [comet], tags: [AbCdEfGh1234567890AbCdEfG]}",
            "trackers.tags.0",
            "AbCdEfGh",
        ),
        (
            "data.source={kind: text, input: ['https://me:pa55word@host/a.txt']}",
            "data.source.input.0",
            "pa55word",
        ),
        ("data.source={kind: datasets, dataset: a/b, token: x1}", "data.source.token", "x1"),
        (f"card.limits='use hf_{'a' * 34}'", "card.limits", "aaaa"),
    ],
)
def test_a_recipe_with_a_credential_is_refused_by_its_place_alone(
    override: str, place: str, value: str
) -> None:
    with pytest.raises(
        ConfigError, match=f"'{place}' looks like a credential.*environment"
    ) as refused:
        load_recipe("debug", [override])
    assert (
        value not in str(refused.value)
        and "\n" not in str(refused.value)
        and refused.value.exit_code == 2
    )


@pytest.mark.parametrize(
    "override",
    [
        (
            "trackers={kinds: [wandb, mlflow, comet], project: moe-pretraining-of-the-whole-group,"
            " tags: [first, 'lr=3e-4'], group: g, name: n}"
        ),
        f"data.source={{kind: datasets, dataset: a/b, revision: {HEX}}}",
        "data.path=data/sk-commoncrawl-2024-deduplicated",
        "card={license: apache-2.0, data_origin: {all: 'https://example.com/data, CC-BY-4.0'}}",
    ],
)
def test_names_addresses_and_revisions_are_no_credentials(override: str) -> None:
    load_recipe("debug", [override])


def test_every_shipped_recipe_is_free_of_them() -> None:
    for name in recipe_names():
        load_recipe(name)


def test_a_ds_config_with_comets_key_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "ds.json"

    def write(**comet: Any) -> str:
        path.write_text(json.dumps({"comet": {"enabled": True, **comet}}))
        return str(path)

    assert read_ds_config(write(project="p", workspace="w"))["comet"]["project"] == "p"
    with pytest.raises(
        ConfigError, match=r"'comet\.api_key' looks like a credential.*COMET_API_KEY"
    ):
        read_ds_config(write(api_key="k1"))


def test_texts_are_redacted_and_others_are_left() -> None:
    assert redact("--remote https://u:secret1@host --x") == "--remote https://[redacted]@host --x"
    assert (
        redact("sk-" + "a1" * 24)
        == redact("sk-proj-" + "a_-1" * 8)
        == redact("sk-ant-api03-" + "a-1" * 12)
        == "[redacted]"
    )
    assert (
        redact("/caches/hf_" + "a" * 34 + "/triton")
        == redact("/caches/eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxMjM0In0.c2lnbmF0dXJl/triton")
        == redact("/caches/AIza" + "a1-_B" * 7 + "/triton")
        == "/caches/[redacted]/triton"
    )
    assert redact(f"https://{HEX}@git.example.org/x") == "https://[redacted]@git.example.org/x"
    assert (
        redact("postgresql://u:p/w@h/db mlflow://h:5000/a@b")
        == "postgresql://[redacted]@h/db mlflow://h:5000/a@b"
    )
    assert (
        redact("https://a.example/c/f?sv=1&sig=SECRET%3D&se=2")
        == "https://a.example/c/f?sv=1&[redacted]&se=2"
    )
    assert (
        redact("https://b.example/k?X-Amz-Date=1&X-Amz-Signature=dead#end")
        == "https://b.example/k?X-Amz-Date=1&[redacted]#end"
    )
    for text in (
        "ssh://git@host/x",
        "http://host:8080/path",
        "https://a.example/?design=1&step=2",
        "runs/sk-fineweb2-annealing-v3",
    ):
        assert redact(text) == text
    assert (
        redact("--set data.path=data/my run_path=runs/a1")
        == "--set data.path=data/my run_path=runs/a1"
    )


def test_an_empty_value_is_none() -> None:
    refuse_credentials({"comet": {"api_key": "", "enabled": True}, "trackers": None}, "here")
