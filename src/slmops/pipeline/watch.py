"""What a run leaves for those who watch its model: how the rows look that it was judged on."""

from __future__ import annotations

from collections.abc import Sequence

from slmops.artifacts import Dataset, Row, Variant
from slmops.monitor.prepare import format_check
from slmops.monitor.reference import MOST_ROWS, Reference, Seen, build_reference
from slmops.pipeline.context import Context
from slmops.pipeline.prove import score_variant
from slmops.runtime import open_classifier


def reference_of(context: Context, who: str, variant: Variant, data: Dataset) -> Reference | None:
    """The reference of the chosen variant, by its answers to the test rows; None where there are none.

    ``who``: its name in the report. A language model's answers are those that it was scored by.
    """
    rows = context.test_rows(data)[:MOST_ROWS]
    if not rows:
        return None
    texts = [row.text for row in data.rows("train")]
    seen = _classified(context, variant, rows) if context.recipe.closed else _written(context, who, variant, data, rows)
    return build_reference(
        texts, seen, about={"model": variant.digest, "data": data.digest, "task": context.recipe.task}
    )


def _classified(context: Context, variant: Variant, rows: Sequence[Row]) -> list[Seen]:
    classifier = open_classifier(variant.model_path, threads=context.recipe.evaluate.threads)
    probabilities = classifier.probabilities([row.text for row in rows])
    labels = classifier.labels
    classifier.close()
    return [
        Seen(row.text, labels[int(one.argmax())], labels[int(one.argmax())], float(one.max()), format_ok=True)
        for row, one in zip(rows, probabilities, strict=True)
    ]


def _written(context: Context, who: str, variant: Variant, data: Dataset, rows: Sequence[Row]) -> list[Seen]:
    answers = score_variant(context, who, variant, data).predictions
    formed = format_check(context.recipe.task)
    return [
        Seen(row.text, answer, format_ok=None if formed is None else formed(answer))
        for row, answer in zip(rows, answers, strict=False)
    ]
