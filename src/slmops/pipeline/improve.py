"""From feedback to a new version: old rows and corrections → the same recipe → gates beside the version in use.

Every part is a stage, found or made by the digest of what it reads, so a run that was stopped goes on where it was. The
new bundle's lineage leads to the feedback, and from there to whatever that was made from. Nothing is replaced here: the
outcome is a candidate bundle, or a refusal that says why.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import yaml

from slmops.artifacts import (
    MANIFEST_NAME,
    Artifact,
    Bundle,
    Checkpoint,
    Dataset,
    Draft,
    Report,
    Row,
    Variant,
    open_artifact,
)
from slmops.artifacts.kinds import SPLITS
from slmops.data.corrections import MARK, improve_data, read_corrections
from slmops.errors import ArtifactError, DataError, UsageError
from slmops.evaluate.gates import Gate, at_least, at_most, p_in_words
from slmops.evaluate.scores import Scores
from slmops.evaluate.significance import compare
from slmops.pipeline import walk_until
from slmops.pipeline.context import Context
from slmops.pipeline.prove import score_variant
from slmops.pipeline.ship import make_place, publish, put_bundle, replace_text
from slmops.progress import ProgressSink, ignore
from slmops.recipe import Recipe, portable_recipe
from slmops.serve.candidate.book import ROLLOUT, Book, pair_name
from slmops.store import Store
from slmops.trust import digest_file

FOLDER = "candidate"
"""Beside the deployed bundle in ``runs/<name>``: report, improvement and bundle of the newest candidate."""
IMPROVEMENT = "improvement.json"


@dataclass(frozen=True)
class ImproveResult:
    """``content``: of ``folder/improvement.json``. ``bundle`` is None where the candidate was refused."""

    content: Mapping[str, Any]
    folder: Path
    bundle: Bundle | None
    reused: bool

    @property
    def passed(self) -> bool:
        return bool(self.content["passed"])


def improve_recipe(
    recipe: Recipe,
    store: Store,
    feedback: Sequence[Path],
    *,
    deployed: Path | None = None,
    out: Path | None = None,
    offline: bool = False,
    progress: ProgressSink = ignore,
) -> ImproveResult:
    """Make a candidate of ``recipe`` out of the rows of the version in use and ``feedback``, and judge it beside that.

    ``feedback``  data sets that slmops made, or files with the recipe's columns: what callers said would be right
    ``deployed``  the bundle in use (default: ``runs/<name>/bundle`` in the store, which a candidate that has taken over
                  is put into first)
    ``out``       receives ``improvement.json``, the report and, where all gates hold, ``bundle/`` (default:
                  ``runs/<name>/candidate``)

    Raises:
        DataError: the feedback cannot be used, or the old rows are not in the store.
        ArtifactError: there is no bundle in use.
        SlmopsError: any stage's own; what was finished before stays done.
    """
    started_at = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    context = Context(recipe, store, offline, progress)
    folder = out or store.root / "runs" / recipe.name / FOLDER
    if deployed is None:
        settle(store.root / "runs" / recipe.name)
    use = _deployed(recipe, store, deployed)
    old = _old_rows(store, use)
    make_place(folder)
    context.data = _new_rows(context, old, feedback)
    context.start = _student_in_use(recipe, store, use)
    made = walk_until(context, "package", folder)
    report, bundle = Report.open(made["report"].path), Bundle.open(made["bundle"].path)
    student = Checkpoint.open(made["student"].path)
    improvement = _judge(context, use, report, bundle, student)
    content = {**improvement.content, "bundle": str(folder / "bundle"), "deployed": str(use.path)}
    if content["passed"]:
        publish(context, folder, report, bundle)
    else:
        shutil.rmtree(folder / "bundle", ignore_errors=True)  # an older candidate is not this one
        content["bundle"] = None
    replace_text(folder / IMPROVEMENT, json.dumps(content, indent=1, ensure_ascii=False) + "\n")
    replace_text(folder / "report.html", (report.path / "report.html").read_text("utf-8"))
    outcome = "candidate" if content["passed"] else "refused"
    store.record_run(recipe.name, started_at=started_at, outcome=outcome, report_digest=improvement.digest)
    shipped = Bundle.open(folder / "bundle") if content["passed"] else None
    return ImproveResult(content, folder, shipped, context.reused)


def settle(folder: Path) -> bool:
    """Put a candidate that has taken over into the place of the version in use; whether there was one.

    ``folder``  ``runs/<name>``. A rollout elsewhere than beside the candidate is not known here.
    """
    used, candidate = folder / "bundle", folder / FOLDER / "bundle"
    if not all((path / MANIFEST_NAME).exists() for path in (used, candidate)):
        return False
    old, new = Bundle.open(used), Bundle.open(candidate)
    state = Book(folder / FOLDER / ROLLOUT / pair_name(old.digest, new.digest)).read()
    if state is None or state.outcome != "over":
        return False
    put_bundle(new, folder)
    return True


# --- what there is ----------------------------------------------------------------------------------------------


def _deployed(recipe: Recipe, store: Store, named: Path | None) -> Bundle:
    path = named or store.root / "runs" / recipe.name / "bundle"
    if not (path / MANIFEST_NAME).exists():
        raise ArtifactError(
            f"There is no bundle in use at {path}.",
            remedy="Make the first version with slmops run, or name the bundle: --deployed BUNDLE.",
        )
    bundle = Bundle.open(path)
    bundle.verify()
    task = bundle.description.get("task")
    if task not in (None, recipe.task):
        raise UsageError(
            f"The bundle at {path} was made for {task}, and the recipe is for {recipe.task}.",
            remedy="Name the recipe that it was made by.",
        )
    return bundle


def lineage_of(bundle: Bundle) -> dict[str, str]:
    """Role -> digest of what the bundle says it was made from."""
    path = bundle.path / "lineage.json"
    raw = json.loads(path.read_text("utf-8")) if path.is_file() else {}
    return {role: str(value["digest"] if isinstance(value, dict) else value) for role, value in raw.items()}


def _old_rows(store: Store, bundle: Bundle) -> Dataset:
    digest = lineage_of(bundle).get("dataset", "")
    try:
        return Dataset.open(store.find(digest).path)
    except ArtifactError:
        raise DataError(
            f"The rows that {bundle.path} was made from ({digest[:12] or 'it does not say which'}) are not in "
            f"{store.root}.",
            remedy="Choose the --store that it was made in, or make its data again: slmops data RECIPE.",
        ) from None


def _student_in_use(recipe: Recipe, store: Store, bundle: Bundle) -> Checkpoint | None:
    """What the bundle's model was before it was written; None where the new one is to be another, or it is gone."""
    kept = recipe.student.model is None and recipe.compress.prune is None and recipe.search is None
    if not (recipe.closed and recipe.improve.go_on and kept):
        return None
    made_by = yaml.safe_load((bundle.path / "recipe.yaml").read_text("utf-8")) or {}
    if made_by.get("student") != portable_recipe(recipe)["student"]:
        return None
    try:
        return Checkpoint.open(store.find(lineage_of(bundle).get("student", "")).path)
    except ArtifactError:
        return None


def _new_rows(context: Context, old: Dataset, feedback: Sequence[Path]) -> Dataset:
    if not feedback:
        raise UsageError("No feedback was named.", remedy="Give --feedback FILE, or a data set of slmops feedback.")
    recipe = context.recipe
    inputs: dict[str, Artifact | str] = {"old": old}
    corrections: list[Row] = []
    for number, path in enumerate(feedback, start=1):
        name = "feedback" if len(feedback) == 1 else f"feedback-{number}"
        rows, inputs[name] = _corrections(path, recipe)
        corrections += rows
    splits = {split: list(old.rows(split)) for split in SPLITS}

    def build(draft: Draft) -> None:
        improve_data(
            splits,
            corrections,
            recipe.data,
            recipe.improve,
            recipe.task,
            recipe.seed,
            draft,
            progress=context.progress,
        )

    settings = recipe.improve.model_dump(mode="json", include=DATA_KEYS)
    shape = recipe.data.model_dump(mode="json", include={"input", "target", "messages", "system", "near_duplicates"})
    split = recipe.data.split.validation
    return context.stage(
        "improved-data", Dataset, inputs, {"improve": settings, **shape, "validation": split}, ["slmops.data"], build
    )


DATA_KEYS = {"test_share", "new_labels", "least_label_rows", "weight", "doubt"}


def _corrections(path: Path, recipe: Recipe) -> tuple[list[Row], Artifact | str]:
    """The rows, and what they are known by: the artifact, or the digest of the file."""
    if (path / MANIFEST_NAME).is_file():
        artifact = open_artifact(path)
        if not isinstance(artifact, Dataset):
            raise DataError(
                f"{path} is a {artifact.manifest.kind}, not a data set.", remedy="Name what slmops feedback wrote."
            )
        rows = [row for split in SPLITS for row in artifact.rows(split) if row.target is not None]
        if not rows:
            raise DataError("The data set has no row with an answer.", path=path, remedy="Wait for corrections.")
        return rows, artifact
    if not path.is_file():
        raise DataError("There is no such file.", path=path, remedy="Name a file, or what slmops feedback wrote.")
    rows, _ = read_corrections(path, recipe.data, recipe.task)
    return rows, digest_file(path).sha256


# --- the judgement ----------------------------------------------------------------------------------------------


def _judge(context: Context, use: Bundle, report: Report, bundle: Bundle, student: Checkpoint) -> Report:
    data = context.data
    assert data is not None
    before = score_variant(context, "deployed", use, data)
    chosen = report.content["student"]
    after = score_variant(context, chosen["id"], Variant.open(context.store.find(chosen["artifact"]).path), data)
    forgetting = _forgetting(context, use, student)

    def build(draft: Draft) -> None:
        rows = context.test_rows(data)
        content = judged(context.recipe, rows, before, after, data.summary["improved"], report.content, forgetting)
        content |= {"name": context.recipe.name, "old": use.digest, "new": bundle.digest}
        (draft.path / "report.json").write_text(json.dumps(content, ensure_ascii=False, allow_nan=False), "utf-8")

    inputs: dict[str, Artifact | str] = {"deployed": use, "candidate": bundle, "report": report, "data": data}
    return context.stage(
        "improvement",
        Report,
        inputs,
        {"improve": context.recipe.improve.model_dump(mode="json", exclude=DATA_KEYS | {"forgetting"})}
        | ({} if forgetting is None else {"forgetting": list(forgetting)}),
        ["slmops.pipeline.improve", "slmops.evaluate"],
        build,
    )


def judged(
    recipe: Recipe,
    rows: Sequence[Row],
    before: Scores,
    after: Scores,
    improved: Mapping[str, Any],
    report: Mapping[str, Any],
    forgetting: tuple[float, float] | None = None,
) -> dict[str, Any]:
    """The gates of a candidate, what they were judged by, and the verdict in a sentence. Pure.

    ``before``, ``after``  scores of the version in use and of the candidate on ``rows``
    ``improved``           what the data's summary tells of the corrections
    ``report``             of the candidate's own run
    ``forgetting``         loss on the general rows before and after
    """
    fresh = np.array([MARK in row.id for row in rows])
    gates = [old_rows_gate(recipe, before.per_row[~fresh], after.per_row[~fresh], before.metric)]
    if fresh.any():
        gates.append(new_rows_gate(before.per_row[fresh], after.per_row[fresh], before.metric))
    labels = set(improved["new_labels"])
    of_new = np.array([row.target in labels for row in rows])
    if of_new.any():
        right = float(after.per_row[of_new].mean())
        note = f"{int(of_new.sum())} test rows of {', '.join(sorted(labels))}."
        gates.append(at_least("new_labels", right, recipe.improve.new_label_score, before.metric, note))
    if forgetting is not None and recipe.improve.forgetting is not None:
        rise = forgetting[1] / max(forgetting[0], 1e-9) - 1
        note = f"Loss on the general rows: {forgetting[0]:.3f} before, {forgetting[1]:.3f} after."
        gates.append(at_most("forgetting", rise, recipe.improve.forgetting.budget, "share", note))
    own = [gate for gate in report["gates"] if not gate["passed"]]
    passed = all(gate.passed for gate in gates) and not own
    return {
        "schema": 1,
        "task": recipe.task,
        "metric": before.metric,
        "passed": passed,
        "verdict": _verdict(passed, gates, own, improved),
        "gates": [gate.to_json() for gate in gates],
        "failed_gates_of_the_run": own,
        "corrections": dict(improved),
        "scores": {
            "old_rows": _both(before.per_row[~fresh], after.per_row[~fresh]),
            "new_rows": _both(before.per_row[fresh], after.per_row[fresh]),
            "new_labels": _both(before.per_row[of_new], after.per_row[of_new]),
        },
        "labels": _by_label(rows, before, after) if recipe.closed else {},
    }


def old_rows_gate(recipe: Recipe, before: Any, after: Any, metric: str) -> Gate:
    """What the rows that the version in use was judged by lose, in points, with the paired test beside it."""
    limit = -recipe.improve.old_loss_points
    test = compare(before, after, seed=recipe.seed)
    low = 100 * test.ci95[0]
    gained = 100 * test.difference
    gate = at_least("old_rows", low if recipe.improve.old_loss_proven else gained, limit, "points")
    shown = "The lower end of the interval is judged. " if recipe.improve.old_loss_proven else ""
    within = "proven within the limit" if low >= limit else f"not proven by {test.rows} rows"
    note = (
        f"{shown}{100 * np.mean(before):.2f} → {100 * np.mean(after):.2f} {metric}: {gained:+.2f} points, 95 % "
        f"interval {low:+.2f} to {100 * test.ci95[1]:+.2f}, {p_in_words(test.p_value)}; {within}."
    )
    return Gate(**{**vars(gate), "note": note, "test": test})


def new_rows_gate(before: Any, after: Any, metric: str) -> Gate:
    """Corrections that were kept back for judging: the candidate has to get more of them right."""
    test = compare(before, after)
    gate = at_least("new_rows", 100 * test.difference, 0.0, "points")
    note = (
        f"{100 * np.mean(before):.1f} → {100 * np.mean(after):.1f} {metric} on {test.rows} corrections that were not "
        f"learnt, {p_in_words(test.p_value)}."
    )
    return Gate(**{**vars(gate), "note": note, "test": test})


def _forgetting(context: Context, use: Bundle, student: Checkpoint) -> tuple[float, float] | None:
    """Loss on the general rows of the student in use and of the new one; None where the recipe names none.

    Raises:
        ArtifactError: the student in use is no longer in the store.
    """
    config = context.recipe.improve.forgetting
    if config is None:
        return None
    from slmops.train.forgetting import general_loss

    before = Checkpoint.open(context.store.find(lineage_of(use).get("student", "")).path)
    file = Path(config.data)
    inputs: dict[str, Artifact | str] = {"before": before, "after": student}
    if file.is_file():
        inputs["general"] = digest_file(file).sha256

    def build(draft: Draft) -> None:
        losses = [general_loss(one.path, config, context.recipe.train.max_tokens)[0] for one in (before, student)]
        (draft.path / "report.json").write_text(json.dumps({"losses": losses}), "utf-8")

    settings = {"rows": config.max_rows, "max_tokens": context.recipe.train.max_tokens}
    found = context.stage("forgetting", Report, inputs, settings, ["slmops.train.forgetting"], build)
    first, second = cast("list[float]", found.content["losses"])
    return first, second


def _both(before: Any, after: Any) -> dict[str, Any]:
    if not len(before):
        return {"rows": 0, "before": None, "after": None}
    return {"rows": len(before), "before": float(np.mean(before)), "after": float(np.mean(after))}


def _by_label(rows: Sequence[Row], before: Scores, after: Scores) -> dict[str, Any]:
    """Each label's rows and scores, those that lost the most first."""
    targets = np.array([row.target for row in rows])
    found = {label: _both(before.per_row[targets == label], after.per_row[targets == label]) for label in set(targets)}
    return dict(sorted(found.items(), key=lambda pair: (pair[1]["after"] - pair[1]["before"], pair[0])))


def _verdict(passed: bool, gates: Sequence[Gate], own: Sequence[Mapping[str, Any]], improved: Mapping[str, Any]) -> str:
    used = f"{improved['used']} of {improved['corrections']} corrections used"
    count = len(improved["new_labels"])
    new = f", {count} new label{'s' if count > 1 else ''}" if count else ""
    if passed:
        return f"A candidate: {used}{new}; all gates hold."
    failed = [gate.name for gate in gates if not gate.passed] + [gate["name"] for gate in own]
    return f"Refused: {used}{new}; {', '.join(failed)} {'does' if len(failed) == 1 else 'do'} not hold."
