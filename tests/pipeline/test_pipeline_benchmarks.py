"""Benchmarks in a recipe and on the command line: rows as questions, what is refused, a run that tells them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from pipeline_helpers import Place
from test_pipeline_formats import chats  # noqa: F401 - a fixture
from typer.testing import CliRunner

from fakes.children import children_here
from fakes.tiny_models import write_tiny_llama
from slmops.cli.app import app
from slmops.errors import DataError, RecipeError
from slmops.evaluate.measure import Measurement
from slmops.pipeline import prove, run_recipe
from slmops.pipeline.benchmarks import answer_among, question_of
from slmops.pipeline.judge import judge_by_benchmarks
from slmops.recipe import BenchmarkConfig, Recipe, load_recipe, parse_recipe, portable_recipe
from slmops.store import Store

HERE = Path("rows.jsonl")
PUBLIC: dict[str, dict[str, Any]] = {
    "boolq/train.jsonl": {
        "prompt": "{passage}\nQuestion: {question}? Answer yes or no.",
        "choices": {False: "no", True: "yes"},
    },
    "scitail/train.csv": {
        "prompt": "Premise: {premise}\nHypothesis: {hypothesis}\nDoes the one follow from the other?",
        "answer": "{label}",
        "choices": {"entailment": "yes", "not_entailment": "no"},
        "shots": 2,
    },
    "gsm8k/train.jsonl": {"kind": "text", "match": "number", "max_new_tokens": 8},
}
EVEN = {"name": "even", "prompt": "is {n} even", "choices": {False: "no", True: "yes"}, "answer": "{even}"}


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    lines = [json.dumps({"n": number, "even": number % 2 == 0}) for number in range(8)]
    (tmp_path / "even.jsonl").write_text("\n".join(lines))
    return tmp_path / "even.jsonl"


def question(row: dict[str, Any], **config: Any) -> tuple[str, str, tuple[str, ...]]:
    made = question_of(BenchmarkConfig(name="b", data="x", **config), row, 3, HERE)
    return made.prompt, made.answer, made.choices


def test_public_formats_become_questions() -> None:
    boolq = {"question": "q", "passage": "p", "answer": False}
    yes_no = {"prompt": "{passage}\n{question}?", "choices": {False: "no", True: "yes"}}
    assert question(boolq, **yes_no) == ("p\nq?", "no", ("no", "yes"))
    arc = {"question": "q", "choices": {"text": ["ice", "fire"], "label": ["A", "B"]}, "answerKey": "B"}
    columns = {"choices": "{choices.text}", "labels": "{choices.label}", "answer": "{answerKey}"}
    assert question(arc, **columns) == ("q", "fire", ("ice", "fire"))
    hellaswag = {"ctx": "c", "endings": ["one", "two", "three"], "label": "2"}
    ends = {"prompt": "{ctx}", "choices": "endings", "answer": "{label}"}
    assert question(hellaswag, **ends) == ("c", "three", ("one", "two", "three"))
    gsm8k = {"question": "6 * 7", "answer": "6 * 7 = 42\n#### 42"}
    assert question(gsm8k, kind="text", match="number") == ("6 * 7", "6 * 7 = 42\n#### 42", ())
    assert question({"question": "q", "choices": '["a", "b"]', "answer": "b"}, choices="choices")[1] == "b"


def test_an_answer_by_label_text_or_number() -> None:
    assert answer_among("B", ("x", "B"), ("B", "A")) == "x"  # a label before a text
    assert answer_among("x", ("x", "y"), ()) == "x"
    assert answer_among("1", ("x", "y"), ()) == "y"
    assert answer_among("2", ("x", "y"), ()) is None


def test_rows_that_are_no_questions_are_named() -> None:
    with pytest.raises(
        DataError, match=r"row 3: The answer 'maybe' of the benchmark b is none of its choices \(no, ye"
    ):
        question({"question": "q", "answer": "maybe"}, choices=("no", "yes"))
    with pytest.raises(
        RecipeError, match=r"holds no list of choices in row 3 of rows\.jsonl\. Columns there: question"
    ):
        question({"question": "q", "answer": "a"}, choices="options")
    with pytest.raises(
        RecipeError, match=r"in row 3 of rows\.jsonl column question is missing\. Columns there: prompt"
    ):
        question({"prompt": "q", "answer": "a"}, kind="text")


@pytest.mark.parametrize(
    ("evaluate", "gates", "said"),
    [
        ({"benchmarks": [{"name": "x"}]}, {}, "x needs either task or data"),
        ({"benchmarks": [{"name": "x", "data": "y.jsonl"}]}, {}, "x has no choices"),
        ({"benchmarks": ["arc_easy", "arc_easy"]}, {}, "two named arc_easy"),
        (
            {"benchmarks": ["arc_easy"]},
            {"benchmarks": {"boolq": ">= 1"}},
            "names boolq, and evaluate.benchmarks has arc",
        ),
    ],
)
def test_sections_that_mean_nothing(evaluate: dict[str, Any], gates: dict[str, Any], said: str) -> None:
    raw = {"name": "a", "task": "generation", "data": {"train": "a.csv"}, "evaluate": evaluate, "gates": gates}
    with pytest.raises(RecipeError, match=said):
        parse_recipe(raw)
    with pytest.raises(RecipeError, match="the answers of nli are labels"):
        parse_recipe({**raw, "task": "nli", "evaluate": {"benchmarks": ["arc_easy"]}, "gates": {}})


def test_files_are_looked_for_beside_the_recipe_and_do_not_leave_by_path(tmp_path: Path, rows: Path) -> None:
    (tmp_path / "even.yaml").write_text("data: even.jsonl\nprompt: is {n}\nchoices: {true: 'yes', false: 'no'}\n")
    (tmp_path / "theirs.yaml").write_text("task: theirs\ndataset_path: json\n")
    (tmp_path / "r.yaml").write_text(
        "name: a\ntask: generation\ndata: {train: a.csv}\n"
        "evaluate:\n  metrics: worth.py:f\n  benchmarks: [even.yaml, theirs.yaml, boolq]\n"
    )
    recipe = load_recipe(tmp_path / "r.yaml")
    even, theirs, boolq = recipe.evaluate.benchmarks
    assert (even.name, even.data, even.choices) == ("even", str(rows), {"true": "yes", "false": "no"})
    assert (theirs.name, theirs.task) == ("theirs", str(tmp_path / "theirs.yaml"))
    assert (boolq.name, boolq.task) == ("boolq", "boolq")
    assert str(tmp_path) not in json.dumps(portable_recipe(recipe)["evaluate"])


@pytest.mark.slow
def test_a_run_tells_published_teacher_and_student(
    chats: Callable[..., Recipe],  # noqa: F811
    rows: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    measured = Measurement({"p50": 1.0, "p95": 1.0}, 1.0, 9, 9, 9, 0.1, 1, 1, 1, (1.0,))
    # How long they take is measured elsewhere.
    monkeypatch.setattr(prove, "measure_interleaved", lambda models, **_: dict.fromkeys(models, measured))
    evaluate = {"benchmarks": [{**EVEN, "data": str(rows)}]}
    limits = {"benchmarks": {"even": ">= 0"}}
    recipe = chats(evaluate=evaluate, gates={**limits, "drift": {"converted": {"kl": None, "top1_agreement": None}}})
    with children_here(), Store.open(tmp_path / "store") as store:
        report = run_recipe(recipe, store).report
        folder = store.root / "runs" / "tiny-chat"
    found = report["benchmarks"]["even"]
    assert set(found["models"]) == {"published", "teacher-torch", "student-torch", "student-fp32"}
    assert all(one["rows"] == 8 for one in found["models"].values())
    assert found["models"]["student-torch"]["value"] == found["models"]["student-fp32"]["value"]
    assert set(found["tests"]) == {"published", "teacher-torch", "student-torch"}
    [gate] = [gate for gate in report["gates"] if gate["name"] == "benchmark even"]
    assert gate["passed"]
    page = (folder / "report.html").read_text("utf-8")
    assert "Beside the task: benchmarks" in page


@pytest.mark.slow
def test_a_model_is_asked_without_a_recipe(
    place: Place, rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "even.yaml").write_text(
        f'{json.dumps({**EVEN, "choices": {"false": "no", "true": "yes"}})[:-1]}, "data": "even.jsonl"}}'
    )
    command = ["evaluate", str(place.teacher), "--benchmark", "even.yaml", "--against", str(place.teacher)]
    done = CliRunner().invoke(app, [*command, "--json"], catch_exceptions=False)
    assert done.exit_code == 0
    found = json.loads(done.output.splitlines()[-1])["benchmarks"]["even"]
    assert found["models"]["model"] == found["models"]["before"]
    assert found["tests"]["before"]["difference"] == 0
    shown = CliRunner().invoke(app, command, catch_exceptions=False).output
    assert "even: accuracy" in shown
    assert "on 8 questions" in shown


@pytest.mark.shared_data
def test_real_rows_of_public_tasks(shared_data: Path, tmp_path: Path) -> None:
    write_tiny_llama(tmp_path / "model", context_tokens=8192)
    sections = [
        {"name": name.partition("/")[0], "data": str(shared_data / name), "rows": 4, **section}
        for name, section in PUBLIC.items()
    ]
    with Store.open(tmp_path / "store") as store:
        found = judge_by_benchmarks(sections, store, tmp_path / "model", offline=True).benchmarks
    figures = {name: (one["metric"], one["models"]["model"]["rows"]) for name, one in found.items()}
    assert figures == {"boolq": ("accuracy", 4), "scitail": ("accuracy", 4), "gsm8k": ("numeric_match", 4)}
    assert found["boolq"]["models"]["model"]["others"]["chance"] == 0.5
