"""Studies: proposals in bounds, pruning, resuming, failing trials. What a trial trains is a plain function here."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from slmops.errors import DataError, ModelError
from slmops.recipe import SearchConfig
from slmops.train.search import (
    Evaluated,
    Observe,
    SearchPlace,
    beaten_places,
    finished_trials,
    open_search,
    run_trials,
    summarize,
    take_up,
)

pytest.importorskip("optuna", reason="the extra search is not installed")

SPACE: dict[str, Any] = {
    "train.learning_rate": {"low": 1e-4, "high": 1e-1, "log": True},
    "student.layers": [2, 4],
    "train.batch_size": {"low": 8, "high": 32, "step": 8},
}


def config(**keys: Any) -> SearchConfig:
    return SearchConfig.model_validate({"space": SPACE, "trials": 8, "sampler": "random", "pruner": "none", **keys})


def place(folder: Path, name: str = "s") -> SearchPlace:
    return SearchPlace(folder / f"{name}.db", name, seed=3)


def bowl(values: Mapping[str, Any], observe: Observe) -> Evaluated:
    """Best at a learning rate of 0.01 with 4 layers."""
    loss = (math.log10(values["train.learning_rate"]) + 2) ** 2 + (values["student.layers"] == 2)
    for step in range(1, 11):
        observe(step / 10, loss + (10 - step) / 10)
    return Evaluated(loss)


def search(folder: Path, settings: SearchConfig, evaluate: Any = bowl, name: str = "s") -> dict[str, Any]:
    study = open_search(place(folder, name), settings)
    take_up(study)
    run_trials(study, place(folder, name), settings, evaluate)
    return summarize(study, settings)


def test_proposals_keep_to_the_space_and_the_best_is_the_lowest(tmp_path: Path) -> None:
    found = search(tmp_path, config(trials=20))
    assert len(found["trials"]) == 20
    for trial in found["trials"]:
        values = trial["values"]
        assert 1e-4 <= values["train.learning_rate"] <= 1e-1
        assert values["train.learning_rate"] == float(f"{values['train.learning_rate']:.4g}")
        assert values["student.layers"] in (2, 4)
        assert values["train.batch_size"] in (8, 16, 24, 32)
        assert (trial["state"], trial["percent"], trial["error"]) == ("complete", 100, None)
    lowest = min(found["trials"], key=lambda trial: trial["loss"])
    assert (found["best"], found["values"], found["loss"]) == (lowest["number"], lowest["values"], lowest["loss"])
    assert found["log_keys"] == ["train.learning_rate"]
    shares = found["importances"]
    assert set(shares) == set(SPACE)
    assert sum(shares.values()) == pytest.approx(1)
    assert max(shares, key=shares.__getitem__) == "train.learning_rate"


def test_tpe_finds_the_bottom(tmp_path: Path) -> None:
    found = search(tmp_path, config(trials=40, sampler="tpe"))
    late = [trial["loss"] for trial in found["trials"][20:]]
    early = [trial["loss"] for trial in found["trials"][:10]]
    assert found["values"]["student.layers"] == 4
    assert found["loss"] < 0.05
    assert sorted(late)[10] < sorted(early)[5]  # medians


@pytest.mark.parametrize("sampler", ["random", "tpe"])
def test_a_search_in_two_parts_proposes_the_same(tmp_path: Path, sampler: str) -> None:
    whole = search(tmp_path, config(trials=9, sampler=sampler), name="whole")
    search(tmp_path, config(trials=4, sampler=sampler), name="parts")
    parts = search(tmp_path, config(trials=9, sampler=sampler), name="parts")
    # How many trials TPE draws at random first depends on the number asked for.
    count = 9 if sampler == "random" else 4
    assert [t["values"] for t in parts["trials"]][:count] == [t["values"] for t in whole["trials"]][:count]
    assert len(parts["trials"]) == 9


class Killed(BaseException):
    pass


def test_a_trial_that_was_cut_off_is_done_again_and_counts_once(tmp_path: Path) -> None:
    unbroken = search(tmp_path, config(), name="unbroken")
    done = 0

    def dies_in_the_fourth(values: Mapping[str, Any], observe: Observe) -> Evaluated:
        nonlocal done
        done += 1
        if done == 4:
            raise Killed
        return bowl(values, observe)

    with pytest.raises(Killed):
        search(tmp_path, config(), dies_in_the_fourth, name="broken")
    found = search(tmp_path, config(), name="broken")
    assert [trial["values"] for trial in found["trials"]] == [trial["values"] for trial in unbroken["trials"]]
    assert [trial["number"] for trial in found["trials"]] == list(range(8))
    assert {trial["state"] for trial in found["trials"]} == {"complete"}


def test_a_finished_search_does_nothing_again(tmp_path: Path) -> None:
    first = search(tmp_path, config())

    def never(values: Mapping[str, Any], observe: Observe) -> Evaluated:
        raise AssertionError("trained again")

    assert search(tmp_path, config(), never) == first


@pytest.mark.parametrize("pruner", ["median", "halving"])
def test_bad_trials_are_stopped_early(tmp_path: Path, pruner: str) -> None:
    steps: dict[float, int] = {}

    def counted(values: Mapping[str, Any], observe: Observe) -> Evaluated:
        rate = values["train.learning_rate"]
        loss = abs(math.log10(rate) + 2)
        for step in range(1, 11):
            steps[rate] = step
            observe(step / 10, loss)
        return Evaluated(loss)

    found = search(tmp_path, config(trials=24, pruner=pruner), counted)
    pruned = [trial for trial in found["trials"] if trial["state"] == "pruned"]
    complete = [trial for trial in found["trials"] if trial["state"] == "complete"]
    assert pruned
    assert complete
    assert all(steps[trial["values"]["train.learning_rate"]] < 10 for trial in pruned)
    assert all(trial["percent"] == 10 * steps[trial["values"]["train.learning_rate"]] for trial in pruned)
    worst = sorted(found["trials"], key=lambda trial: trial["loss"])[-4:]
    assert sum(trial["state"] == "pruned" for trial in worst) >= 3
    assert found["loss"] == min(trial["loss"] for trial in found["trials"])  # the best one was let through


def test_a_trial_that_cannot_be_trained_is_noted_and_the_rest_goes_on(tmp_path: Path) -> None:
    def two_layers_break(values: Mapping[str, Any], observe: Observe) -> Evaluated:
        if values["student.layers"] == 2:
            raise ModelError("The loss became nan at step 3.", remedy="Lower the learning rate.")
        return bowl(values, observe)

    found = search(tmp_path, config(trials=10), two_layers_break)
    failed = [trial for trial in found["trials"] if trial["state"] == "failed"]
    assert 0 < len(failed) < 10
    assert {trial["values"]["student.layers"] for trial in failed} == {2}
    assert "nan at step 3" in failed[0]["error"]
    assert found["values"]["student.layers"] == 4


def test_all_failed_is_an_error_with_the_first_reason(tmp_path: Path) -> None:
    def breaks(values: Mapping[str, Any], observe: Observe) -> Evaluated:
        raise ModelError("The loss became nan at step 3.")

    with pytest.raises(ModelError, match=r"None of 3 trials .* nan at step 3") as caught:
        search(tmp_path, config(trials=3), breaks)
    assert "search.space" in (caught.value.remedy or "")


def test_what_is_no_trial_of_its_own_ends_the_search(tmp_path: Path) -> None:
    def no_rows(values: Mapping[str, Any], observe: Observe) -> Evaluated:
        raise DataError("No row has an answer.")

    with pytest.raises(DataError):
        search(tmp_path, config(), no_rows)
    assert len(search(tmp_path, config())["trials"]) == 8


def test_no_trial_is_begun_after_the_time(tmp_path: Path) -> None:
    study = open_search(place(tmp_path), config())
    run_trials(study, place(tmp_path), config(), bowl, deadline_s=1.0)
    assert finished_trials(study) == 0
    with pytest.raises(ModelError, match="None of 0 trials"):
        summarize(study, config())


def test_places_of_beaten_trials(tmp_path: Path) -> None:
    def placed(values: Mapping[str, Any], observe: Observe) -> Evaluated:
        return Evaluated(bowl(values, observe).loss, tmp_path / str(values["train.learning_rate"]))

    found = search(tmp_path, config(), placed)
    beaten = set(beaten_places(open_search(place(tmp_path), config())))
    expected = {tmp_path / str(t["values"]["train.learning_rate"]) for t in found["trials"]}
    assert beaten == expected - {tmp_path / str(found["values"]["train.learning_rate"])}
