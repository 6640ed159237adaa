"""The documentation is true: limits, links, commands, recipes, quotations, generated pages."""

from __future__ import annotations

import ast
import importlib.util
import json
import os
import re
import shlex
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import pytest
import yaml

from pretrain.config.load import load_recipe
from pretrain.core import errors, interrupts
from pretrain.sweeps.axes import read_axes_file
from pretrain.sweeps.mixes import read_custom_datasets

ROOT = next(
    folder for folder in Path(__file__).resolve().parents if (folder / "pyproject.toml").is_file()
)
DOCS = sorted((ROOT / "docs").glob("*.md"))
PAGES = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")),
    *DOCS,
    *(ROOT / name / "README.md" for name in ("pretrain", "pretrain/model", "data_pipeline")),
    *(ROOT / name / "README.md" for name in ("launchers", "benchmarks/results")),
]
SCRIPTS: dict[str, str] = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"][
    "scripts"
]
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
SPAN = re.compile(r"`([^`\n]+)`")
# What the commands of other projects begin with; nothing is checked of them.
FOREIGN = ("docker", "git", "pip", "pre-commit", "source", "tensorboard", "transformers", "uv")
# Words that this project uses in a sense that a reader of the field does not expect.
DIALECT = {
    "turn": r"\bturn(?:ed|s|ing)?\b(?! (?:on|off|into)\b)",
    "numbers": r"\bhidden numbers\b",
    "answer": r"\banswers?\b",
    "tell": r"\b(?:tells?|told)\b",
    "lie": r"\blies?\b",
    "stand": r"\bstands\b",
    "mend": r"\bmend(?:s|ed|ing)?\b",
    "go on": r"\bgo(?:es)? on\b",
    "twin, trunk": r"\b(?:twin|trunk)s?\b",
    "beside": r"\b(?:beside|by turns)\b",
    "take in": r"\b(?:takes in|gives back)\b",
    "riddles": r"\b(?:that which|of its own|by itself|so many|as many as)\b",
}


def shown(path: Path) -> str:
    return str(path.relative_to(ROOT))


def prose(page: Path) -> str:
    """A page's text without its code."""
    return SPAN.sub("", FENCE.sub("", page.read_text("utf-8")))


def blocks(language: str) -> list[tuple[Path, str]]:
    return [
        (page, text)
        for page in PAGES
        for name, text in FENCE.findall(page.read_text("utf-8"))
        if name == language
    ]


def block_id(value: object) -> str:
    """A name of a test of a block, without its text."""
    return value.name if isinstance(value, Path) else "block"


def load_figures() -> ModuleType:
    """The script that makes pictures and pages, which belongs to no package."""
    path = ROOT / "docs" / "figures" / "make_figures.py"
    spec = importlib.util.spec_from_file_location("make_figures", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


# --- size and language ----------------------------------------------------------------------------


def test_the_readme_can_be_read_in_minutes() -> None:
    lines = (ROOT / "README.md").read_text("utf-8").splitlines()
    assert len(lines) <= 160
    assert max(map(len, lines)) <= 160


@pytest.mark.parametrize("page", DOCS, ids=shown)
def test_a_page_is_short(page: Path) -> None:
    assert len(page.read_text("utf-8").splitlines()) <= 120


def test_every_page_can_be_found_from_the_index() -> None:
    found, waiting = set(), ["README.md"]
    while waiting:
        name = waiting.pop()
        if name not in found:
            found.add(name)
            waiting += re.findall(r"\]\((\w+\.md)", (ROOT / "docs" / name).read_text("utf-8"))
    assert {page.name for page in DOCS} - found == set()


@pytest.mark.parametrize(
    # The page of DeepSpeed's facts repeats docstrings, whose language has its own checks.
    "page",
    [page for page in PAGES if page.name != "deepspeed_workarounds.md"],
    ids=shown,
)
def test_a_page_uses_the_words_of_the_field(page: Path) -> None:
    text = prose(page)
    found = [match[0] for pattern in DIALECT.values() for match in re.finditer(pattern, text)]
    assert found == []


def test_conditions_begin_with_if() -> None:
    text = "\n".join(prose(page) for page in PAGES)
    places = len(re.findall(r"\bwhere\b", text, re.IGNORECASE))
    assert places < 0.6 * len(re.findall(r"\bif\b", text, re.IGNORECASE))


# --- links and names ------------------------------------------------------------------------------


def anchors(page: Path) -> set[str]:
    """The fragments that GitHub gives a page's headings."""
    text = FENCE.sub("", page.read_text("utf-8"))
    titles = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).strip().replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PAGES, ids=shown)
def test_links_lead_somewhere(page: Path) -> None:
    text = FENCE.sub("", page.read_text("utf-8"))
    broken = []
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        if link.startswith(("http://", "https://")):
            continue
        path, _, fragment = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        if not target.exists() or (fragment and fragment not in anchors(target)):
            broken.append(link)
    assert broken == []


@pytest.mark.parametrize("page", PAGES, ids=shown)
def test_named_files_exist(page: Path) -> None:
    folders = "pretrain|data_pipeline|tools|launchers|benchmarks|ds_configs|docs"
    tests = {path.name for path in (ROOT / "tests").rglob("test_*.py")}
    missing = []
    for span in SPAN.findall(FENCE.sub("", page.read_text("utf-8"))):
        if re.fullmatch(rf"(?:{folders})/[\w./*-]+", span) and not list(ROOT.glob(span)):
            missing.append(span)
        missing += [name for name in re.findall(r"\btest_\w+\.py", span) if name not in tests]
    assert missing == []


# --- code -----------------------------------------------------------------------------------------


def test_every_fence_says_its_language() -> None:
    found = {name for page in PAGES for name, _ in FENCE.findall(page.read_text("utf-8"))}
    assert found <= {"bash", "python", "yaml", "text"}


@pytest.mark.parametrize("page,text", blocks("python"), ids=block_id)
def test_python_compiles(page: Path, text: str) -> None:
    compile(text, shown(page), "exec")


@pytest.mark.parametrize("page,text", blocks("yaml"), ids=block_id)
def test_a_recipe_is_valid(page: Path, text: str, tmp_path: Path) -> None:
    path = tmp_path / "shown.yaml"
    path.write_text(text, encoding="utf-8")
    content = yaml.safe_load(text)
    if "axes" in content:
        base, axes = read_axes_file(str(path))
        assert base is not None and axes
        load_recipe(base)
    elif "mixes" in content:
        _, mixes = read_custom_datasets(str(path))
        assert mixes
    elif not page.name.startswith("extending"):  # whose plugins another test imports
        load_recipe(str(path))


@dataclass(frozen=True)
class Command:
    """One command of a page.

    Attributes:
        words: without variables before it.
        module: the one whose parser reads ``arguments``; "" for a foreign command.
    """

    page: str
    words: tuple[str, ...]
    module: str
    arguments: tuple[str, ...]

    def __str__(self) -> str:
        return shlex.join(self.words)[:70]


def simple_commands(text: str) -> Iterator[list[str]]:
    """The words of each command of a shell text, split at ``&&`` and pipes."""
    for line in text.replace("\\\n", " ").splitlines():
        words: list[str] = []
        for word in [*shlex.split(line, comments=True), "&&"]:
            if word in ("&&", "|", ";"):
                while words and re.match(r"[A-Z_]+=", words[0]):
                    words.pop(0)
                if words:
                    yield words
                words = []
            else:
                words.append(word)


def classified(page: Path, words: list[str]) -> Command:
    """What is to be checked of a command."""
    name, script = words[0], 0
    if name in ("python", "deepspeed", "torchrun", "mpirun", "sbatch") or name.endswith("python"):
        ours = ("tools/", "launchers/", "docs/", "benchmarks/")
        found = [i for i, w in enumerate(words) if w.startswith(ours) or w == "pretrain"]
        if not found:
            return Command(shown(page), tuple(words), "", ())
        script = found[0]
    place, rest = words[script], tuple(words[script + 1 :])
    if place.startswith("launchers/") or place == "pretrain":
        module = "pretrain.run.arguments"
    elif place.startswith("tools/") and place.endswith(".py"):
        module = place.removesuffix(".py").replace("/", ".")
    elif place in SCRIPTS:
        module = SCRIPTS[place].partition(":")[0].replace("pretrain.tools.", "tools.")
        module = "pretrain.run.arguments" if module == "pretrain.__main__" else module
    else:
        module = ""
    return Command(shown(page), tuple(words), module, rest if module else ())


def commands() -> list[Command]:
    """Every command of the pages, in blocks and between the words."""
    found = [
        classified(page, words) for page, text in blocks("bash") for words in simple_commands(text)
    ]
    for page in PAGES:
        for span in SPAN.findall(FENCE.sub("", page.read_text("utf-8")).replace("\\|", "|")):
            begins = re.match(
                r"(?:[A-Z_]+=\S+ )*(?:python (?:tools|launchers)/|moe-\w+ --|deepspeed --\w+ \d"
                r"|torchrun --|sbatch |launchers/\S+\.sh )",
                span,
            )
            if begins and "..." not in span:
                found += [classified(page, words) for words in simple_commands(span)]
    return list(dict.fromkeys(found))


COMMANDS = commands()
MISTAKES = [
    classified(ROOT / "README.md", shlex.split(line))
    for line in (
        "python tools/generate.py --modle x --prompt y",
        "deepspeed --num_accelerators 2 launchers/pretrain.py --recipe quickstrat",
        "moe-pretrain --recipe debug --set model.moe.topk=2",
    )
]
# Reads all commands in one process, because importing the tools takes seconds; away from this one,
# because a tool's import handles Ctrl-C and quiets libraries.
PARSE = """
import contextlib, importlib, io, json, sys
from pathlib import Path
from pydantic import TypeAdapter
from pretrain.config.load import apply_override, load_recipe, read_recipe_file
from pretrain.config.recipe import Recipe
from pretrain.core.shipped import ds_config_path, recipe_names
from pretrain.sweeps.axes import parse_axis_option, read_axes_file

def check(module, arguments):
    sys.argv = [module, *arguments]
    options = vars(importlib.import_module(module).parse_arguments())
    recipe, overrides = options.get("recipe"), options.get("overrides") or []
    recipe = recipe if isinstance(recipe, str) else None  # for some tools a flag
    is_path = recipe is not None and ("/" in recipe or recipe.endswith(".yaml"))
    if recipe is not None and not is_path:
        load_recipe(recipe, overrides)
    else:
        content, _ = read_recipe_file("quickstart")
        for override in overrides:
            apply_override(content, override)
        TypeAdapter(Recipe).validate_python(content)
    if options.get("ds_config"):
        assert ds_config_path(options["ds_config"]).is_file(), options["ds_config"]
    if options.get("file") and not options["file"].endswith(".yaml"):
        read_axes_file(options["file"])
    for axis in options.get("axis") or []:
        field, _, values = axis.partition("=")
        parse_axis_option(axis)
        first = values.split(":")[1] if ":" in values else values.strip("[]").split(",")[0]
        load_recipe(recipe, [*overrides, f"{field}={first}"])

results = []
for module, arguments in json.load(sys.stdin):
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            check(module, arguments)
        results.append(None)
    except SystemExit:
        results.append(said.getvalue().strip().splitlines()[-1])
    except Exception as error:
        results.append(f"{type(error).__name__}: {error}")
print(json.dumps(results))
"""


@pytest.fixture(scope="module")
def refusals() -> dict[Command, str | None]:
    """What the parsers and recipes say against each command; None for a command that is right."""
    checked = [command for command in (*COMMANDS, *MISTAKES) if command.module]
    done = subprocess.run(
        [sys.executable, "-P", "-c", PARSE],
        input=json.dumps([[command.module, command.arguments] for command in checked]),
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT), "COLUMNS": "200"},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return dict(zip(checked, json.loads(done.stdout.splitlines()[-1]), strict=True))


@pytest.mark.parametrize("command", COMMANDS, ids=str)
def test_a_command_is_real(command: Command, refusals: dict[Command, str | None]) -> None:
    name = command.words[0]
    if command.module:
        assert refusals[command] is None
        script = next((word for word in command.words if word.startswith("launchers/")), None)
        assert script is None or (ROOT / script).is_file()
    elif name.startswith("tools/"):
        # A shell script, with a test of its options.
        assert (ROOT / name).is_file()
    elif name == "make":
        makefile = (ROOT / "Makefile").read_text("utf-8")
        for target in command.words[1:]:
            assert re.search(rf"^{re.escape(target)}:", makefile, re.MULTILINE), target
    elif re.search(r"(?:^|/)python[\d.]*$", name) and command.words[1].endswith(".py"):
        assert (ROOT / command.words[1]).is_file()
    else:
        assert Path(name).name in (*FOREIGN, "zstdcat", "sbatch") or "python" in name, name


def test_the_check_of_commands_finds_mistakes(refusals: dict[Command, str | None]) -> None:
    assert all(refusals[command] for command in MISTAKES)


# --- running --------------------------------------------------------------------------------------


def run_in(folder: Path, words: tuple[str, ...]) -> None:
    """Run a command as in a fresh checkout whose outputs go to ``folder``."""
    for name in ("tools", "launchers", "ds_configs"):
        if not (folder / name).exists():
            (folder / name).symlink_to(ROOT / name)
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        list(words),
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(ROOT), "PATH": path},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, (words, done.stdout[-2000:], done.stderr[-3000:])


def plans() -> list[object]:
    """The commands that plan or analyse and need no data; one of each is a short test."""
    found = {}
    for command in COMMANDS:
        if any(word.endswith(".yaml") for word in command.words):
            continue  # a file of the reader's
        if "--dry-run" in command.words and command.words[0] == "python":
            found[command.words] = "--recipe debug" in shlex.join(command.words)
        elif "tools/analyze_model.py" in command.words and "--plot" not in command.words:
            found[command.words] = "--world-size" in command.words
    return [
        pytest.param(words, id=shlex.join(words)[:60], marks=() if short else pytest.mark.full)
        for words, short in found.items()
    ]


@pytest.mark.parametrize("words", plans())
def test_a_plan_can_be_made(words: tuple[str, ...], tmp_path: Path) -> None:
    run_in(tmp_path, words)


@pytest.mark.full
def test_the_two_minutes_on_one_core_work(tmp_path: Path) -> None:
    (block,) = [
        text
        for page, text in blocks("bash")
        if page.parent.name == "docs" and "exports/debug" in text
    ]
    for words in simple_commands(block):
        run_in(tmp_path, tuple(words))
    assert (tmp_path / "exports" / "debug" / "config.json").is_file()


# --- pages that repeat the code -------------------------------------------------------------------


def test_exit_codes_are_those_of_the_code() -> None:
    page = (ROOT / "docs" / "exit_codes.md").read_text("utf-8")
    shown_codes = {
        name: int(code) for code, name in re.findall(r"^\| (\d+) \| `(\w+)`", page, re.M)
    }
    codes = {
        name: value
        for name, value in vars(errors).items()
        if name.isupper() and isinstance(value, int)
    }
    assert shown_codes == codes | {"INTERRUPTED": interrupts.INTERRUPTED}


def test_the_facts_about_deepspeed_are_on_their_page() -> None:
    figures = load_figures()
    page = figures.WORKAROUNDS_PAGE.read_text("utf-8")
    files = [path for path in figures.WORKAROUNDS.glob("*.py") if path.name != "__init__.py"]
    assert len(files) > 5 and [path.name for path in files if f"`{path.name}`" not in page] == []
    assert page == figures.workarounds_page(), "run python docs/figures/make_figures.py"


def test_what_goes_together_is_what_the_rules_say() -> None:
    figures = load_figures()
    page = figures.COMBINATIONS_PAGE.read_text("utf-8")
    assert page == figures.combinations_page(), "run python docs/figures/make_figures.py"


def test_the_pictures_are_those_of_the_script() -> None:
    figures = load_figures()
    assert figures.FLOW_PICTURE.read_text("utf-8") == figures.flow_svg()
    points = figures.stored_points()
    assert figures.RUN_POINTS.stat().st_size < 100_000
    assert points.training[-1][0] == points.train_tokens
    readme = (ROOT / "README.md").read_text("utf-8")
    assert f"{points.validation_loss:.4f}" in readme and f"{points.bigram_loss:.4f}" in readme
    picture = figures.LOSS_PICTURE.read_text("utf-8")
    assert f"{points.validation_loss:.2f}" in picture and f"{points.bigram_loss:.2f}" in picture


def source_strings() -> list[str]:
    """Every string of the product's code: an f-string as its text with ``{expression}`` inside."""
    found = []
    for folder in ("pretrain", "data_pipeline", "tools", "launchers"):
        for path in (ROOT / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text("utf-8"))):
                if isinstance(node, ast.JoinedStr):
                    parts = [
                        str(part.value)
                        if isinstance(part, ast.Constant)
                        else f"{{{ast.unparse(part.value)}}}"
                        for part in node.values
                        if isinstance(part, ast.Constant | ast.FormattedValue)
                    ]
                    found.append("".join(parts))
                elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                    found.append(node.value)
    return found


def test_quoted_sentences_are_said_by_the_program() -> None:
    page = (ROOT / "docs" / "troubleshooting.md").read_text("utf-8")
    # A first column that is nothing but a quotation; the others describe what other programs say.
    quoted = re.findall(r"^\| `([^`]+)` \|", page, re.MULTILINE)
    strings = source_strings()
    assert len(quoted) > 30
    assert [text for text in quoted if not any(text in string for string in strings)] == []
