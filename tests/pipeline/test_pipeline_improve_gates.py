"""The gates of a candidate, from scores alone; and what a model loses on general text."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fakes.tiny_models import write_tiny_llama
from slmops.artifacts import Message, Row
from slmops.errors import RecipeError
from slmops.evaluate.scores import Scores
from slmops.pipeline.improve import judged
from slmops.recipe import ForgettingConfig, parse_recipe
from slmops.train.forgetting import general_loss

IMPROVED = {"corrections": 10, "used": 9, "new_labels": ["new"]}


def rows(old: int, fresh: int) -> list[Row]:
    made = [Row(f"test-{number}", (Message("user", "a"),), "old") for number in range(old)]
    return made + [Row(f"test-feedback-{number}", (Message("user", "b"),), "new") for number in range(fresh)]


def scores(values: Sequence[float]) -> Scores:
    array = np.array(values, dtype=np.float64)
    return Scores("accuracy", float(array.mean()), (0.0, 1.0), len(array), array)


def judge(
    before: Sequence[float], after: Sequence[float], old: int, *, gates: Any = (), **improve: Any
) -> dict[str, Any]:
    raw = {"name": "a", "task": "classification", "data": {"train": "a.csv"}, "improve": improve}
    shown = rows(old, len(before) - old)
    return judged(parse_recipe(raw), shown, scores(before), scores(after), IMPROVED, {"gates": list(gates)})


def failed(content: dict[str, Any]) -> list[str]:
    return [gate["name"] for gate in content["gates"] if not gate["passed"]]


def test_half_a_point_may_be_lost_and_not_more() -> None:
    before = [1.0] * 400 + [0.0] * 10
    within = judge(before, [0.0] * 2 + [1.0] * 398 + [1.0] * 10, 400)
    assert within["passed"]
    assert within["gates"][0]["value"] == pytest.approx(-0.5)
    assert "not proven by 400 rows" in within["gates"][0]["note"]
    beyond = judge(before, [0.0] * 3 + [1.0] * 397 + [1.0] * 10, 400)
    assert failed(beyond) == ["old_rows"]
    assert "old_rows does not hold" in beyond["verdict"]


def test_a_loss_within_the_limit_may_have_to_be_proven() -> None:
    before = [1.0] * 400 + [0.0] * 10
    after = [0.0] * 2 + [1.0] * 408
    assert failed(judge(before, after, 400, old_loss_proven=True)) == ["old_rows"]
    assert judge(before, [1.0] * 410, 400, old_loss_proven=True)["passed"]


def test_new_rows_and_new_labels_have_to_be_learnt() -> None:
    before = [1.0] * 100 + [0.0] * 10
    assert failed(judge(before, [1.0] * 100 + [1.0] * 4 + [0.0] * 6, 100)) == ["new_labels"]
    assert failed(judge([1.0] * 110, [1.0] * 109 + [0.0], 100)) == ["new_rows"]


def test_a_gate_of_the_run_itself_refuses_too() -> None:
    gate = {"name": "retention", "passed": False, "value": 0.5, "limit": 0.9, "direction": "at_least", "note": ""}
    content = judge([1.0] * 100 + [0.0] * 10, [1.0] * 110, 100, gates=[gate])
    assert not content["passed"]
    assert content["failed_gates_of_the_run"] == [gate]
    assert "retention does not hold" in content["verdict"]


def test_labels_that_lost_most_come_first() -> None:
    content = judge([1.0] * 100 + [0.0] * 10, [0.0] + [1.0] * 109, 100, old_loss_points=5)
    assert list(content["labels"]) == ["old", "new"]


def test_forgetting_is_judged_for_open_tasks_alone() -> None:
    raw: dict[str, Any] = {
        "name": "a",
        "task": "conversation",
        "data": {"train": "a.csv"},
        "improve": {"forgetting": {"data": "general.jsonl", "budget": 0.02}},
    }
    told = {**IMPROVED, "new_labels": []}
    shown, same = rows(50, 5), scores([0.5] * 55)
    for after, passes in ((2.03, True), (2.05, False)):
        content = judged(parse_recipe(raw), shown, same, same, told, {"gates": []}, (2.0, after))
        assert [gate["passed"] for gate in content["gates"] if gate["name"] == "forgetting"] == [passes]
    with pytest.raises(RecipeError, match="no loss on general text"):
        parse_recipe({**raw, "task": "classification"})


def test_general_loss_is_the_mean_over_tokens(tmp_path: Path) -> None:
    import torch

    model = write_tiny_llama(tmp_path / "model")
    general = tmp_path / "general.jsonl"
    turns = [{"role": "user", "content": "hello"}]
    lines = [{"text": "my card is lost"}, {"messages": turns, "target": "how are you"}]
    general.write_text("".join(json.dumps(line) + "\n" for line in lines))
    loss, accuracy = general_loss(tmp_path / "model", ForgettingConfig(data=str(general)), 64)
    from slmops.chat import ChatTokenizer
    from slmops.train.forgetting import read_general_rows

    total, tokens = 0.0, 0
    for row in read_general_rows(ForgettingConfig(data=str(general)), ChatTokenizer.load(tmp_path / "model"), 64):
        with torch.no_grad():
            likely = torch.log_softmax(model(torch.tensor([row.tokens])).logits[0].float(), dim=-1)
        for place in range(1, len(row.tokens)):
            if row.supervised[place]:
                total, tokens = total - float(likely[place - 1, row.tokens[place]]), tokens + 1
    assert loss == pytest.approx(total / tokens, rel=1e-4)
    assert 0 <= accuracy <= 1
    assert math.isfinite(loss)
