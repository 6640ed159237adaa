"""A chat model made with transformers comes in, trains and goes out: its tokens, templates and
sampling defaults are what they were.
"""

from __future__ import annotations

import json
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import AddedToken
from tokenizers.processors import TemplateProcessing
from transformers import (
    AutoConfig,
    AutoTokenizer,
    GenerationConfig,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedTokenizerFast,
)

from data_pipeline.preprocess.coordinator import build
from data_pipeline.preprocess.workspace import Output
from data_pipeline.shards.datasets import load_datasets
from data_pipeline.tokenizer.tokenizer import load_tokenizer
from pretrain.checkpoint.layout import MANIFEST, TOKENIZER
from pretrain.checkpoint.tokenizer_files import (
    LARGEST_BYTES,
    TOKEN_IDS,
    end_ids,
    origin_of,
    read_side_files,
)
from pretrain.config.load import load_recipe
from pretrain.core.errors import CheckpointError
from pretrain.evaluation.generation.generators import document_end, open_generator
from pretrain.evaluation.heldout.heldout import score_checkpoint, score_transformers
from pretrain.export.convert import export_hf, export_safetensors
from pretrain.export.hf_open import open_tokenizer
from pretrain.export.hf_recipe import recipe_of
from pretrain.export.import_hf import architecture_of, import_hf
from pretrain.merging.commands import blend
from pretrain.train import main
from tests.support.hf_folders import edit_json
from tests.support.random_checkpoint import small_tokenizer
from tests.support.tiny_run import own_process
from tools.generate import main as generate

ENDS = ("<|endoftext|>", "<|im_end|>", "<|eot|>")
CHAT = (
    "{{ bos_token }}{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}<|im_end|>{%"
    " endfor %}"
)
TOOLS = "{% for m in messages %}[{{ m['content'] }}]{% endfor %}{{ eos_token }}"
SAMPLING = {
    "do_sample": True,
    "temperature": 0.6,
    "top_p": 0.9,
    "top_k": 17,
    "repetition_penalty": 1.05,
}
MESSAGES = [{"role": "user", "content": "def f(x):"}, {"role": "assistant", "content": "return x"}]
# The letter after which the model says each end.
LETTERS = ("q", "w", "z")


@dataclass(frozen=True)
class Chat:
    """Folders of one model: as transformers wrote it, imported, a checkpoint of its training, and
    exported again.
    """

    source: Path
    ours: Path
    trained: Path
    back: Path
    data: Path


def chat_tokenizer() -> PreTrainedTokenizerFast:
    library = small_tokenizer().reference.backend
    library.encode_special_tokens = False
    names = ("<s>", "<pad>", "<unk>", *ENDS[1:])
    library.add_special_tokens([AddedToken(name, special=True) for name in names])
    library.add_tokens(
        [AddedToken("<|user|>", normalized=False), AddedToken("<|assistant|>", normalized=False)]
    )
    begin = library.token_to_id("<s>")
    library.post_processor = TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", begin)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=library,
        bos_token="<s>",
        eos_token="<|im_end|>",
        pad_token="<pad>",
        unk_token="<unk>",
        model_max_length=12345,
        padding_side="left",
        additional_special_tokens=["<|eot|>"],
        chat_template={"default": CHAT, "tool_use": TOOLS},
    )


def write_source(folder: Path) -> None:
    tokenizer = chat_tokenizer()
    ends = tokenizer.convert_tokens_to_ids(list(ENDS))
    sizes: dict[str, Any] = {
        "hidden_size": 32,
        "intermediate_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
    }
    sizes |= {
        "num_key_value_heads": 2,
        "num_local_experts": 4,
        "max_position_embeddings": 64,
        "vocab_size": len(tokenizer),
    }
    ids = {
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": ends,
        "pad_token_id": tokenizer.pad_token_id,
    }
    torch.manual_seed(0)
    model = MixtralForCausalLM(MixtralConfig(**sizes, **ids))
    letters = tokenizer(list(LETTERS), add_special_tokens=False)["input_ids"]
    with torch.no_grad():
        model.model.embed_tokens.weight.normal_(0.0, 1.0)
        for end, (letter,) in zip(ends, letters, strict=True):
            model.lm_head.weight[end] = 2 * model.model.embed_tokens.weight[letter]
    model.generation_config = GenerationConfig(**SAMPLING, **ids)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


@pytest.fixture(scope="module")
def chat(tmp_path_factory: pytest.TempPathFactory) -> Chat:
    folder = tmp_path_factory.mktemp("chat")
    made = Chat(*(folder / name for name in ("source", "ours", "run", "back", "data")))
    write_source(made.source)
    import_hf(made.source, made.ours, overwrite=False)
    (folder / "texts").mkdir()
    for number in range(20):
        (folder / "texts" / f"{number}.txt").write_text(
            f"def f{number}(x):\n    return x + {number}\n" * 20
        )
    settings = [
        f"data.path={made.data}",
        "data.source.kind=text",
        f"data.source.input=['{folder}/texts/*.txt']",
    ]
    settings += [
        "data.validation_share=0.3",
        f"initial_weights={made.ours}",
        f"run_path={made.trained}",
    ]
    settings += [
        "train.sequence_length=32",
        "train.global_batch_size=2",
        "train.train_tokens=192",
        "train.precision=fp32",
    ]
    recipe = str(made.ours / "recipe.yaml")
    build(load_recipe(recipe, settings).data, Output(made.data))
    with own_process():
        for tokens in (
            128,
            192,
        ):  # the second start resumes, when the files are those of the run's own checkpoint
            arguments = [*settings, f"train.train_tokens={tokens}"]
            assert (
                main(
                    ["--recipe", recipe, *(part for each in arguments for part in ("--set", each))]
                )
                == 0
            )
    checkpoint = made.trained / "checkpoints" / "step_3"
    assert checkpoint.is_dir()
    export_hf(
        checkpoint,
        made.back,
        load_datasets({"": str(made.data)}).stream("train"),
        torch.float32,
        overwrite=False,
    )
    return Chat(made.source, made.ours, checkpoint, made.back, made.data)


def test_templates_and_special_tokens_are_those_of_the_source(chat: Chat) -> None:
    first, again = (AutoTokenizer.from_pretrained(folder) for folder in (chat.source, chat.back))
    assert type(first) is type(again)
    for name in ("default", "tool_use"):
        text = again.apply_chat_template(MESSAGES, chat_template=name, tokenize=False)
        assert text == first.apply_chat_template(MESSAGES, chat_template=name, tokenize=False)
    assert "<|assistant|>return x<|im_end|>" in again.apply_chat_template(MESSAGES, tokenize=False)
    assert (
        again("def f(x):<|eot|> <|user|>")["input_ids"]
        == first("def f(x):<|eot|> <|user|>")["input_ids"]
    )
    assert again("a")["input_ids"][0] == first.bos_token_id
    assert (
        again.special_tokens_map == first.special_tokens_map
        and again.get_added_vocab() == first.get_added_vocab()
    )
    for name in (
        "bos_token_id",
        "eos_token_id",
        "pad_token_id",
        "unk_token_id",
        "model_max_length",
        "padding_side",
    ):
        assert getattr(again, name) == getattr(first, name)


def test_ids_and_sampling_defaults_are_those_of_the_source(chat: Chat) -> None:
    first, again = (
        GenerationConfig.from_pretrained(folder).to_dict() for folder in (chat.source, chat.back)
    )
    assert first == again and SAMPLING.items() <= again.items() and len(again["eos_token_id"]) == 3
    configs = [AutoConfig.from_pretrained(folder) for folder in (chat.source, chat.back)]
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        assert getattr(configs[0], name) == getattr(configs[1], name) is not None


def test_the_tools_open_the_templates_and_the_tokens_of_the_source(chat: Chat) -> None:
    for folder in (chat.source, chat.back):
        opened, first = open_tokenizer(folder), AutoTokenizer.from_pretrained(chat.source)
        assert opened.chat_template == first.chat_template == {"default": CHAT, "tool_use": TOOLS}
        assert opened.special_tokens_map == first.special_tokens_map


def test_a_folder_and_the_checkpoint_it_is_of_have_one_heldout_loss(chat: Chat) -> None:
    """Documents begin and end with the tokens of training, which are not those that end a turn."""
    device = torch.device("cpu")
    ours = score_checkpoint(chat.trained, chat.data, "validation", device, baselines=(), window=32)
    theirs = score_transformers(chat.back, chat.data, "validation", device, window=32)
    assert theirs.targets == ours.targets and theirs.loss == pytest.approx(ours.loss, rel=1e-5)


@pytest.mark.parametrize(
    ("eos", "end"),
    [([0, 295], ENDS[0]), (296, ENDS[2]), (5, ENDS[1]), (None, ENDS[1]), ([], ENDS[1])],
)
def test_a_document_ends_with_a_token_that_is_no_word(
    eos: Any, end: str, chat: Chat, tmp_path: Path
) -> None:
    """Ids of config.json may be the class's defaults: then the tokenizer's end is taken, in imports
    and by tools alike.
    """
    shutil.copytree(chat.source, tmp_path / "source")
    edit_json(tmp_path / "source", eos_token_id=eos)
    target, config = architecture_of(tmp_path / "source")
    policy = recipe_of(tmp_path / "source", chat.source, target, config).data.tokenizer
    tokenizer = open_tokenizer(tmp_path / "source")
    assert (
        policy.eod_token == end == tokenizer.convert_ids_to_tokens(document_end(config, tokenizer))
    )


def test_every_file_that_travels_is_hashed(chat: Chat) -> None:
    for folder in (chat.ours, chat.trained):
        listed = json.loads((folder / MANIFEST).read_text())["files"]
        assert read_side_files(folder).keys() <= listed.keys() and TOKEN_IDS in listed
        assert "additional_chat_templates/tool_use.jinja" in listed
        assert read_side_files(folder) == read_side_files(chat.ours)


@pytest.mark.parametrize("number", range(3))
def test_generation_ends_at_each_of_the_ends(
    number: int, chat: Chat, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for folder in (chat.trained, chat.back, chat.ours):
        options = [
            "--prompt",
            LETTERS[number],
            "--greedy",
            "--max-new-tokens",
            "8",
            "--json",
            str(tmp_path / "texts.json"),
        ]
        monkeypatch.setattr(sys, "argv", ["generate.py", "--model", str(folder), *options])
        generate()
        (sample,) = json.loads((tmp_path / "texts.json").read_text())["samples"]
        assert sample["ended"] == "end of document" and sample["new_tokens"] == 1, folder
    generator = open_generator(chat.back, torch.device("cpu"))
    assert (
        generator.end_ids == end_ids(read_side_files(chat.trained)) and len(generator.end_ids) == 3
    )


def test_merged_and_plainly_exported_weights_keep_the_files(chat: Chat, tmp_path: Path) -> None:
    blend(
        [chat.trained.with_name("step_2"), chat.trained],
        tmp_path / "merged",
        "-merged",
        [0.5, 0.5],
        None,
    )
    export_safetensors(chat.trained, tmp_path / "plain", torch.float32, overwrite=False)
    for folder in (tmp_path / "merged", tmp_path / "plain"):
        assert read_side_files(folder) == read_side_files(chat.trained)


def test_training_knows_the_tokens_that_the_source_names(chat: Chat) -> None:
    policy = load_recipe(str(chat.ours / "recipe.yaml"), []).data.tokenizer
    tokenizer = load_tokenizer(chat.ours / TOKENIZER, policy)
    source = AutoTokenizer.from_pretrained(chat.source)
    assert (tokenizer.bos_id, tokenizer.pad_id) == (source.bos_token_id, source.pad_token_id)
    assert tokenizer.prepend_bos and tokenizer.eod_id == source.convert_tokens_to_ids(ENDS[0])


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("tokenizer_config.json", b"[1]"),
        ("generation_config.json", b"{"),
        ("special_tokens_map.json", b"\xff{}"),
        ("tokenizer_config.json", b"[" * 100_000),
        ("chat_template.jinja", b"\xff"),
    ],
)
def test_a_damaged_file_is_named(name: str, content: bytes, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(CheckpointError, match=name):
        read_side_files(tmp_path)


def test_files_elsewhere_and_ids_that_are_none_are_passed_over(tmp_path: Path) -> None:
    hostile = {
        "tokenizer_file": "/etc/passwd",
        "trust_remote_code": True,
        "auto_map": {"AutoTokenizer": ["evil.Evil", None]},
    }
    hostile |= {"tokenizer_class": "Evil", "eos_token": "</s>"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(hostile))
    (tmp_path / "generation_config.json").write_text(
        json.dumps({"eos_token_id": [7, True, "x", None, 8]})
    )
    (tmp_path / "additional_chat_templates").mkdir()
    (tmp_path / "additional_chat_templates" / "-rf.jinja").write_text("x")
    files = read_side_files(tmp_path)
    assert json.loads(files["tokenizer_config.json"]) == {
        "eos_token": "</s>",
        "tokenizer_class": "PreTrainedTokenizerFast",
    }
    assert end_ids(files) == {7, 8} and set(files) == {
        "tokenizer_config.json",
        "generation_config.json",
    }
    assert end_ids({}) == frozenset()


def test_a_file_that_is_too_large_is_refused(tmp_path: Path) -> None:
    with (tmp_path / "chat_template.jinja").open("wb") as file:
        file.truncate(LARGEST_BYTES + 1)
    with pytest.raises(CheckpointError, match=r"chat_template\.jinja has 64,000,001 bytes"):
        read_side_files(tmp_path)


def test_a_run_carries_on_the_files_of_its_own_checkpoint_or_of_where_it_began(
    chat: Chat, tmp_path: Path
) -> None:
    recipe = load_recipe(str(chat.ours / "recipe.yaml"), [f"initial_weights={chat.ours}"])
    assert origin_of(recipe, None) == chat.ours and origin_of(recipe, chat.trained) == chat.trained
    branched = load_recipe(
        str(chat.ours / "recipe.yaml"), [f"branch_from={chat.trained.with_name('latest')}"]
    )
    assert origin_of(branched, None) == chat.trained
    (tmp_path / "weights.pt").write_bytes(b"")
    of_file = load_recipe(
        str(chat.ours / "recipe.yaml"), [f"initial_weights={tmp_path / 'weights.pt'}"]
    )
    assert origin_of(of_file, None) is None and origin_of(load_recipe("debug", []), None) is None
