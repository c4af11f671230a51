"""Rows read back as they were written."""

from __future__ import annotations

import json

from hypothesis import given
from hypothesis import strategies as st

from slmops.artifacts import Message, Row

texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=30)
messages = st.builds(Message, st.sampled_from(["system", "user", "assistant"]), texts)
rows = st.builds(
    Row,
    id=texts,
    messages=st.lists(messages, min_size=1, max_size=4).map(tuple),
    target=st.none() | texts,
    meta=st.dictionaries(texts, texts | st.integers(), max_size=2),
)


@given(rows)
def test_a_row_reads_back_as_it_was_written(row: Row) -> None:
    assert Row.from_json(json.loads(json.dumps(row.to_json(), ensure_ascii=False))) == row


def test_a_classifier_reads_the_last_turn_and_meta_is_written_only_when_there() -> None:
    row = Row("1", (Message("system", "Be brief."), Message("user", "Where is my card?")), "card")
    assert row.text == "Where is my card?"
    assert "meta" not in row.to_json()
