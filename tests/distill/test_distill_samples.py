"""Reasoning, structured output, several samples, languages, near-duplicates, the judge: decisions and whole stages."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from distill_helpers import config, lines, make_dataset, make_draft, row

from fakes.teacher_server import Reply, TeacherServer
from slmops.artifacts import Message, Row
from slmops.distill import OpenAITeacher, ask_teacher, check_remote_allowed, leaves_machine
from slmops.distill.agreement import agree, token_f1, vote_key
from slmops.distill.checks import Verdict, announced_answer, check_answer, check_schema
from slmops.distill.diversity import balance, diversity
from slmops.distill.judge import judge_config, judge_request, read_score
from slmops.distill.language import check_language, is_other_language
from slmops.distill.prompts import reasoning_of, response_format, teacher_messages, teacher_request
from slmops.errors import PrivacyError, RecipeError, TeacherError
from slmops.recipe import JudgeConfig, TeacherConfig

LABELS = ("entailment", "neutral", "contradiction")


def ok(text: str) -> Verdict:
    return Verdict(True, None, text)


BAD = Verdict(False, "empty", None)


# --- reasoning and structured output


def test_reasoning_by_task() -> None:
    assert [reasoning_of(task, None) for task in ("math", "nli", "qa", "classification")] == [  # type: ignore[arg-type]
        "keep", "strip", "none", "none",
    ]  # fmt: skip
    assert reasoning_of("nli", "keep") == "strip", "a label is learned without its reasons"
    assert reasoning_of("math", "none") == "none"
    shown = teacher_messages("nli", LABELS, row(0), None, "strip")[0].content
    assert "Reason" in shown
    assert "'Answer: '" in shown
    assert "<think>" in teacher_messages("qa", None, row(0), None, "strip")[0].content


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("The first says nothing of it; it is not a contradiction.\nAnswer: neutral", "neutral"),
        ("Because.\n**Final answer:** entailment.", "entailment."),
        ('{"reasoning": "It looks neutral, but no.", "answer": "contradiction"}', "contradiction"),
        ('```json\n{"answer": "neutral"}\n```', "neutral"),
        ("neutral", "neutral"),
        ('{"answer": 3}', '{"answer": 3}'),
        ("Answer: neutral\nor so", "Answer: neutral\nor so"),
    ],
)
def test_announced_answer(text: str, answer: str) -> None:
    assert announced_answer(text) == answer


def test_a_reasoned_label_is_read_from_its_end() -> None:
    text = "Entailment would need a cat; neutral is wrong too.\nAnswer: contradiction"
    assert check_answer("nli", LABELS, row(0), text, "stop").normalized == "contradiction"


def test_math_steps_are_kept_or_stripped() -> None:
    gold = row(0, "6*7?", "#### 42")
    text = "Six times seven is 42.\n#### 42"
    assert check_answer("math", None, gold, text, "stop").normalized == text
    assert check_answer("math", None, gold, text, "stop", keep_steps=False).normalized == "#### 42"


def test_response_formats() -> None:
    labels = response_format("nli", LABELS, "strip", None)
    assert labels is not None
    schema = labels["json_schema"]["schema"]
    assert [*schema["properties"]] == ["reasoning", "answer"], "reasons come before what follows from them"
    assert schema["properties"]["answer"]["enum"] == list(LABELS)
    assert schema["additionalProperties"] is False
    assert response_format("extraction", None, "none", None) == {"type": "json_object"}
    assert response_format("qa", None, "none", None) is None
    off = config("http://127.0.0.1:9", structured=False)
    assert teacher_request("nli", LABELS, row(0), off).response_format is None
    local = TeacherConfig(model="some/folder", adapt=False)
    assert teacher_request("nli", LABELS, row(0), local).response_format is None


def test_extraction_is_held_to_its_schema(tmp_path: Path) -> None:
    schema = {"type": "object", "properties": {"people": {"type": "integer"}}, "required": ["people"]}
    check = lambda text: check_answer("extraction", None, row(0), text, "stop", schema=schema).reason  # noqa: E731
    assert check('{"people": 3}') is None
    assert check('{"people": "three"}') == check('{"time": "8pm"}') == "not_in_schema"
    with pytest.raises(RecipeError, match="not a JSON Schema"):
        check_schema({"type": "nonsense"})
    dataset, draft = make_dataset(tmp_path, [row(i) for i in range(4)]), make_draft(tmp_path)
    with TeacherServer(lambda prompt, before: Reply('{"people": 2}' if prompt[-1] != "1" else "{}")) as server:
        teacher = config(server.url, answer_schema=schema)
        ask_teacher(dataset, "extraction", teacher, OpenAITeacher(teacher), draft)
        assert server.bodies[0]["response_format"]["json_schema"]["schema"] == schema
    assert draft.metrics["teacher"]["rejected"] == {"not_in_schema": 1}


def test_structured_output_falls_back_where_it_is_refused(tmp_path: Path) -> None:
    rows = [row(i, f"premise {i}", LABELS[i % 3]) for i in range(30)]
    dataset, draft = make_dataset(tmp_path, rows, labels=LABELS), make_draft(tmp_path)

    def script(prompt: str, before: int) -> Reply:
        return Reply(f"Well.\nAnswer: {LABELS[int(prompt.split()[1]) % 3]}")

    with TeacherServer(script, refuses_format=True) as server:
        teacher = config(server.url, concurrency=2)
        ask_teacher(dataset, "nli", teacher, OpenAITeacher(teacher), draft)
        structured = ["response_format" in body for body in server.bodies]
    assert draft.metrics["teacher"]["accepted"] == 30
    assert 1 <= sum(structured) <= 2, "refused once, only what was on its way beside it is refused too"
    keys = {header["idempotency-key"] for header in server.headers}
    assert len(keys) == 30, "the same request has the same key, however often it is tried"


def test_a_cut_by_a_filter_is_truncated(tmp_path: Path) -> None:
    dataset, draft = make_dataset(tmp_path, [row(0)]), make_draft(tmp_path)
    with TeacherServer(lambda prompt, before: Reply("half of an", finish_reason="content_filter")) as server:
        teacher = config(server.url)
        ask_teacher(dataset, "qa", teacher, OpenAITeacher(teacher), draft)
    assert draft.metrics["teacher"]["rejected"] == {"truncated": 1}


# --- agreement


def test_majority_of_labels_and_numbers() -> None:
    found = agree("nli", [ok("neutral"), ok("entailment"), BAD, ok("entailment")])
    assert (found.chosen, found.share, found.votes) == (1, 0.5, {"neutral": 1, "entailment": 2})
    numbers = agree("math", [ok("so\n#### 1/3"), ok("#### 4"), ok("about\n#### 0.3333333")])
    assert (numbers.chosen, numbers.share) == (0, pytest.approx(2 / 3))
    tie = agree("nli", [ok("neutral"), ok("entailment")])
    assert (tie.chosen, tie.share) == (0, 0.5)
    assert agree("nli", [BAD, BAD]).chosen is None
    assert vote_key("extraction", '{"b": 1, "a": 2}') == vote_key("extraction", '{"a": 2, "b": 1}')


def test_the_medoid_of_free_text_against_a_plain_reference() -> None:
    texts = ["it comes on monday", "it comes on a monday", "no idea at all", "it comes monday"]
    found = agree("qa", [*map(ok, texts), BAD])

    def f1(left: str, right: str) -> float:
        a, b = left.split(), right.split()
        shared = sum(min(a.count(word), b.count(word)) for word in {*a, *b})
        return 2 * shared / (len(a) + len(b))

    mean = [sum(f1(one, other) for at, other in enumerate(texts) if at != index) / 3 for index, one in enumerate(texts)]
    assert found.chosen == int(np.argmax(mean))
    assert found.share == pytest.approx(max(mean) * 3 / 4), "an answer that cannot be read agrees with nobody"
    from collections import Counter

    assert token_f1(Counter(), Counter()) == 1.0


def test_samples_become_confidence_and_soft_labels(tmp_path: Path) -> None:
    rows = [row(i, f"premise {i}", "neutral" if i == 0 else None) for i in range(4)]
    dataset, draft = make_dataset(tmp_path, rows, labels=LABELS), make_draft(tmp_path)
    votes = {
        "premise 0": ["entailment", "neutral", "neutral", "neutral"],
        "premise 1": ["entailment"] * 4,
        "premise 2": ["entailment", "neutral", "contradiction", "?"],
        "premise 3": ["?"] * 4,
    }
    with TeacherServer(lambda prompt, before: Reply(votes[prompt][before])) as server:
        teacher = config(server.url, samples=4, temperature=0.7, concurrency=1, structured=False)
        ask_teacher(dataset, "nli", teacher, OpenAITeacher(teacher), draft)
        assert server.asked.total() == 16
        assert {body["seed"] for body in server.bodies} == {1, 2, 3, 4}
        more = config(server.url, samples=2, temperature=0.7, structured=False)
        ask_teacher(dataset, "nli", more, OpenAITeacher(more), make_draft(tmp_path / "b"), journal_folder=draft.work)
        assert server.asked.total() == 16, "fewer samples are among those that are known"
    kept = {one["id"]: one for one in lines(draft.path / "train.jsonl")}
    assert {name: one["target"] for name, one in kept.items()} == {"r0": "neutral", "r1": "entailment"}
    assert kept["r0"]["meta"]["confidence"] == 0.75
    told = {one["id"]: one for one in lines(draft.path / "teacher.jsonl")}
    assert told["r2"]["reason"] == "low_agreement"
    assert told["r2"]["agreement"] == 0.25
    assert told["r3"]["reason"] == "not_a_label"
    assert told["r1"]["prompt_tokens"] == 80, "of all samples"
    logs = np.load(draft.path / "teacher_train.npy")
    np.testing.assert_allclose(np.exp(logs).sum(axis=1), 1, atol=1e-6)
    expected = [0.05 + 0.85 * share for share in (0.25, 0.75, 0.0)]
    np.testing.assert_allclose(np.exp(logs[0]), expected, atol=1e-6)
    summary = json.loads((draft.path / "summary.json").read_text())["teacher"]
    assert summary["agreement"]["unanimous"] == 1
    assert summary["balance"]["labels"] == {"entailment": 1, "neutral": 1, "contradiction": 0}
    assert summary["balance"]["missing"] == ["contradiction"]


# --- language, repeats, diversity


def test_languages() -> None:
    german = "Das Paket liegt seit gestern in der Filiale und kann dort abgeholt werden."
    english = "The parcel has been at the branch since yesterday and can be fetched there."
    assert is_other_language(german, "en", "")
    assert not is_other_language(english, "en", "")
    assert is_other_language(german, "auto", "Where has my parcel been since yesterday, and who has it?")
    assert not is_other_language("Ja, gern.", "en", ""), "too short to be sure"
    assert not is_other_language(german, "auto", "Paket?"), "nothing to compare with"
    check_language("auto")
    with pytest.raises(RecipeError, match="'qq'"):
        check_language("qq")


def test_wrong_language_is_quarantined(tmp_path: Path) -> None:
    dataset, draft = make_dataset(tmp_path, [row(0), row(1)]), make_draft(tmp_path)
    answers = [
        "The parcel will be with you on Monday morning.",
        "Das Paket wird am Montag bei Ihnen eintreffen, sicher.",
    ]
    with TeacherServer(lambda prompt, before: Reply(answers[int(prompt[-1])])) as server:
        teacher = config(server.url, language="en")
        ask_teacher(dataset, "qa", teacher, OpenAITeacher(teacher), draft)
    quarantine = lines(draft.path / "quarantine.jsonl")
    assert [(one["row"]["id"], one["reason"]) for one in quarantine[1:]] == [("r1", "wrong_language")]


def exactly(texts: Sequence[str], known: Sequence[str], threshold: float) -> list[bool]:
    """A plain stand-in for the data stage's service."""
    seen, result = {*known}, []
    for text in texts:
        result.append(text in seen)
        seen.add(text)
    return result


def test_repeated_answers_to_different_prompts(tmp_path: Path) -> None:
    rows = [row(0), row(1), row(2), row(3, "question 0")]
    dataset, draft = make_dataset(tmp_path, rows), make_draft(tmp_path)
    with TeacherServer(lambda prompt, before: Reply("x" if prompt[-1] == "2" else "the same to all")) as server:
        teacher = config(server.url, near_duplicates=0.9)
        with pytest.raises(ValueError, match="repeats"):
            ask_teacher(dataset, "qa", teacher, OpenAITeacher(teacher), draft)
        ask_teacher(dataset, "qa", teacher, OpenAITeacher(teacher), draft, repeats=exactly)
    told = {one["id"]: one["reason"] for one in lines(draft.path / "teacher.jsonl")}
    assert told == {"r0": None, "r1": "near_duplicate", "r2": None, "r3": None}, "the same question may be asked twice"


def test_balance_and_diversity() -> None:
    assert balance(["a", "a", "b", "b"], ("a", "b"))["evenness"] == 1.0
    assert balance(["a"], ("a", "b")) == {"labels": {"a": 1, "b": 0}, "evenness": 0.0, "missing": ["b"]}
    entropy = -(0.75 * math.log(0.75) + 0.25 * math.log(0.25)) / math.log(2)
    assert balance(["a", "a", "a", "b"], ("a", "b"))["evenness"] == pytest.approx(entropy, abs=1e-4)
    found = diversity(["a b a b", "A  b a b", "c"])
    assert (found["texts"], found["distinct_texts"]) == (3, 2)
    assert found["distinct_1"] == pytest.approx(3 / 9, abs=1e-4)
    assert found["distinct_2"] == pytest.approx(2 / 6, abs=1e-4)
    assert diversity([])["texts"] == 0


# --- the judge


@pytest.mark.parametrize(
    ("text", "score"),
    [
        ('{"reason": "fine", "score": 4}', 4),
        ('{"score": "3"}', 3),
        ('{"score": 5.0}', 5),
        ("<think>hm</think>Score: 2", 2),
        ("I would say: score 4/5", 4),
        ("3", 3),
        ('{"score": 7}', None),
        ('{"score": true}', None),
        ('{"score": 3.5}', None),
        ('{"score": NaN}', None),
        ("score 2 or score 3", None),
        ("good", None),
    ],
)
def test_scores_are_read(text: str, score: int | None) -> None:
    assert read_score(text) == score


def test_the_judge_gets_no_foreign_key_and_is_held_to_privacy(monkeypatch: pytest.MonkeyPatch) -> None:
    teacher = config("http://127.0.0.1:9/v1", api_key_env="TEACHER_KEY", judge=JudgeConfig(model="openai:j"))
    same = judge_config(teacher)
    assert same is not None
    assert (same.model, same.base_url, same.api_key_env) == ("openai:j", teacher.base_url, "TEACHER_KEY")
    assert not leaves_machine(teacher)
    away = teacher.model_copy(update={"judge": JudgeConfig(model="openai:j", base_url="https://judge.example/v1")})
    other = judge_config(away)
    assert other is not None
    assert other.api_key_env is None
    assert leaves_machine(away)
    with pytest.raises(PrivacyError, match=r"judge\.example"):
        check_remote_allowed(away, "local")
    check_remote_allowed(away, "remote")
    shown = judge_request(JudgeConfig(), "qa", row(0, "why?", "gold"), "because").messages[1].content
    for part in ("why?", "<reference>\ngold", "<answer>\nbecause"):
        assert part in shown


def test_the_judge_quarantines_what_it_finds_bad(tmp_path: Path) -> None:
    rows = [row(i) for i in range(4)]
    dataset, draft = make_dataset(tmp_path, rows), make_draft(tmp_path)
    scores = {
        "0": '{"reason": "r", "score": 5}',
        "1": '{"reason": "r", "score": 2}',
        "2": "no idea",
        "3": '{"score": 4}',
    }

    def script(prompt: str, before: int) -> Reply:
        if "<answer>" in prompt:
            return Reply(scores[prompt.split("question ")[1][0]])
        return Reply(f"re {prompt}")

    with TeacherServer(script) as server:
        teacher = config(server.url, judge=JudgeConfig(min_score=4))
        ask_teacher(dataset, "qa", teacher, OpenAITeacher(teacher), draft)
        assert server.asked.total() == 8
        ask_teacher(dataset, "qa", teacher, OpenAITeacher(teacher), draft)
        assert server.asked.total() == 8, "a judgement is kept like any answer"
    told = {one["id"]: (one["reason"], one.get("judge_score")) for one in lines(draft.path / "teacher.jsonl")}
    assert told == {"r0": (None, 5), "r1": ("low_judge_score", 2), "r2": ("not_judged", None), "r3": (None, 4)}
    assert draft.metrics["teacher"]["judge_scores"] == {"2": 1, "4": 1, "5": 1}
    strict = config(server.url, judge=JudgeConfig(min_score=5), min_success_ratio=0.9)
    with TeacherServer(script, port=server.port), pytest.raises(TeacherError, match="2 low judge score") as caught:
        ask_teacher(dataset, "qa", strict, OpenAITeacher(strict), draft)
    assert "rubric" in (caught.value.remedy or "")


# --- new prompts


def writer(texts_of: Callable[[str], list[str]]) -> Callable[[str, int], Reply]:
    def script(prompt: str, before: int) -> Reply:
        if prompt.startswith("<text>"):
            return Reply(json.dumps({"texts": texts_of(prompt.split("\n")[1])}))
        return Reply("refund" if "money" in prompt else "lost_card")

    return script


def test_new_prompts_fill_up_labels_and_never_repeat_the_test_split(tmp_path: Path) -> None:
    labels = ("lost_card", "refund")
    rows = [row(i, f"my card {i} is lost", "lost_card") for i in range(6)] + [row(9, "give my money back", "refund")]
    test = [row(99, "money back please", "refund")]
    dataset, draft = make_dataset(tmp_path, rows, test=test, labels=labels), make_draft(tmp_path)
    written = [
        "money back please",  # stands in the test split
        "I want my money again",
        "return the money",
        "give my money back",  # the seed itself
        "the card is gone",  # not what was asked for
    ]
    numbers = iter(range(1000))

    def texts_of(seed: str) -> list[str]:
        assert seed == "give my money back", "a label with enough rows gets none"
        return [*written, f"money {next(numbers)} money"]

    with TeacherServer(writer(texts_of)) as server:
        raw: dict[str, Any] = {"per_label": 5, "texts_each": 6}
        teacher = config(server.url, new_prompts=raw, structured=False, concurrency=1)
        ask_teacher(dataset, "classification", teacher, OpenAITeacher(teacher), draft, repeats=exactly, seed=3)
        assert server.asked["money back please"] == 0
        first = (draft.path / "train.jsonl").read_bytes()
        asked = server.asked.total()
        again = make_draft(tmp_path / "again")
        ask_teacher(
            dataset, "classification", teacher, OpenAITeacher(teacher), again,
            repeats=exactly, seed=3, journal_folder=draft.work,
        )  # fmt: skip
        assert server.asked.total() == asked
        assert (again.path / "train.jsonl").read_bytes() == first
    kept = [one for one in lines(draft.path / "train.jsonl") if "new" in one["meta"]]
    texts = {one["messages"][0]["content"] for one in kept}
    assert texts <= {"I want my money again", "return the money", "money 0 money", "money 1 money"}
    assert len(kept) == 3, "four were lacking, one of those was answered otherwise than it was meant"
    assert {one["target"] for one in kept} == {"refund"}
    assert {one["meta"]["seed"] for one in kept} == {"r9"}
    summary = draft.metrics["teacher"]
    assert summary["asked"] == 7, "new rows do not count for the share of good answers"
    assert summary["new_prompts"]["kept"] == 4
    assert summary["new_prompts"]["rejected"] == {"disagrees_with_seed": 1}
    assert summary["new_prompts"]["near_duplicate"] >= 2
    assert summary["balance"]["labels"] == {"lost_card": 6, "refund": 4}
    assert np.load(draft.path / "teacher_train.npy").shape == (10, 2)


def test_new_prompts_of_an_open_task_keep_the_conversation(tmp_path: Path) -> None:
    chat = Row(
        "c", (Message("user", "hello"), Message("assistant", "hi"), Message("user", "where is it")), "it is there", {}
    )
    dataset, draft = make_dataset(tmp_path, [chat]), make_draft(tmp_path)
    junk = ["", "   ", "x" * 2000, "I'm sorry, but I can't help with that."]

    def script(prompt: str, before: int) -> Reply:
        if prompt.startswith("<text>"):
            return Reply(json.dumps({"texts": [*junk, "tell me where it may be"]}))
        return Reply(f"re {prompt}")

    with TeacherServer(script) as server:
        teacher = config(server.url, new_prompts={"rows": 3, "texts_each": 8})
        ask_teacher(dataset, "conversation", teacher, OpenAITeacher(teacher), draft, repeats=exactly)
    old, new = lines(draft.path / "train.jsonl")
    assert old["id"] == "c"
    assert [message["content"] for message in new["messages"]] == ["hello", "hi", "tell me where it may be"]
    assert new["target"] == "re tell me where it may be"
    assert draft.metrics["teacher"]["new_prompts"]["missing"] == 2, "the run goes on with what came"


def test_a_teacher_that_cannot_write_lists_costs_no_run(tmp_path: Path) -> None:
    dataset, draft = make_dataset(tmp_path, [row(0)]), make_draft(tmp_path)
    with TeacherServer(lambda prompt, before: Reply("1. one 2. two")) as server:
        teacher = config(server.url, new_prompts={"rows": 3})
        ask_teacher(dataset, "qa", teacher, OpenAITeacher(teacher), draft, repeats=exactly)
    assert draft.metrics["teacher"]["new_prompts"]["unreadable"] == 1
    assert len(lines(draft.path / "train.jsonl")) == 1
