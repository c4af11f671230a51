"""What becomes of a correction."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from pathlib import Path

import pytest

from slmops.artifacts import SPLITS, Dataset, Message, Row, drafting
from slmops.data.corrections import MARK, Merged, copies_of, doubted_by_linear, improve_data, merge, read_corrections
from slmops.errors import DataError
from slmops.recipe import DataConfig, ImproveConfig

WORDS = {
    "card": "lost stolen blocked plastic wallet pin",
    "money": "transfer balance account pending euro salary",
    "travel": "flight abroad hotel passport airport visa",
}


def row(name: str, text: str, target: str | None) -> Row:
    return Row(name, (Message("user", text),), target)


def texts(label: str, count: int, seed: int = 0) -> list[str]:
    """All different."""
    rng = random.Random(f"{label}{seed}")
    return [" ".join([*rng.sample(WORDS[label].split(), 3), f"n{seed}{number}"]) for number in range(count)]


def old_rows(labels: Sequence[str] = ("card", "money"), each: int = 20) -> dict[str, list[Row]]:
    found: dict[str, list[Row]] = {split: [] for split in SPLITS}
    for label in labels:
        for number, text in enumerate(texts(label, each)):
            split = "test" if number < 3 else "validation" if number < 6 else "train"
            found[split].append(row(f"{label}-{number}", text, label))
    return found


def corrections(*said: tuple[str, str]) -> list[Row]:
    return [row(f"{MARK}{number}", text, label) for number, (text, label) in enumerate(said)]


def merged(given: Sequence[Row], *, old: dict[str, list[Row]] | None = None, **settings: object) -> Merged:
    chosen = ImproveConfig.model_validate(settings)
    return merge(old or old_rows(), given, chosen, closed=True, validation_share=0.1, seed=0)


def reasons(found: Merged) -> list[str]:
    return sorted(reason for _, reason in found.quarantined)


def test_a_known_row_gets_the_answer_that_was_said() -> None:
    old = old_rows()
    known = old["train"][0]
    found = merged(corrections((known.text.upper(), "money")), old=old)
    assert found.replaced == 1
    assert [one.target for one in found.splits["train"] if one.id == known.id] == ["money"]
    assert sum(map(len, found.splits.values())) == sum(map(len, old.values()))


def test_a_test_row_is_never_changed_and_never_learnt() -> None:
    old = old_rows()
    judge = old["test"][0]
    found = merged(corrections((judge.text, "money")), old=old)
    assert found.splits["test"] == old["test"]
    assert [reason.split(",")[0] for reason in reasons(found)] == ["a test row"]


def test_what_is_known_already_changes_nothing() -> None:
    old = old_rows()
    found = merged(corrections((old["train"][0].text, "card"), (old["test"][0].text, "card")), old=old)
    assert (found.known, found.replaced, list(found.quarantined)) == (2, 0, [])


def test_the_majority_counts_and_a_draw_does_not() -> None:
    said = [
        ("a new text", "card"),
        ("A  new text", "card"),
        ("a new text", "money"),
        ("other", "card"),
        ("other", "money"),
    ]
    found = merged(corrections(*said))
    fresh = [one for rows in found.splits.values() for one in rows if one.id.startswith(MARK)]
    assert [(one.text, one.target) for one in fresh] == [("a new text", "card")]
    assert len(found.quarantined) == 3
    assert "contradict" in reasons(found)[0]


def test_a_new_label_needs_several_corrections_and_leave() -> None:
    few = corrections(*((text, "travel") for text in texts("travel", 4)))
    assert merged(few).new_labels == ()
    assert "4 of the 5 rows" in reasons(merged(few))[0]
    many = corrections(*((text, "travel") for text in texts("travel", 10)))
    assert merged(many).new_labels == ("travel",)
    refused = merged(many, new_labels=False)
    assert refused.new_labels == ()
    assert len(refused.quarantined) == 10


def test_every_split_gets_its_share_of_every_label_the_same_each_time() -> None:
    given = corrections(*((text, label) for label in ("travel", "card") for text in texts(label, 20, seed=5)))
    found = merged(given)
    for label in ("travel", "card"):
        counts = [
            sum(one.target == label and one.id.startswith(MARK) for one in found.splits[split]) for split in SPLITS
        ]
        assert counts == [14, 2, 4]
    again = merged(list(reversed(given)))
    assert {one.text for one in again.splits["test"]} == {one.text for one in found.splits["test"]}


def test_small_labels_are_learnt_more_often() -> None:
    train = [row(f"card-{number}", f"a{number}", "card") for number in range(40)]
    train += [row(f"money-{number}", f"b{number}", "money") for number in range(40)]
    fresh = [row(f"{MARK}{number}", f"c{number}", "travel") for number in range(20)]
    assert copies_of([*train, *fresh], None, closed=True) == {one.id: 2 for one in fresh}
    assert set(copies_of([*train, *fresh[:2]], None, closed=True).values()) == {4}
    assert copies_of([*train, *fresh], 1, closed=True) == {}
    assert copies_of([*train, *fresh], 3, closed=True) == {one.id: 3 for one in fresh}
    assert copies_of(fresh, None, closed=False) == {}


def test_a_correction_that_all_other_rows_contradict_is_doubted() -> None:
    old = old_rows(("card", "money", "travel"), each=60)
    wrong = [(text, "money") for text in texts("card", 5, seed=8)]
    right = [(text, "travel") for text in texts("travel", 20, seed=8)]
    given = corrections(*wrong, *right)
    doubted = doubted_by_linear(0.9, seed=0)(old["train"], given)
    assert set(doubted) == {one.id for one in given[:5]}
    assert "'card'" in next(iter(doubted.values()))
    assert doubted_by_linear(0.9, seed=0)(old["train"][:10], given[:2]) == {}  # too few rows to doubt by


def test_a_data_set_with_copies_and_a_second_round(tmp_path: Path) -> None:
    config = DataConfig(train="unused", near_duplicates=None)
    settings = ImproveConfig(doubt=None)
    given = [row(str(number), text, "travel") for number, text in enumerate(texts("travel", 12))]
    with drafting("dataset", tmp_path / "first") as draft:
        improve_data(old_rows(each=40), given, config, settings, "classification", 0, draft)
    first = Dataset.open(tmp_path / "first")
    assert first.labels == ("card", "money", "travel")
    train = list(first.rows("train"))
    assert len({one.id for one in train}) == len(train)
    assert first.summary["improved"]["new_labels"] == ["travel"]
    assert first.summary["improved"]["copies"] == sum("#" in one.id for one in train) > 0
    assert {one.text for one in train}.isdisjoint(one.text for one in first.rows("test"))
    old = {split: list(first.rows(split)) for split in SPLITS}
    more = [row(str(number), text, "card") for number, text in enumerate(texts("card", 10, seed=3))]
    with drafting("dataset", tmp_path / "second") as draft:
        improve_data(old, more, config, settings, "classification", 0, draft)
    second = Dataset.open(tmp_path / "second")
    fresh = [one for one in second.rows("test") if MARK in one.id]
    assert {one.target for one in fresh} == {"card"}
    assert {one.text for one in old["test"]} <= {one.text for one in second.rows("test")}
    assert not any("test-test-" in one.id for one in second.rows("test"))


def test_conversations_stay_whole(tmp_path: Path) -> None:
    def talk(number: int) -> Row:
        turns = (Message("system", "be kind"), Message("user", "hi"), Message("assistant", "yes"))
        return Row(f"r{number}", (*turns, Message("user", f"question {number}")), f"answer {number}")

    old = {"train": [talk(n) for n in range(20)], "validation": [talk(30)], "test": [talk(31)]}
    given = [talk(n) for n in range(40, 46)]
    config = DataConfig(train="unused", messages="messages", target=None)
    with drafting("dataset", tmp_path / "made") as draft:
        improve_data(old, given, config, ImproveConfig(), "conversation", 0, draft)
    made = Dataset.open(tmp_path / "made")
    rows = {one.text: one for split in SPLITS for one in made.rows(split)}
    assert rows["question 41"].messages == talk(41).messages
    assert rows["question 41"].target == "answer 41"
    assert made.labels is None


def test_nothing_new_is_an_error_with_the_reason(tmp_path: Path) -> None:
    old = old_rows()
    config, settings = DataConfig(train="unused"), ImproveConfig()
    with pytest.raises(DataError, match="1 say what the rows say"), drafting("dataset", tmp_path / "a") as draft:
        improve_data(old, [old["train"][0]], config, settings, "classification", 0, draft)
    odd = [row("1", "quite new", "travel")]
    with pytest.raises(DataError, match="is new: 1 of the 5"), drafting("dataset", tmp_path / "b") as draft:
        improve_data(old, odd, config, settings, "classification", 0, draft)


def test_a_file_is_read_by_the_recipes_columns(tmp_path: Path) -> None:
    path = tmp_path / "said.jsonl"
    lines = [{"q": "where is it", "a": "card"}, {"q": "", "a": "card"}, {"q": "how", "a": None}, "junk"]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    config = DataConfig(train="unused", input="{q}", target="{a}", id="number")
    rows, bad = read_corrections(path, config, "classification")
    assert [(one.text, one.target) for one in rows] == [("where is it", "card")]
    assert len(bad) == 3
    path.write_text('{"q": ""}\n')
    with pytest.raises(DataError, match="None of its rows"):
        read_corrections(path, config, "classification")
