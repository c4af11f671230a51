"""``slmops distill``: the first part of a run alone, and what it would cost."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from pipeline_helpers import Place
from typer.testing import CliRunner

import slmops.pipeline.context as context_module
from fakes.teacher_server import Reply, TeacherServer
from slmops.cli.app import app
from slmops.pipeline import distill_recipe, estimate_recipe
from slmops.pipeline.context import Context
from slmops.pipeline.teach import ask_for_answers, prepare_data
from slmops.progress import ignore
from slmops.recipe import parse_recipe
from slmops.store import Store

WORDS = ("balance", "lost", "refund")


def label_of(prompt: str, before: int) -> Reply:
    if prompt.startswith("<text>"):
        words = prompt.split("\n")[1].split()
        return Reply(json.dumps({"texts": [f"{' '.join(words[::-1])} {extra}" for extra in ("please", "now", "then")]}))
    return Reply(next((word for word in WORDS if word in prompt.split()), "?"))


@pytest.fixture(autouse=True)
def no_model(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(context_module, "DEFAULT_BASE", "/nowhere/that/exists")


def raw(place: Place, url: str, **teacher: Any) -> dict[str, Any]:
    told = {"base_url": url, "concurrency": 4, "retries": 0, "model": "openai:fake", **teacher}
    return {**place.raw(), "teacher": told}


def test_other_limits_do_no_work_again_and_another_model_does(place: Place, tmp_path: Path) -> None:
    with TeacherServer(label_of) as server, Store.open(tmp_path) as store:
        answers, reused = distill_recipe(parse_recipe(raw(place, server.url)), store)
        assert not reused
        asked = server.asked.total()
        prices = {"input_per_million": 1.0, "output_per_million": 2.0}
        means = {"concurrency": 2, "budget_tokens": 10**9, "prices": prices, "timeout_s": 9, "time_limit_s": 99}
        same, reused = distill_recipe(parse_recipe(raw(place, server.url, **means)), store)
        assert reused
        assert same.digest == answers.digest
        assert server.asked.total() == asked
        distill_recipe(parse_recipe(raw(place, server.url, model="openai:other")), store)
        assert server.asked.total() == 2 * asked, "another model's answers are other answers"
    assert answers.summary["teacher"]["balance"]["evenness"] > 0.9


def test_a_dry_run_asks_nobody_and_fetches_no_model(place: Place, tmp_path: Path) -> None:
    with TeacherServer(label_of) as server, Store.open(tmp_path) as store:
        prices = {"input_per_million": 1.0, "output_per_million": 2.0, "currency": "EUR"}
        recipe = parse_recipe(raw(place, server.url, prices=prices))
        before = estimate_recipe(recipe, store)
        assert before is not None
        assert server.asked.total() == 0
        distill_recipe(recipe, store)
        after = estimate_recipe(recipe, store)
        assert after is not None
        assert before.requests == server.asked.total() == after.known
        assert (after.requests, after.money) == (0, 0.0)
        local = parse_recipe({**place.raw(), "teacher": {"model": "/nowhere/that/exists"}})
        assert estimate_recipe(local, store) is None


def test_new_prompts_are_compared_by_the_data_stage(place: Place, tmp_path: Path) -> None:
    with TeacherServer(label_of) as server, Store.open(tmp_path) as store:
        wanted = {"per_label": 30, "texts_each": 3, "kinds": ["paraphrase"], "near_duplicates": 0.95}
        context = Context(parse_recipe(raw(place, server.url, new_prompts=wanted)), store, False, ignore)
        data = prepare_data(context)
        answers = ask_for_answers(context, data, None)
    new = [row for row in answers.rows("train") if "new" in row.meta]
    assert new
    test = {row.text for row in data.rows("test")}
    assert not test & {row.text for row in new}
    assert all(row.target == row.meta["seed_label"] for row in new)
    assert answers.summary["teacher"]["new_prompts"]["kept"] == len(new)


def test_the_verb(place: Place, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    with TeacherServer(label_of) as server:
        recipe.write_text(yaml.safe_dump(raw(place, server.url, prices="prices.yaml", budget_money=1e-9)))
        (tmp_path / "prices.yaml").write_text("fake: {input_per_million: 1, output_per_million: 2, currency: EUR}\n")

        def call(*arguments: str) -> str:
            command = ["distill", str(recipe), "--store", str(tmp_path / "store"), *arguments]
            result = CliRunner().invoke(app, command, catch_exceptions=False)
            assert result.exit_code == 0, result.output
            return result.stdout

        shown = call("--dry-run")
        for part in ("requests to ask", "Tokens in", "Money:", "EUR", "Time:", "may not fit"):
            assert part in shown
        assert server.asked.total() == 0
        told = json.loads(call("--dry-run", "--json").splitlines()[-1])
        assert told["estimate"]["requests"] > 0
        more = ("--set", "teacher.budget_money=100")
        done = json.loads(call(*more, "--json").splitlines()[-1])
        assert done["summary"]["spent"]["currency"] == "EUR"
        assert "good (100.0%)" in call(*more)
        assert Path(done["path"]).is_dir()
