"""How sure the chosen classifier may say it is: asked on the validation rows, judged on the test rows."""

from __future__ import annotations

import json
from functools import partial

from slmops.artifacts import Dataset, Draft, Report, Row, Variant
from slmops.evaluate.calibration import LEAST_ROWS, Calibration, calibrate
from slmops.evaluate.scores import probabilities_of
from slmops.pipeline.context import Context
from slmops.progress import Progress, ProgressSink
from slmops.runtime import open_classifier


def calibration_of(context: Context, who: str, variant: Variant, data: Dataset) -> Calibration | None:
    """The calibration of ``variant``; None for open tasks, and where there are too few labelled validation rows."""
    recipe = context.recipe
    rows = [row for row in data.rows("validation") if row.target is not None]
    if not recipe.closed or len(rows) < LEAST_ROWS:
        return None

    def build(draft: Draft) -> None:
        found = _asked(context, who, variant, rows, context.test_rows(data))
        (draft.path / "report.json").write_text(json.dumps(found.to_json()), "utf-8")

    report = context.stage(
        "calibration",
        Report,
        {"variant": variant, "data": data},
        {
            "rows": recipe.evaluate.max_rows,
            "abstain_below": recipe.evaluate.abstain_below,
            "answered_accuracy": recipe.evaluate.answered_accuracy,
        },
        ["slmops.evaluate.calibration", "slmops.runtime"],
        build,
    )
    return Calibration.from_json(report.content)


def _asked(context: Context, who: str, variant: Variant, rows: list[Row], test: list[Row]) -> Calibration:
    evaluate = context.recipe.evaluate
    classifier = open_classifier(variant.model_path, threads=evaluate.threads)
    try:
        both = probabilities_of(
            classifier, [row.text for row in (*rows, *test)], partial(_rename, context.progress, f"calibrate {who}")
        )
    finally:
        classifier.close()
    return calibrate(
        both[: len(rows)],
        [row.target or "" for row in rows],
        both[len(rows) :],
        [row.target or "" for row in test],
        classifier.labels,
        abstain_below=evaluate.abstain_below,
        answered_accuracy=evaluate.answered_accuracy,
    )


def _rename(progress: ProgressSink, task: str, event: Progress) -> None:
    progress(Progress(task, event.done, event.total, event.unit, event.note))
