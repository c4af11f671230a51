"""README and guide say what is true: their commands run, their recipes load, their links lead somewhere.

Every line of a ```console block is a command. Those of :data:`ONLY_PARSED` train or go on for ever: their verb and
options are parsed. All others are really run, one after the other in one folder where ``mydata.csv`` is, and, as if
``slmops run`` had been, ``.slmops/runs/mydata/bundle``.
"""

from __future__ import annotations

import re
import resource
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml
from typer.testing import CliRunner

from fakes.tiny_models import write_tiny_classifier
from slmops import sample
from slmops.artifacts import Bundle, Message, Variant, drafting
from slmops.artifacts.events import Answered, Feedback
from slmops.cli.app import app
from slmops.cli.render import show_error
from slmops.errors import RecipeError
from slmops.monitor.place import Place, open_recorder
from slmops.monitor.policy import load_policy
from slmops.package import build_bundle
from slmops.recipe import load_recipe, parse_recipe

ROOT = Path(__file__).resolve().parents[2]
TOLD = ("README.md", "docs/guide.md")
PAGES = sorted(
    path
    for path in (*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("examples/**/*.md"))
    if path.name != "CHANGELOG.md"
)
ONLY_PARSED = {"run", "train", "adapters", "improve", "demo", "serve", "deploy"}
DESIGNED_ORDER = [
    "init", "doctor", "data", "distill", "train", "compress", "evaluate", "bench", "package", "verify",
    "validate", "serve", "chat", "monitor", "feedback", "fleet", "device", "trace", "run", "demo", "console",
    "adapters", "keys", "deploy", "improve",
]  # fmt: skip
CPU_LIMIT_S = 0.3
COMMAND: Any = typer.main.get_command(app)


def blocks(text: str, language: str) -> list[str]:
    """Fenced blocks of one language ("": those that name none)."""
    found = re.findall(r"^```(\w*)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    return [content for name, content in found if name == language]


def commands(page: str) -> Iterator[list[str]]:
    for block in blocks((ROOT / page).read_text(), "console"):
        for line in block.splitlines():
            yield shlex.split(line, comments=True)


# --- commands ---------------------------------------------------------------------------------------------------


@pytest.fixture
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A person's folder: a file of rows, and the bundle of an earlier run."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("SLMOPS_STORE", raising=False)
    shutil.copyfile(sample.path(), "mydata.csv")
    with drafting("variant", Path("variant").resolve()) as draft:
        write_tiny_classifier(draft.path / "model")
    report: dict[str, Any] = {"name": "mydata", "metric": "accuracy", "student": {}, "verdict": "Made for a test."}
    with drafting("bundle", Path(".slmops/runs/mydata/bundle").resolve()) as draft:
        columns = {"train": "mydata.csv", "input": "{text}", "target": "{intent}"}
        recipe = {"name": "mydata", "task": "classification", "data": columns}
        variant = Variant.open(Path("variant"))
        build_bundle(
            variant=variant,
            report=report,
            recipe=recipe,
            licenses={"base-model": "A test's.\n"},
            lineage={},
            draft=draft,
        )
    record_answers(tmp_path)
    return tmp_path


def record_answers(folder: Path) -> None:
    """As if the bundle had been served with --monitor full, and somebody had said what an answer should have been."""
    bundle = folder / ".slmops/runs/mydata/bundle"
    place, policy = Place.of(folder / ".slmops"), load_policy("full")
    recorder = open_recorder(place, policy, model="mydata", version=Bundle.open(bundle).digest, bundle=bundle)
    for number in range(20):
        told = Answered(
            id=f"id-{number}",
            request_id=f"req-{number}",
            at=time.time(),
            kind="classify",
            model="mydata",
            status=200,
            latency_ms=2.0,
            label="refund",
            confidence=0.9,
            messages=(Message("user", f"where is my parcel number {number}?"),),
            output="refund",
            subject="ann" if number < 5 else "bob",
        )
        recorder.observe(lambda told=told: [told])  # type: ignore[misc]
    assert recorder.feedback(Feedback("id-7", time.time(), 0.0, "track_parcel"))
    recorder.close()
    (folder / "alerts.yaml").write_text("rules: [{metric: error_share, above: 0.02}]\n")


@pytest.mark.parametrize("page", TOLD)
def test_its_commands_run(page: str, workplace: Path) -> None:
    ran = []
    for program, *arguments in commands(page):
        assert program == "slmops"
        if arguments[0] in ONLY_PARSED and "--help" not in arguments:
            verb = COMMAND.commands[arguments[0]]
            verb.make_context(arguments[0], arguments[1:])  # raises for an unknown option or a missing argument
            continue
        result = CliRunner().invoke(app, arguments, input="where is my parcel?", catch_exceptions=False)
        assert result.exit_code == 0, f"{arguments}: {result.output}"
        assert result.output
        ran.append(arguments[0])
    assert {"init", "data", "verify", "chat", "trace"} <= set(ran)


def test_the_recipe_that_init_writes_is_the_one_that_data_reads(workplace: Path) -> None:
    CliRunner().invoke(app, ["init", "mydata.csv"], catch_exceptions=False)
    recipe = load_recipe("recipe.yaml")
    assert (recipe.name, recipe.data.input, recipe.data.target) == ("mydata", "{text}", "{intent}")
    assert Path(recipe.data.train) == workplace / "mydata.csv"


@pytest.mark.parametrize("page", [str(path.relative_to(ROOT)) for path in PAGES])
def test_plain_blocks_name_verbs_options_targets_and_files_that_exist(page: str) -> None:
    for line in "\n".join(blocks((ROOT / page).read_text(), "")).splitlines():
        words = shlex.split(line, comments=True) if line.startswith(("slmops ", "make ")) else []
        if words[:1] == ["make"]:
            assert re.search(rf"^{words[1]}:", (ROOT / "Makefile").read_text(), re.MULTILINE), line
        elif words:
            COMMAND.commands[words[1]].make_context(words[1], words[2:])
            if words[2].startswith("examples/"):
                assert (ROOT / words[2]).is_file(), line


# --- what is said of the command line ---------------------------------------------------------------------------


def test_verbs_stand_in_the_order_of_a_models_life() -> None:
    shown = CliRunner().invoke(app, ["--help"]).output.partition("Commands:")[2]
    verbs = re.findall(r"^  (\w+) ", shown, re.MULTILINE)
    assert verbs == [verb for verb in DESIGNED_ORDER if verb in COMMAND.commands]
    assert set(verbs) == set(COMMAND.commands)
    assert "..." not in shown  # every verb is told in one line
    told = re.findall(r"^\| `slmops (\w+)` \|", (ROOT / "README.md").read_text(), re.MULTILINE)
    assert told == verbs


def test_every_verb_has_help() -> None:
    for verb in COMMAND.commands:
        result = CliRunner().invoke(app, [verb, "--help"])
        assert result.exit_code == 0
        assert len(result.output.splitlines()) >= 8


def test_help_is_quick() -> None:
    """Processor time, which is what a busy machine leaves alone; the best of three, since the first reads the disk."""
    spent_s = []
    for _ in range(3):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run([sys.executable, "-m", "slmops", "--help"], check=True, stdout=subprocess.DEVNULL)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        spent_s.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    assert min(spent_s) < CPU_LIMIT_S


# --- recipes, errors, links -------------------------------------------------------------------------------------


@pytest.mark.parametrize("page", TOLD)
def test_its_recipes_load(page: str) -> None:
    found = blocks((ROOT / page).read_text(), "yaml")
    assert found
    for block in found:
        raw = yaml.safe_load(block)
        whole = {"name": "a", "task": "classification", "data": {"train": "a.csv"}, **raw}
        assert parse_recipe(whole).name


def test_the_error_that_the_guide_shows_is_the_one_that_is_shown(
    workplace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shown = next(block for block in blocks((ROOT / "docs/guide.md").read_text(), "") if block.startswith("error:"))
    line = int(re.findall(r"recipe\.yaml:(\d+)", shown)[0])
    text = "name: a\ntask: classification\ndata: {train: mydata.csv}\nteacher:\n"
    text += "\n" * (line - 1 - text.count("\n")) + "  temprature: 1\n"
    Path("recipe.yaml").write_text(text)
    with pytest.raises(RecipeError) as caught:
        load_recipe("recipe.yaml")
    show_error(caught.value)
    assert capsys.readouterr().err == shown


@pytest.mark.parametrize("page", [str(path.relative_to(ROOT)) for path in PAGES])
def test_its_links_lead_somewhere(page: str) -> None:
    text = (ROOT / page).read_text()
    headings = {_anchor(line) for line in re.findall(r"^#+ (.+)$", text, re.MULTILINE)}
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if target.startswith("#"):
            assert target[1:] in headings, target
        elif not target.startswith(("http://", "https://")):
            assert ((ROOT / page).parent / target.partition("#")[0]).exists(), target


def _anchor(heading: str) -> str:
    return re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-")


def test_readme_lists_the_folders_that_are_there() -> None:
    block = next(b for b in blocks((ROOT / "README.md").read_text(), "") if b.startswith("src/slmops/"))
    listed = re.findall(r"^  (\w+)[/.]", block, re.MULTILINE)
    there = {
        path.stem
        for path in (ROOT / "src/slmops").iterdir()
        if not path.name.startswith("_") and path.suffix in {"", ".py"}
    }
    assert set(listed) == there - {"progress"}
