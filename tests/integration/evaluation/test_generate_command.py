from __future__ import annotations

import json
from pathlib import Path

import torch

from pretrain.core.errors import BAD_CHECKPOINT, BAD_DATA, DONE, USAGE
from pretrain.evaluation.generation.generate import generate
from pretrain.evaluation.generation.generators import NativeGenerator, open_generator
from pretrain.evaluation.generation.sampling import Sampling
from pretrain.evaluation.generation.writing import Writer
from tests.support.tiny_checkpoint import Trained
from tests.support.tool_runs import run_here

CPU = torch.device("cpu")


def test_a_checkpoint_and_its_export_write_the_same_text(trained: Trained, exported: Path) -> None:
    ours, theirs = (
        open_generator(path, torch.device("cpu")) for path in (trained.checkpoint, exported)
    )
    prompt = "11 + 2 = 13\n11 +"
    assert ours.encode(prompt) == theirs.encode(prompt) and ours.eod_id == theirs.eod_id
    for sampling in (Sampling(greedy=True), Sampling(top_p=0.9, top_k=50, seed=5)):
        texts = [
            generator.decode(
                generate(
                    generator.start(60),
                    generator.encode(prompt),
                    sampling,
                    generator.eod_id,
                    range(40),
                )
            )
            for generator in (ours, theirs)
        ]
        assert texts[0] == texts[1] and len(texts[0]) > 20


PROMPTS = ["11 + 2 =", "", "7 + 30 = 37\n7 + 31 ="]


def test_both_write_the_same_texts_to_prompts_of_different_lengths_at_once(
    trained: Trained, exported: Path
) -> None:
    sampling = Sampling(top_p=0.95, min_p=0.02, repetition_penalty=1.1, seed=3)
    writers = [
        Writer(open_generator(path, CPU), sampling, 24, ["\n9", "\n4"])
        for path in (trained.checkpoint, exported)
    ]
    ours, theirs = (writer.write(PROMPTS * 2, batch_size=4, progress=False) for writer in writers)
    assert ours == theirs and len({text.text for text in ours}) > 3
    alone = Writer(
        writers[0].generator, Sampling(**(vars(sampling) | {"seed": 7})), 24, ["\n9", "\n4"]
    )
    assert alone.write(PROMPTS[1:2], batch_size=1, progress=False) == [ours[4]]
    assert alone.speed.prefill_tokens == 1 and alone.speed.decode_tokens == ours[4].new_tokens - 1


def test_a_stop_string_ends_a_text_before_it(trained: Trained) -> None:
    generator = open_generator(trained.checkpoint, CPU)
    (whole,) = Writer(generator, Sampling(greedy=True), 40).write(PROMPTS[:1], 1, progress=False)
    assert whole.ended == "max_new_tokens" and whole.new_tokens == 40 and "\n" in whole.text
    (stopped,) = Writer(generator, Sampling(greedy=True), 40, ["\n"]).write(
        PROMPTS[:1], 1, progress=False
    )
    assert (
        stopped.ended == "stop string"
        and stopped.text == whole.text[: whole.text.index("\n")]
        and stopped.new_tokens < 40
    )


def test_the_command_writes_a_file_of_prompts_with_an_export(
    exported: Path, tmp_path: Path
) -> None:
    (tmp_path / "prompts.jsonl").write_text(
        "".join(json.dumps({"prompt": prompt, "other": 1}) + "\n" for prompt in PROMPTS)
    )
    options = (
        "--num-samples",
        "2",
        "--max-new-tokens",
        "5",
        "--seed",
        "1",
        "--batch-size",
        "4",
        "--json",
        tmp_path / "texts.json",
    )
    done = run_here(
        "generate.py", "--model", exported, "--prompts-file", tmp_path / "prompts.jsonl", *options
    )
    assert done.returncode == DONE, done.stderr
    result = json.loads((tmp_path / "texts.json").read_text())
    assert [text["prompt"] for text in result["samples"]] == [
        prompt for prompt in PROMPTS for _ in range(2)
    ]
    assert all(
        1 <= text["new_tokens"] <= 5 and text["prompt"] + text["text"] in done.stdout
        for text in result["samples"]
    )
    assert result["tokens_per_second"] > 0 and result["prefill_tokens_per_second"] > 0
    assert (
        "generating" in done.stderr and "decode:" in done.stderr and "tokens/s" not in done.stdout
    )


def test_a_single_text_is_streamed_and_the_same_seed_repeats_it(trained: Trained) -> None:
    arguments = (
        "--model",
        trained.latest,
        "--prompt",
        "11 + 2 =",
        "--max-new-tokens",
        "12",
        "--seed",
        "4",
    )
    first, again = (
        run_here("generate.py", *arguments),
        run_here("generate.py", *arguments, "--json", "-"),
    )
    assert first.returncode == DONE, first.stderr
    assert first.stdout == "11 + 2 =" + json.loads(again.stdout)["samples"][0]["text"] + "\n"
    assert "prefill: " in first.stderr


def test_pieces_are_shown_as_they_come(trained: Trained) -> None:
    shown: list[str] = []
    writer = Writer(open_generator(trained.checkpoint, CPU), Sampling(greedy=True), 12)
    (text,) = writer.write_batch([writer.prompt_ids("11 + 2 =")], show=shown.append)
    assert "".join(shown) == text.text and sum(map(bool, shown)) > 6


def test_a_prompt_that_spells_the_end_of_document_is_only_text(trained: Trained) -> None:
    generator = open_generator(trained.checkpoint, torch.device("cpu"))
    assert isinstance(generator, NativeGenerator)
    ids = generator.encode("a<|endoftext|>b ü\n")
    assert generator.eod_id not in ids and generator.decode(ids) == "a<|endoftext|>b ü\n"


def test_wrong_arguments_end_in_one_sentence_and_their_code(
    trained: Trained, tmp_path: Path
) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "prompts.jsonl").write_text('{"text": "no prompt"}\n')
    text = ("--prompt", "x")
    cases = [
        (
            ("--model", trained.latest, "--prompts-file", tmp_path / "prompts.jsonl"),
            BAD_DATA,
            "no JSON object with a",
        ),
        (
            ("--model", trained.latest, "--prompts-file", tmp_path / "none.txt"),
            BAD_DATA,
            "none.txt cannot be read",
        ),
        ((*text, "--model", trained.latest, "--max-new-tokens", "300"), USAGE, "256 positions"),
        ((*text, "--model", tmp_path), BAD_CHECKPOINT, "names no model_type"),
    ]
    for arguments, code, words in cases:
        refused = run_here("generate.py", *arguments)
        assert (
            refused.returncode == code
            and words in refused.stderr
            and "Traceback" not in refused.stderr
        ), refused.stderr
        assert refused.stdout == "" and refused.stderr.splitlines()[-1].startswith("error: ")
