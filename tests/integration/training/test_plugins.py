"""Parts from a package outside of the tree, through every command of a run; and code that a
checkpoint names is not run.

The package is tests/support/plugin_package/my_parts, copied away so that only PYTHONPATH finds it.
"""

from __future__ import annotations

import json
import random
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.support.paths import ROOT, TOOLS
from tests.support.tiny_run import STEP_TOKENS, WORDS, Started, start_ranks

PARTS = ROOT / "tests" / "support" / "plugin_package"
STEPS = 10
RECIPE = """\
name: outside
seed: 7
run_path: {folder}/run
plugins: [my_parts]
data:
  path: {folder}/data
  source: {{kind: chapters, input: ["{folder}/texts/*.txt"]}}
  cleaning: {{rules: [{{kind: min_words, words: 3}}]}}
  tokenizer: {{kind: train_bpe, vocab_size: 300}}
  validation_share: 0.2
model:
  hidden_size: 32
  num_hidden_layers: 2
  max_position_embeddings: 64
  attention: {{kind: gqa, num_attention_heads: 4, num_key_value_heads: 2, head_dim: 8, qk_norm: head}}
  moe: {{kind: dropless, num_experts: 4, top_k: 2, moe_intermediate_size: 16, router: {{kind: sharp_topk}}}}
train: {{sequence_length: 32, micro_batch_size: 2, global_batch_size: 8, train_tokens: {tokens}, precision: fp32}}
optimizer: {{kind: adamw, learning_rate: 3.0e-3}}
schedule: {{kind: parabola, warmup_steps: 2}}
parallel: {{ep_size: 2}}
callbacks: [{{kind: step_line, text: done}}]
guards: {{more: [{{kind: loss_limit, nats: 1.0}}]}}
checkpoint: {{interval_steps: 5}}
validation: {{interval_steps: 10, max_windows: 8}}
logging: {{interval_steps: 1, tensorboard: false}}
"""


@dataclass(frozen=True)
class Outside:
    """A folder with texts, a recipe, the user's package, and the numbers of the processes that
    imported it.
    """

    folder: Path

    @property
    def recipe(self) -> str:
        return str(self.folder / "outside.yaml")

    @property
    def checkpoint(self) -> str:
        return str(self.folder / "run" / "checkpoints" / "latest")

    @property
    def variables(self) -> dict[str, str]:
        """The environment's variables of every process."""
        return {
            "PYTHONPATH": f"{self.folder / 'site'}:{ROOT}",
            "MY_PARTS_CANARY": str(self.folder / "canary"),
        }

    def imports(self) -> int:
        """Processes that have imported the package so far."""
        return len(list((self.folder / "canary").iterdir()))

    def start(self, *command: str | Path, code: int = 0) -> Started:
        """Run a command in another folder than the tree's; it has to end with ``code``."""
        started = Started(command, self.folder, self.variables)
        found = started.wait()
        assert found == code, f"exit code {found}: {started.stdout}{started.stderr}"
        return started

    def tool(self, name: str, *options: str | Path, code: int = 0) -> Started:
        """Run a file of tools/."""
        return self.start(sys.executable, TOOLS / name, *options, code=code)

    def train(self, *options: str) -> Started:
        """Train on two ranks; returns rank 0."""
        ranks = start_ranks(["--recipe", self.recipe, *options], self.folder, self.variables)
        for rank in ranks:
            assert rank.wait() == 0, f"{rank.stdout}{rank.stderr}"
        return ranks[0]


@pytest.fixture
def outside(tmp_path: Path) -> Outside:
    """Everything before the first command."""
    source = random.Random(0)
    for name in ("texts", "canary"):
        (tmp_path / name).mkdir()
    for number in range(30):
        chapter = " ".join(source.choices(WORDS, k=500))
        text = f"preface {number}\n\n{chapter}\n\nthe end"
        (tmp_path / "texts" / f"{number}.txt").write_text(text)
    shutil.copytree(PARTS, tmp_path / "site")
    text = RECIPE.format(folder=tmp_path, tokens=STEPS * STEP_TOKENS)
    (tmp_path / "outside.yaml").write_text(text)
    return Outside(tmp_path)


def test_parts_of_a_package_outside_of_the_tree_go_through_a_whole_run(outside: Outside) -> None:
    outside.tool("preprocess_data.py", "--recipe", outside.recipe, "--workers", "2")
    manifest = json.loads((outside.folder / "data" / "manifest.json").read_text())
    source = manifest["sources"]["all"]
    assert source["left_out"] == {"preface": 30} and source["dropped"] == {"min_words": 30}
    assert outside.imports() >= 2  # the command, and a worker that had something to do
    outside.train()
    steps = (outside.folder / "run" / "steps.txt").read_text().split("\n")
    assert steps == [f"done {step}" for step in range(1, STEPS + 1)] + [""]
    saved = (outside.folder / "run" / "recipe.yaml").read_text()
    assert "plugins:\n- my_parts\n" in saved and "kind: sharp_topk" in saved
    rows = [json.loads(line) for line in (outside.folder / "run" / "metrics.jsonl").open()]
    rates = [row["learning_rate"] for row in rows if row["kind"] == "train"]
    assert rates[5] == pytest.approx(3e-3 * (0.1 + 0.9 * (1 - 3 / 8) ** 2))

    incidents = (outside.folder / "run" / "incidents.jsonl").read_text().splitlines()
    assert {json.loads(line)["guard"] for line in incidents} == {"loss_limit"}

    # 512 tokens more: the same run resumes from its checkpoint.
    more = outside.train("--set", f"train.train_tokens={(STEPS + 2) * STEP_TOKENS}")
    assert f"resuming from step {STEPS}" in more.stdout

    refused_without_a_plugin(outside)
    used_with_a_plugin(outside)


def refused_without_a_plugin(outside: Outside) -> None:
    """A checkpoint names its plugins, and no command imports them for that."""
    before = outside.imports()
    sentence = (
        "'model.moe.router.kind' is 'sharp_topk', which is a part of the plugin my_parts, "
        "which the checkpoint names: give --plugin my_parts if you trust it"
    )
    opened = ("--checkpoint", outside.checkpoint)
    exported = ("--to", "hf", "--output", outside.folder / "refused")
    for name, options in {
        "evaluate.py": opened,
        "generate.py": ("--model", outside.checkpoint, "--prompt", "the"),
        "convert_checkpoint.py": (*opened, *exported),
        "inspect_checkpoint.py": opened,
    }.items():
        refused = outside.tool(name, *options, code=2)
        assert sentence in refused.stderr, f"{name}: {refused.stderr}"
    record = outside.folder / "run" / "recipe.yaml"
    refused = outside.tool("analyze_model.py", "--recipe", record, code=2)
    assert "give --plugin my_parts if you trust it" in refused.stderr
    assert outside.imports() == before


def used_with_a_plugin(outside: Outside) -> None:
    """With --plugin the same commands work; an export does not mention the package, nor need it."""
    plugin = ("--plugin", "my_parts")
    hf = outside.folder / "hf"
    opened = ("--checkpoint", outside.checkpoint)
    outside.tool("convert_checkpoint.py", *plugin, *opened, "--to", "hf", "--output", hf)
    config = json.loads((hf / "config.json").read_text())
    assert config["model_type"] == "qwen3_moe"
    scores = outside.folder / "scores.json"
    outside.tool("evaluate.py", *plugin, *opened, "--no-bigram", "--json", scores)
    assert 0 < json.loads(scores.read_text())["loss"] < 6
    for model in (outside.checkpoint, str(hf)):
        outside.tool(
            "generate.py",
            *plugin,
            "--model",
            model,
            "--prompt",
            "the router",
            "--max-new-tokens",
            "8",
        )
    before = outside.imports()
    outside.tool(
        "generate.py", "--model", str(hf), "--prompt", "the router", "--max-new-tokens", "8"
    )
    assert outside.imports() == before


BROKEN = {
    "raises": (
        "raise KeyError('no such table')",
        ["the plugin 'broken' cannot be imported: KeyError: 'no such table'", "broken.py:1"],
    ),
    "needs a package": (
        "import a_package_that_nobody_has",
        ["ModuleNotFoundError", "a_package_that_nobody_has"],
    ),
    "is no Python": ("def", ["the plugin 'broken' cannot be imported: SyntaxError"]),
    "ends the program": ("raise SystemExit(0)", ["the plugin 'broken' cannot be imported"]),
    "takes a kind's name": (
        (
            "from typing import Literal\nfrom pretrain.model.config import Norm\n"
            "class Mine(Norm):\n    kind: Literal['rms_norm']\n"
        ),
        ["'rms_norm'", "pretrain.model.config.RMSNormConfig and broken.Mine", "rename one"],
    ),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_plugin_that_cannot_be_used_is_one_sentence(outside: Outside, case: str) -> None:
    text, words = BROKEN[case]
    (outside.folder / "site" / "broken.py").write_text(text)
    started = outside.tool("analyze_model.py", "--recipe", "debug", "--plugin", "broken", code=2)
    assert "Traceback" not in started.stderr
    assert all(word in started.stderr for word in words), started.stderr


@pytest.mark.parametrize(
    "name,words",
    [
        ("nowhere.parts", ["'nowhere.parts' is not found", "PYTHONPATH", "current folder is not"]),
        ("./my_parts.py", ["is not a module's name", "not as a path"]),
    ],
)
def test_a_plugin_that_is_not_there_is_named(outside: Outside, name: str, words: list[str]) -> None:
    (outside.folder / "nowhere").mkdir()  # the current folder is not searched
    started = outside.tool("analyze_model.py", "--recipe", "debug", "--plugin", name, code=2)
    assert all(word in started.stderr for word in words), started.stderr


def test_an_override_may_name_a_plugin_and_an_option_is_saved(outside: Outside) -> None:
    router = ("--set", "model.moe.router={kind: sharp_topk}")
    for options in (("--set", "plugins=[my_parts]", *router), ("--plugin", "my_parts", *router)):
        outside.tool("analyze_model.py", "--recipe", "debug", *options)


def write_recipe(folder: Path, name: str, text: str) -> str:
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(text)
    return str(folder / name)


RECORDS = {
    "its own line": {"recipe.yaml": "base: debug\nplugins: [my_parts]\n"},
    "a file that it leads to": {
        "recipe.yaml": "base: notes.yaml\n",
        "notes.yaml": "base: debug\nplugins: [my_parts]\n",
    },
    "in an export of weights": {
        "recipe.yaml": "base: debug\nplugins: [my_parts]\n",
        "export.json": "{}",
    },
    "in a sweep's folder": {"base.yaml": "base: debug\nplugins: [my_parts]\n", "study.json": "{}"},
}


@pytest.mark.parametrize("case", RECORDS)
def test_a_recipe_that_was_saved_imports_nothing_whatever_is_next_to_it(
    outside: Outside, case: str
) -> None:
    paths = [write_recipe(outside.folder / "saved", *file) for file in RECORDS[case].items()]
    refused = outside.tool("analyze_model.py", "--recipe", paths[0], code=2)
    assert "give --plugin my_parts if you trust it" in refused.stderr
    assert outside.imports() == 0
    outside.tool("analyze_model.py", "--recipe", paths[0], "--plugin", "my_parts")
    assert outside.imports() == 1


def test_a_saved_recipe_names_no_task_files_that_may_run_code(outside: Outside) -> None:
    text = "base: debug\nevaluation: {tasks: [mine], include_path: tasks}\n"
    record = write_recipe(outside.folder / "saved", "recipe.yaml", text)
    refused = outside.tool("analyze_model.py", "--recipe", record, code=2)
    assert "evaluation.include_path" in refused.stderr and "if you trust it" in refused.stderr
    own = write_recipe(outside.folder / "saved", "mine.yaml", text)
    outside.tool("analyze_model.py", "--recipe", own)


def test_plugins_of_a_base_and_above_it_are_joined(outside: Outside) -> None:
    (outside.folder / "site" / "second.py").write_text("")
    write_recipe(outside.folder, "low.yaml", "base: debug\nplugins: [my_parts]\n")
    router = "model: {moe: {router: {kind: sharp_topk}}}"
    high = write_recipe(outside.folder, "high.yaml", f"base: low.yaml\nplugins: [second]\n{router}")
    outside.tool("analyze_model.py", "--recipe", high)
    text = write_recipe(outside.folder, "text.yaml", "base: debug\nplugins: my_parts\n")
    refused = outside.tool("analyze_model.py", "--recipe", text, "--plugin", "second", code=2)
    assert "'plugins'" in refused.stderr


def test_the_module_searches_the_current_folder_no_more_than_the_script(outside: Outside) -> None:
    (outside.folder / "here.py").write_text("print('imported from the current folder')")
    started = outside.start(
        *(sys.executable, "-m", "pretrain", "--recipe", "debug", "--plugin", "here"), code=2
    )
    assert "'here' is not found" in started.stderr and "imported" not in started.stdout


def test_a_derived_recipe_names_the_plugins_of_its_kinds(outside: Outside) -> None:
    program = """
from pretrain.config.load import load_recipe
from pretrain.core.plugins import load_plugins
from pretrain.merging.assembly import derived_recipe
load_plugins(["my_parts"])
plain = load_recipe("debug")
plain = plain.model_copy(update={"plugins": []})
made = derived_recipe(plain, "_mixed", ["model.moe.router={kind: sharp_topk}"])
assert made.plugins == ["my_parts"], made.plugins
"""
    outside.start(sys.executable, "-c", program)


@pytest.mark.parametrize(
    "kind,words",
    [
        ("spike", ["guards.more has the name of a built-in guard: 'spike'"]),
        ("of_this_name", []),
    ],
)
def test_a_guard_of_a_plugin_has_a_name_of_its_own(
    outside: Outside, kind: str, words: list[str]
) -> None:
    """Two classes of one name are two kinds."""
    for module, name in (("first", "one"), ("second", kind)):
        (outside.folder / "site" / f"{module}.py").write_text(
            "from typing import ClassVar, Literal\n"
            "from pretrain.config.guards import StepGuardConfig\n"
            f"class Limit(StepGuardConfig):\n    kind: Literal['{name}']\n"
            "    implementation: ClassVar[str] = 'builtins:object'\n"
        )
    more = f"guards.more=[{{kind: one}}, {{kind: {kind}}}]"
    plugins = ("--plugin", "first", "--plugin", "second")
    started = outside.tool(
        *("analyze_model.py", "--recipe", "debug", *plugins, "--set", more), code=2 if words else 0
    )
    assert all(word in started.stderr for word in words), started.stderr


LAYERS = """
from typing import ClassVar, Literal
from pretrain.model.moe.config import DroplessMoEConfig


class Together(DroplessMoEConfig):
    spreads_experts: ClassVar[bool] = False
    kind: Literal["together"]


class Forgetful(DroplessMoEConfig):
    tensor_roles: ClassVar[dict] = {
        name: role for name, role in DroplessMoEConfig.tensor_roles.items() if name != "experts."
    }
    kind: Literal["forgetful"]
"""


@pytest.mark.parametrize(
    "kind,ep_size,words",
    [
        ("together", 1, []),
        ("together", 2, ["parallel.ep_size is 2", "'together'", "set parallel.ep_size=1"]),
        ("forgetful", 1, ["Forgetful.role_of('experts.w1') is None", "layers.0", "tensor_roles"]),
    ],
)
def test_a_kind_of_layer_says_what_it_cannot_do_and_what_its_tensors_are(
    outside: Outside, kind: str, ep_size: int, words: list[str]
) -> None:
    (outside.folder / "site" / "layers.py").write_text(LAYERS)
    options = ("--set", f"model.moe.kind={kind}", "--set", f"parallel.ep_size={ep_size}")
    started = outside.tool(
        *("analyze_model.py", "--recipe", "debug", "--plugin", "layers", *options),
        code=2 if words else 0,
    )
    assert all(word in started.stderr for word in words), started.stderr
