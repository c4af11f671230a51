"""Benchmarks in our own forms, and tasks of lm-evaluation-harness, asked of a generator that knows some answers."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path

import numpy as np
import pytest

from fakes.knowing_generator import KnowingGenerator
from slmops.errors import DataError, ModelError, RecipeError
from slmops.evaluate.benchmarks import Benchmark, BenchmarkScore, Question, conversation, run_benchmarks
from slmops.progress import Progress

YES, NO = ("yes", "no"), ("no", "yes")
QUESTIONS = (Question("is 2 even", "yes", YES), Question("is 3 even", "no", NO), Question("is 4 even", "yes", YES))


def test_choices_by_likelihood() -> None:
    """The second one is got wrong: nobody knows it, and the shorter text is likelier."""
    knows = KnowingGenerator({"is 2 even": "yes", "is 3 even": "yes", "is 4 even": "yes"})
    events: list[Progress] = []
    [score] = run_benchmarks(knows, [Benchmark("even", "choice", QUESTIONS)], progress=events.append).values()
    assert score.metric == "accuracy"
    assert score.per_row.tolist() == [1, 0, 1]
    assert score.value == pytest.approx(2 / 3)
    assert score.others["chance"] == 0.5
    assert score.ci95[0] <= score.value <= score.ci95[1]
    assert events[-1] == Progress("even", 6, 6)


def test_by_byte_a_long_answer_is_not_at_a_loss() -> None:
    class Lengthy(KnowingGenerator):
        def score(self, conversations):  # type: ignore[no-untyped-def]
            found = super().score(conversations)
            return [type(one)(-2.0 if one.bytes == 1 else -3.0, 1, one.bytes) for one in found]

    question = Question("which", "a long answer", ("x", "a long answer"))
    [score] = run_benchmarks(Lengthy({}), [Benchmark("length", "choice", (question,))]).values()
    assert score.value == 0
    assert score.others["accuracy_by_byte"] == 1


def test_solved_examples_are_turns_before_the_question() -> None:
    turns = conversation(QUESTIONS[1], QUESTIONS[:1])
    assert [(turn.role, turn.content) for turn in turns] == [
        ("user", "is 2 even"),
        ("assistant", "yes"),
        ("user", "is 3 even"),
    ]


def test_written_answers_by_word_and_by_number() -> None:
    knows = KnowingGenerator({"6 * 7": "It is 6 * 7 = 42. #### 42.0", "capital": "paris."})
    asked = [
        Benchmark("sums", "text", (Question("6 * 7", "#### 42"), Question("1 + 1", "#### 2")), match="number"),
        Benchmark("places", "text", (Question("capital", "Paris"),)),
    ]
    found = run_benchmarks(knows, asked)
    assert (found["sums"].metric, found["sums"].per_row.tolist()) == ("numeric_match", [1, 0])
    assert (found["places"].metric, found["places"].value) == ("exact_match", 1)
    assert found["sums"].others == {"cut_off": 0}


def test_perplexity_is_bits_a_byte_of_the_answer() -> None:
    texts = (Question("go on", "four"), Question("go on", "eight888"))
    [score] = run_benchmarks(KnowingGenerator({}), [Benchmark("prose", "perplexity", texts)]).values()
    assert not score.higher_is_better
    np.testing.assert_allclose(score.per_row, [1 / math.log(2)] * 2)
    assert score.others["byte_perplexity"] == pytest.approx(math.e)
    again = BenchmarkScore.from_json(json.loads(json.dumps(score.to_json())))
    assert again.summary() == score.summary()


def test_an_engine_that_cannot_score_is_named() -> None:
    with pytest.raises(ModelError, match=r"even asks how likely given answers are.*the last position alone"):
        run_benchmarks(KnowingGenerator({}, scores=False), [Benchmark("even", "choice", QUESTIONS)])


# --- lm-evaluation-harness ------------------------------------------------------------------------------------


@pytest.fixture
def tasks(tmp_path: Path) -> Path:
    """Task files as the harness has them, over rows in files."""
    pytest.importorskip("lm_eval", reason="the extra benchmarks is not installed")
    rows = [{"question": f"is {n} even", "choices": ["no", "yes"], "answer": (n + 1) % 2} for n in range(8)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    common = (
        f"dataset_path: json\ndataset_kwargs: {{data_files: {{test: {tmp_path}/rows.jsonl}}}}\n"
        'test_split: test\nfewshot_split: test\ndoc_to_text: "{{question}}"\n'
    )
    forms = {
        "chosen": "output_type: multiple_choice\ndoc_to_choice: choices\ndoc_to_target: answer\n"
        "metric_list: [{metric: acc}, {metric: acc_norm}]\n",
        "written": 'output_type: generate_until\ndoc_to_target: "{{choices[answer]}}"\n'
        'generation_kwargs: {until: ["\\n"], max_gen_toks: 5, do_sample: false}\n'
        "metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]\n",
        "rolling": 'output_type: loglikelihood_rolling\ndoc_to_target: "{{question}}"\n'
        "metric_list: [{metric: bits_per_byte}]\n",
    }
    for name, form in forms.items():
        (tmp_path / f"{name}.yaml").write_text(f"task: {name}\n{common}{form}")
    return tmp_path


def test_a_harness_task_is_asked_in_messages(tasks: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_EVALUATE_OFFLINE", "0")
    knows = KnowingGenerator({f"is {n} even": "yes" for n in range(6)})
    chosen = Benchmark("chosen", task=str(tasks / "chosen.yaml"), rows=6, shots=2)
    [score] = run_benchmarks(knows, [chosen], offline=True).values()
    assert (score.metric, score.per_row.tolist()) == ("acc", [1, 0, 1, 0, 1, 0])
    assert score.others["acc_norm"] == 0.5
    assert len(knows.asked) == 12
    assert [turn.role for turn in knows.asked[0]] == ["user", "assistant", "user", "assistant", "user"]
    assert os.environ["HF_EVALUATE_OFFLINE"] == "1"


def test_a_harness_task_of_written_answers(tasks: Path) -> None:
    knows = KnowingGenerator({f"is {n} even": "yes" for n in range(8)})
    written = Benchmark("written", task=str(tasks / "written.yaml"))
    [score] = run_benchmarks(knows, [written], offline=True).values()
    assert (score.metric, score.value, len(score.per_row)) == ("exact_match", 0.5, 8)
    [request, *_] = knows.requests
    assert (request.max_tokens, request.temperature, request.stop) == (5, 0, ("\n",))


def test_harness_tasks_that_cannot_be_asked(tasks: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from slmops.evaluate import harness

    knows = KnowingGenerator({})
    with pytest.raises(RecipeError, match="rolling asks for loglikelihood_rolling, which scores text without"):
        run_benchmarks(knows, [Benchmark("r", task=str(tasks / "rolling.yaml"))], offline=True)
    with pytest.raises(RecipeError, match=r"other\.yaml, which is not there"):
        run_benchmarks(knows, [Benchmark("o", task=str(tasks / "other.yaml"))], offline=True)
    (tasks / "rows.jsonl").unlink()
    with pytest.raises(DataError, match="The benchmark c cannot be read"):
        run_benchmarks(knows, [Benchmark("c", task=str(tasks / "chosen.yaml"))], offline=True)

    class Manager:
        all_tasks = ("arc_easy", "boolq")

    monkeypatch.setattr(harness, "_manager", Manager)
    harness.check_task("boolq")
    with pytest.raises(RecipeError, match=r"names arc_esy, which lm-evaluation-harness has not\. Near it: arc_easy"):
        harness.check_task("arc_esy")


def test_offline_keeps_the_hub_away_and_gives_it_back(tasks: Path) -> None:
    import datasets
    from huggingface_hub import constants

    from slmops.evaluate.harness import _kept_here

    before = (datasets.config.HF_HUB_OFFLINE, constants.HF_HUB_OFFLINE)
    with _kept_here(offline=True):
        assert (datasets.config.HF_HUB_OFFLINE, constants.HF_HUB_OFFLINE) == (True, True)
        assert constants.HF_HUB_DISABLE_TELEMETRY
    assert before == (datasets.config.HF_HUB_OFFLINE, constants.HF_HUB_OFFLINE)
