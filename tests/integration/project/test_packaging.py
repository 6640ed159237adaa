"""The package as a wheel, in an empty environment away from the checkout: its files, its commands,
and the main job with them.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.support.paths import ROOT

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
SCRIPTS: dict[str, str] = PROJECT["scripts"]
# A folder of the checkout and where a wheel has it.
PACKAGES = {
    "pretrain": "pretrain",
    "data_pipeline": "data_pipeline",
    "tools": "pretrain/tools",
    "launchers": "pretrain/launchers",
    "ds_configs": "pretrain/ds_configs",
}
HELP_OF_ALL = """\
import contextlib, importlib.metadata, io, json, sys
shown = {}
for entry in importlib.metadata.distribution("moe-pretrain").entry_points:
    sys.argv, text = [entry.name, "--help"], io.StringIO()
    try:
        with contextlib.redirect_stdout(text):
            entry.load()()
    except SystemExit as left:
        shown[entry.name] = [left.code, text.getvalue()]
print(json.dumps(shown))
"""
WHERE = """\
import importlib.util, data_pipeline, pretrain
from pretrain.core import shipped
print(pretrain.__file__, data_pipeline.__file__, shipped.TOOLS, shipped.LAUNCHERS, shipped.DS_CONFIGS, sep="\\n")
print([name for name in ("tools", "tests", "benchmarks", "launchers") if importlib.util.find_spec(name)])
"""


@dataclass(frozen=True)
class Installed:
    """A virtual environment that has the wheel, and an empty folder to work in."""

    wheel: Path
    environment: Path
    folder: Path

    def run(self, name: str, *arguments: str | Path, **variables: str) -> str:
        """Standard output of a command of the environment, which must succeed."""
        bin_folder = self.environment / "bin"
        kept = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
        path = f"{bin_folder}{os.pathsep}{kept['PATH']}"
        done = subprocess.run(
            [str(bin_folder / name), *map(str, arguments)],
            cwd=self.folder,
            env=kept | {"PATH": path} | variables,
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert done.returncode == 0, (name, arguments, done.stdout[-2000:], done.stderr[-4000:])
        return done.stdout


def source_files() -> set[str]:
    """What a wheel must hold, by the names it has there: every file of the packages but
    documentation.
    """
    return {
        f"{inside}/{path.relative_to(ROOT / folder).as_posix()}"
        for folder, inside in PACKAGES.items()
        for path in (ROOT / folder).rglob("*")
        if path.is_file() and path.suffix not in (".md", ".pyc")
    }


def build_wheel(folder: Path) -> Path:
    """A wheel from a source archive of the checkout, as package indexes have both; nothing is
    written into the checkout.
    """
    copied = folder / "checkout"
    copied.mkdir()
    for name in PACKAGES:
        shutil.copytree(ROOT / name, copied / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in (
        "pyproject.toml",
        "setup.py",
        "MANIFEST.in",
        "requirements.txt",
        "README.md",
        "LICENSE",
    ):
        shutil.copyfile(ROOT / name, copied / name)
    program = "from setuptools import build_meta; build_meta.build_sdist('dist')"
    run_quietly([sys.executable, "-c", program], copied)
    (archive,) = (copied / "dist").glob("moe_pretrain-*.tar.gz")
    offline = ["--no-deps", "--no-index", "--no-build-isolation", "--disable-pip-version-check"]
    run_quietly([sys.executable, "-m", "pip", "wheel", *offline, str(archive), "-w", "."], folder)
    (wheel,) = folder.glob("*.whl")
    return wheel


def run_quietly(command: Sequence[str], folder: Path) -> None:
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Installed:
    folder = tmp_path_factory.mktemp("packaging")
    wheel, environment, work = build_wheel(folder), folder / "environment", folder / "work"
    work.mkdir()
    run_quietly([sys.executable, "-m", "venv", "--without-pip", str(environment)], folder)
    (site,) = environment.glob("lib/python3.*/site-packages")
    # The dependencies are those of the running environment. A .pth file inside such a folder is not
    # read again, so an editable installation there does not make the checkout importable here.
    others = [path for path in sys.path if path.endswith("site-packages")]
    (site / "dependencies.pth").write_text("\n".join(others) + "\n")
    pip = [sys.executable, "-m", "pip", "--python", str(environment / "bin" / "python")]
    offline = ["--no-deps", "--no-index", "--disable-pip-version-check", "--force-reinstall"]
    run_quietly([*pip, "install", *offline, str(wheel)], folder)
    return Installed(wheel, environment, work)


def test_a_wheel_holds_every_file_and_takes_no_other_name(installed: Installed) -> None:
    names = {
        name for name in zipfile.ZipFile(installed.wheel).namelist() if ".dist-info/" not in name
    }
    assert names == source_files()
    assert {"pretrain/recipes/debug.yaml", "pretrain/ds_configs/zero1.json"} <= names
    assert {name.split("/")[0] for name in names} == {"pretrain", "data_pipeline"}


def test_every_tool_has_its_command() -> None:
    tools = {path.stem for path in (ROOT / "tools").glob("*.py")} - {"__init__"}
    expected = {f"pretrain.tools.{name}:command" for name in tools} | {"pretrain.__main__:command"}
    assert set(SCRIPTS.values()) == expected
    assert all(name.startswith("moe-") for name in SCRIPTS)


def test_nothing_is_imported_from_the_checkout(installed: Installed) -> None:
    *places, found = installed.run("python", "-c", WHERE).splitlines()
    assert all(Path(place).is_relative_to(installed.environment) for place in places), places
    assert found == "[]"


def test_every_command_shows_its_help(installed: Installed) -> None:
    shown = json.loads(installed.run("python", "-c", HELP_OF_ALL))
    assert set(shown) == set(SCRIPTS)
    assert {
        name for name, (code, text) in shown.items() if code or f"usage: {name} " not in text
    } == set()


def test_extras_are_the_sections_of_the_requirements(installed: Installed) -> None:
    metadata = next(
        name for name in zipfile.ZipFile(installed.wheel).namelist() if name.endswith("METADATA")
    )
    text = zipfile.ZipFile(installed.wheel).read(metadata).decode()
    lines = (ROOT / "requirements.txt").read_text(encoding="utf-8").splitlines()
    written = {line.partition("#")[0].strip() for line in lines} - {""}
    extras = set(re.findall(r"^Provides-Extra: (\S+)$", text, flags=re.MULTILINE))
    assert extras == {"all", "dev", "evaluation", "kaggle", "low-precision", "trackers"}
    required = re.findall(r"^Requires-Dist: ([\w.-]+)(.*)$", text, flags=re.MULTILINE)
    assert {name.lower() for name, _ in required} == {
        re.split(r"[<>=;]", line)[0].strip().lower() for line in written
    }
    always = {name for name, rest in required if "extra ==" not in rest}
    assert {"torch", "deepspeed", "transformers"} <= always
    assert always.isdisjoint({"wandb", "lm-eval", "bitsandbytes", "pytest", "ruff"})


def test_the_main_job_runs_from_an_empty_folder(installed: Installed) -> None:
    """Data, two training steps by each way of starting, evaluation, and text."""
    installed.run("moe-preprocess", "--recipe", "debug")
    run = ["--recipe", "debug", "--ds_config", "zero1", "--json", "result.json"]
    result = installed.folder / "result.json"
    starts: list[list[str | Path]] = [
        ["moe-pretrain"],
        [
            "python",
            "-m",
            "deepspeed.launcher.runner",
            "--num_accelerators",
            "2",
            "--module",
            "pretrain",
        ],
        ["python", "-m", "torch.distributed.run", "--nproc_per_node", "2", "--module", "pretrain"],
    ]
    for number, start in enumerate(starts):
        settings = (f"run_path=runs/{number}", "train.train_tokens=1024")
        changes = [part for setting in settings for part in ("--set", setting)]
        installed.run(str(start[0]), *start[1:], *run, *changes, MASTER_PORT=str(free_port()))
        assert json.loads(result.read_text())["steps"] == 2
    latest = "runs/0/checkpoints/latest"
    scores = json.loads(
        installed.run(
            "moe-evaluate",
            "--checkpoint",
            latest,
            "--max-windows",
            "4",
            "--no-bigram",
            "--json",
            "-",
        )
    )
    assert 0.0 < scores["loss"] < 20.0
    installed.run("moe-generate", "--model", latest, "--prompt", "def ", "--max-new-tokens", "4")


@pytest.mark.parametrize("command", ["moe-analyze", "moe-preprocess", "moe-sweep"])
def test_a_shell_completes_recipes(installed: Installed, command: str) -> None:
    line = f"{command} --recipe quickstart_w"
    answer = installed.folder / f"{command}_completions"
    asked = {
        "_ARGCOMPLETE": "1",
        "_ARGCOMPLETE_STDOUT_FILENAME": str(answer),
        "_ARGCOMPLETE_IFS": "\n",
        "COMP_LINE": line,
        "COMP_POINT": str(len(line)),
    }
    installed.run(command, **asked)
    assert set(answer.read_text().split()) == {"quickstart_wsd", "quickstart_wsd_decay"}


EDITS = re.compile(
    r"sys\.path(\[.*?\])?\s*(\+?=[^=]|\.(insert|append|extend|remove|pop|clear|sort|reverse)\b)"
    r"|del sys\.path|syspath_prepend|addsitedir|setattr\(sys, .path"
)


def test_no_file_edits_the_search_path() -> None:
    folders = ("benchmarks", "data_pipeline", "launchers", "pretrain", "tests", "tools")
    paths = [path for folder in folders for path in (ROOT / folder).rglob("*.py")]
    assert len(paths) > 300
    found = {
        path.relative_to(ROOT).as_posix()
        for path in paths
        if path != Path(__file__) and EDITS.search(path.read_text(encoding="utf-8"))
    }
    assert found == set()


@pytest.mark.parametrize(
    "rest", [".insert(0, root)", ".append(root)", "[0] = root", " = [root]", " += [root]"]
)
def test_an_edit_of_the_search_path_is_found(rest: str) -> None:
    assert EDITS.search(f"import sys\nsys.path{rest}\n")
    assert not EDITS.search("assert sys.path == [root]\nprint(sys.path[0])\n")


def test_a_script_of_another_checkout_than_the_installed_one_is_refused(tmp_path: Path) -> None:
    other = tmp_path / "other"
    (other / "tools").mkdir(parents=True)
    shutil.copyfile(ROOT / "tools" / "verify_data.py", other / "tools" / "verify_data.py")
    (other / "pretrain" / "core").mkdir(parents=True)
    done = subprocess.run(
        [sys.executable, str(other / "tools" / "verify_data.py"), "--help"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2
    assert f"would run the code of {ROOT}" in done.stderr and "pip install -e" in done.stderr
