"""Human evaluation from generated texts over a form in a real browser to the score."""

from __future__ import annotations

import asyncio
import csv
import json
import time
from pathlib import Path

import pytest

from pretrain.core.errors import DONE, USAGE
from pretrain.evaluation.human.study import (
    Item,
    Key,
    RatedModel,
    SheetOptions,
    make_key,
    read_key,
    write_study,
)
from tests.support.browser import Page, browser_path, in_browser
from tests.support.tiny_checkpoint import Trained, make_trained
from tests.support.tool_runs import Done, run_here

needs_browser = pytest.mark.skipif(browser_path() is None, reason="no Chromium is installed")
MODELS = [RatedModel(checkpoint=name, step=1, manifest=None) for name in ("first", "second")]
HOSTILE = (
    "</script><script>document.title = 'run'</script>",
    "<img src=x onerror=\"document.title = 'run'\"> &amp; <b>bold</b>",
    '=HYPERLINK("http://example.org"), "quoted", a;b',
    "two\r\nlines, \u2028 and \u202e backwards %%DATA%% %%HASH%%",
    "plain ünïcode \N{GRINNING FACE}",
)


def evaluate(*arguments: str | Path) -> Done:
    return run_here("evaluate.py", *arguments)


def study(folder: Path, models: list[RatedModel], raters: int = 1) -> Key:
    texts = [[f"{text} {model.checkpoint}" for model in models] for text in HOSTILE]
    items = [Item(prompt=text, texts=both) for text, both in zip(HOSTILE, texts, strict=True)]
    key = make_key(items, models, SheetOptions(folder, HOSTILE, raters=raters, seed=3))
    write_study(key, folder)
    return key


async def downloaded(folder: Path) -> Path:
    ends = time.monotonic() + 30
    while time.monotonic() < ends:
        found = list(folder.glob("*.csv"))
        if found and found[0].stat().st_size:
            return found[0]
        await asyncio.sleep(0.05)
    raise AssertionError("nothing was saved")


@needs_browser
def test_pairs_are_rated_by_keys_alone_and_scored(tmp_path: Path) -> None:
    folder, downloads = tmp_path / "study", tmp_path / "downloads"
    downloads.mkdir()
    key = study(folder, MODELS)
    order = list(key.sheets["rater_1"].items())
    comment = 'a "quoted", odd\ncomment; =1+1'

    async def scenario(page: Page) -> None:
        await page.open(folder / "raters" / "rater_1.html")
        assert page.errors == [] and await page.value("document.title") == "Rating sheet"
        seen = []
        for number, (item, left) in enumerate(order):
            shown = await page.value(
                "[...document.querySelectorAll('.text')].map(e => e.textContent)"
            )
            texts = key.items[item].texts
            # Exactly the texts, with their markup as text, and the sides of the key.
            assert shown == [key.items[item].prompt, texts[left], texts[1 - left]]
            seen.append(item)
            if number == 0:
                # A choice is corrected, and a comment may hold anything.
                await page.press("2", "p")
                await page.value("find('comment').focus()")
                await page.type(comment)
                await page.value("document.activeElement.blur()")
            # The first model, wherever it is; the last item is a tie.
            await page.press("0" if number == len(order) - 1 else ("2" if left else "ArrowLeft"))
        assert seen == [item for item, _ in order]
        assert await page.value("document.images.length + document.scripts.length") == 2
        # Without a name nothing is saved.
        await page.press("s")
        assert "name" in await page.value("find('saved').textContent")
        await page.type("Ann <b>")
        await page.value("document.activeElement.blur()")
        await page.press("s")
        path = await downloaded(downloads)
        assert path.name == "rater_1_Ann_b_.csv"
        assert await page.value("find('saved').textContent") == "Saved, all rated."
        # Nothing was run, loaded or asked.
        assert page.errors == [] and await page.value("document.title") == "Rating sheet"
        # A closed form keeps what was rated.
        await page.open(folder / "raters" / "rater_1.html")
        assert await page.value("find('progress').textContent") == "Text 5 of 5, 5 rated"

    in_browser(tmp_path / "profile", downloads, scenario)
    (sheet,) = downloads.glob("*.csv")
    rows = list(csv.DictReader(sheet.open(newline="", encoding="utf-8")))
    assert [row["item"] for row in rows] == [item for item, _ in order]
    assert rows[0]["comment"] == comment and rows[0]["rater"] == "Ann <b>"
    done = evaluate("--human-score", sheet, "--key", folder / "key.json", "--json", "-")
    assert done.returncode == DONE, done.stderr
    result = json.loads(done.stdout)
    assert (result["pairs"]["wins"], result["pairs"]["losses"], result["pairs"]["ties"]) == (
        4,
        0,
        1,
    )
    assert result["raters"]["Ann <b>"]["judgements"] == 5 and result["comments"] == 1
    # A key with the sides exchanged is another key.
    content = json.loads((folder / "key.json").read_text())
    content["sheets"]["rater_1"] = {
        item: 1 - left for item, left in content["sheets"]["rater_1"].items()
    }
    (tmp_path / "changed.json").write_text(json.dumps(content))
    refused = evaluate("--human-score", sheet, "--key", tmp_path / "changed.json")
    assert refused.returncode == 3 and "give the key of these sheets" in refused.stderr


@needs_browser
def test_ratings_are_given_criterion_by_criterion(tmp_path: Path) -> None:
    folder, downloads = tmp_path / "study", tmp_path / "downloads"
    downloads.mkdir()
    key = study(folder, MODELS[:1])
    assert key.criteria == ["fluency", "coherence", "relevance"]

    async def scenario(page: Page) -> None:
        await page.open(folder / "raters" / "rater_1.html")
        await page.press("9", "0")  # no values of the scale
        await page.press("5", "4", "1")  # three criteria of the first text
        await page.press("3", "p", "n", "2")  # two of the second
        await page.value(
            "document.querySelector('[data-column=relevance][data-value=\"5\"]').click()"
        )
        assert await page.value("find('progress').textContent") == "Text 3 of 5, 2 rated"
        await page.value("find('rater').focus()")
        await page.type("Bo")
        await page.value("find('save').click()")
        await downloaded(downloads)
        assert await page.value("find('saved').textContent") == "Saved; 3 texts are not rated yet."
        assert page.errors == []

    in_browser(tmp_path / "profile", downloads, scenario)
    (sheet,) = downloads.glob("*.csv")
    done = evaluate("--human-score", sheet, "--key", folder / "key.json", "--json", "-")
    assert done.returncode == DONE, done.stderr
    result = json.loads(done.stdout)
    assert {name: one["mean"] for name, one in result["criteria"].items()} == {
        "fluency": 4.0,
        "coherence": 3.0,
        "relevance": 3.0,
    }
    assert result["unrated"] == 3 and result["judgements"] == 2


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    return make_trained(tmp_path_factory.mktemp("other"), ("seed=5",))


def test_two_checkpoints_write_sheets_that_a_spreadsheet_fills_in(
    trained: Trained, other: Trained, tmp_path: Path
) -> None:
    prompts = tmp_path / "prompts.jsonl"
    lines = [{"prompt": f"{number} + {number % 7} ="} for number in range(12)]
    prompts.write_text("".join(json.dumps(line) + "\n" for line in lines))
    folder = tmp_path / "study"
    command = (
        *("--checkpoint", trained.latest, "--human-against", other.latest),
        *("--human-prompts", prompts, "--prompt", "1 + 1", "--max-new-tokens", "6"),
        *("--temperature", "1.0", "--human-sheet", folder, "--human-raters", "3"),
    )
    done = evaluate(*command)
    assert done.returncode == DONE, done.stderr
    key, _ = read_key(folder / "key.json")
    assert [model.checkpoint for model in key.models] == [
        str(trained.checkpoint),
        str(other.checkpoint),
    ]
    assert len(key.items) + key.identical == 13 and "1 + 1" in {
        item.prompt for item in key.items.values()
    }
    # Nothing in a sheet says which model a text is of.
    for path in (folder / "raters").iterdir():
        text = path.read_text()
        assert key.salt not in text and str(trained.checkpoint) not in text
        assert str(other.checkpoint) not in text and '"seed"' not in text
    sheets = []
    for number, sheet in enumerate(sorted((folder / "raters").glob("*.csv"))):
        rows = list(csv.DictReader(sheet.open(newline="", encoding="utf-8")))
        for row in rows:
            left = key.items[row["item"]].texts[key.sheets[sheet.stem][row["item"]]]
            assert row["left"].removeprefix("'") == left
            # These raters prefer the first model; a name is written once, as people do.
            row["choice"] = " Left" if key.sheets[sheet.stem][row["item"]] == 0 else "RIGHT"
        rows[0]["rater"] = f"rater {number}"
        path = tmp_path / f"filled_{number}.csv"
        with path.open("w", newline="", encoding="utf-8-sig") as file:
            # As a spreadsheet of another language saves it.
            writer = csv.DictWriter(file, list(rows[0]), delimiter=";")
            writer.writeheader()
            writer.writerows(rows)
        sheets.append(path)
    done = evaluate("--human-score", *sheets, "--key", folder / "key.json")
    assert done.returncode == DONE, done.stderr
    count = 3 * len(key.items)
    assert f"| judgements for A, for B, ties | {count}, 0, 0 |" in done.stdout
    assert "| win rate of A, ties half | 1.0000 |" in done.stdout
    assert "| rater 2 | " in done.stdout
    # The folder may be in use: it is not replaced.
    again = evaluate(*command)
    assert again.returncode == USAGE and "choose another --human-sheet" in again.stderr


@pytest.mark.parametrize(
    "options,said",
    [
        (("--human-sheet", "STUDY"), "give --human-prompts JSONL or --prompt TEXT"),
        (("--human-sheet", "STUDY", "--prompt", "1", "--human-against", "ITSELF"), "two models"),
        (("--human-sheet", "STUDY", "--prompt", "1", "--human-criteria", "item"), "'item'"),
        (("--human-sheet", "STUDY", "--prompt", "1", "--human-criteria", "a", "A"), "twice"),
        (("--human-sheet", "STUDY", "--prompt", "1", "--human-raters", "0"), "--human-raters is 0"),
        (("--human-prompts", "x.jsonl"), "belongs to --human-sheet"),
        (("--key", "key.json"), "belongs to --human-score"),
    ],
)
def test_what_makes_no_study_is_refused_in_one_sentence(
    options: tuple[str, ...], said: str, trained: Trained, tmp_path: Path
) -> None:
    places = {"STUDY": str(tmp_path / "study"), "ITSELF": str(trained.latest)}
    given = [places.get(option, option) for option in options]
    refused = evaluate("--checkpoint", trained.latest, *given)
    assert refused.returncode == USAGE, refused.stderr
    assert said in refused.stderr and "Traceback" not in refused.stderr
    assert not (tmp_path / "study").exists()


def test_a_score_needs_a_key(tmp_path: Path) -> None:
    refused = evaluate("--human-score", tmp_path / "x.csv")
    assert refused.returncode == USAGE and "--key FOLDER/key.json" in refused.stderr
