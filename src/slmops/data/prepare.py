"""The stage: files to a :class:`~slmops.artifacts.Dataset`.

Two passes over the rows: the first reads, builds and spills (:mod:`slmops.data.intake`); then all decisions are made
over arrays (:mod:`slmops.data.dedupe`, :mod:`slmops.data.split`); the second pass copies each row to where it belongs.

Guarantees: the same files, configuration and seed give the same bytes; every row that was read is in exactly one of a
split, the quarantine, or the counts of removed duplicates, overlap and limit; no text of the test split, and nothing
nearly the same, is in another split; memory stays bounded (about 0.3 KB a row).
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt

from slmops.artifacts import SPLITS, Draft
from slmops.data.build import RowBuilder
from slmops.data.dedupe import (
    TRAIN_FILE,
    Clusters,
    Fate,
    Similarity,
    mark_exact,
    mark_near,
    mark_same_ids,
    unite_equal_texts,
    unite_near,
)
from slmops.data.intake import Intake, Quarantine, Taken
from slmops.data.shingles import U8, Bands, plan_bands
from slmops.data.sources import ROLES, FetchHub, Source, resolve
from slmops.data.split import I64, TEST, TRAIN, VALIDATION, divide, draw, order_keys
from slmops.data.summary import check_labels, summarize
from slmops.errors import DataError
from slmops.progress import Progress, ProgressSink, ignore
from slmops.recipe import CLOSED_TASKS, DataConfig, Task

logger = logging.getLogger(__name__)

REASONS = {Fate.SAME_ID: "the id of an earlier row", Fate.CONFLICT: "the same text with different labels"}


@dataclass(frozen=True)
class Decisions:
    """``fates`` and ``splits`` are ``[rows]``; a row's split counts where its fate is KEPT. ``together`` counts rows
    that stay in one split with others, because they are nearly the same."""

    fates: U8
    splits: U8
    together: int
    warnings: tuple[str, ...]


def source_digests(config: DataConfig, *, fetch_hub: FetchHub | None = None) -> dict[str, str]:
    """SHA-256 of what is read, by role: ``{"train": ..., "test": ...}``. Part of the stage's key.

    Raises:
        DataError: a source that is not there.
        RecipeError: a source that cannot be understood.
    """
    return {source.role: source.digest() for source in resolve(config, fetch_hub)}


def stage_config(config: DataConfig, task: Task, seed: int) -> dict[str, Any]:
    """What else the stage's key depends on: the same rows from another place are the same work."""
    places = {role: _short(text) for role in ROLES if (text := getattr(config, role)) is not None}
    plain = {key: value for key, value in config.model_dump(mode="json").items() if key not in ROLES}
    return {**plain, "sources": places, "task": task, "seed": seed}


def _short(text: str) -> str:
    return text if text.startswith(("hf:", "sample:")) else Path(text).name


def prepare(
    config: DataConfig,
    task: Task,
    seed: int,
    draft: Draft,
    *,
    fetch_hub: FetchHub | None = None,
    progress: ProgressSink = ignore,
) -> None:
    """Read, check, clean and split the rows that ``config`` names; fill ``draft`` with a Dataset.

    ``fetch_hub`` gives a folder for ``hf:`` sources. The decisions are described in :mod:`slmops.data.dedupe` and
    :mod:`slmops.data.split`, the layout in :class:`slmops.artifacts.Dataset`.

    Raises:
        DataError: the rows cannot be used as a whole; names file and row.
        RecipeError: a template or source that cannot be understood.
    """
    sources = resolve(config, fetch_hub)
    builder = RowBuilder.of(config, task)
    bands = None if config.near_duplicates is None else plan_bands(config.near_duplicates)
    closed = task in CLOSED_TASKS
    with (draft.path / "quarantine.jsonl").open("w", encoding="utf-8") as file:
        quarantine = Quarantine(file)
        intake = Intake(draft.work, quarantine, bands, closed=closed)
        try:
            for source in sources:
                intake.take_source(
                    source, builder, progress, prefix_ids=source.role != "train", encoding=config.encoding
                )
            taken = intake.finish()
        finally:
            intake.close()
        labelled = closed and config.target is not None
        decisions = decide(
            taken,
            config,
            sources,
            bands,
            seed,
            labelled=labelled,
            remove_near=builder.single_column,
            progress=progress,
        )
        _write_rows(draft.path, taken, decisions, sources, quarantine, progress)
    summary = summarize(
        taken=taken,
        fates=decisions.fates,
        splits=decisions.splits,
        together=decisions.together,
        read=intake.read,
        reasons=quarantine.reasons,
        sources=sources,
        near_duplicates=config.near_duplicates,
        remove_near=builder.single_column,
        labelled=labelled,
        warnings=[*intake.warnings, *decisions.warnings],
    )
    text = json.dumps(summary, indent=1, ensure_ascii=False, allow_nan=False)
    (draft.path / "summary.json").write_text(text + "\n", "utf-8")
    draft.metrics["rows"] = summary["rows"]
    draft.metrics["quarantined"] = summary["quarantined"]["total"]
    taken.spill_path.unlink()
    for warning in summary["warnings"]:
        logger.info("%s", warning)  # whoever shows the summary shows them


def decide(
    taken: Taken,
    config: DataConfig,
    sources: tuple[Source, ...],
    bands: Bands | None,
    seed: int,
    *,
    labelled: bool,
    remove_near: bool,
    progress: ProgressSink = ignore,
) -> Decisions:
    """What becomes of every row.

    Raises:
        DataError: labels that cannot be learned or tested, no row left for a split.
    """
    columns = taken.columns
    fates = np.zeros(len(columns.texts), dtype=np.uint8)
    _check_ids(taken, config, sources)
    mark_same_ids(fates, columns)
    mark_exact(fates, columns, closed=labelled)
    clusters = Clusters.of(len(fates))
    unite_equal_texts(clusters, fates, columns)
    if bands is not None and taken.signatures is not None and config.near_duplicates is not None:
        _mark_near(taken, fates, clusters, bands, config.near_duplicates, progress, remove=remove_near)
    given = {source.role for source in sources}
    _check_train_left(fates, columns.files, sources)
    numbers = clusters.numbers()
    strata, inner = _strata(taken, config, labelled)
    keys = order_keys(columns.texts, seed)
    if config.limit is not None:
        _apply_limit(fates, columns.files, keys, strata, config.limit, taken if labelled else None, sources)
    splits = columns.files.copy()
    own = np.flatnonzero((fates == Fate.KEPT) & (columns.files == TRAIN_FILE))
    shares = {
        split: share
        for split, share in ((TEST, config.split.test), (VALIDATION, config.split.validation))
        if ROLES[split] not in given
    }
    splits[own] = divide(
        keys[own],
        strata[own],
        numbers[own],
        shares,
        small_get_one=labelled,
        inner=None if inner is None else inner[own],
    )
    warnings = _cluster_warnings(clusters, numbers[own], len(own))
    _, of_cluster, sizes = np.unique(numbers[own], return_inverse=True, return_counts=True)
    if labelled:
        warnings += check_labels(taken, fates, splits, sources)
    _check_splits(fates, splits, sources)
    return Decisions(fates, splits, int((sizes[of_cluster] > 1).sum()), tuple(warnings))


def _mark_near(
    taken: Taken, fates: U8, clusters: Clusters, bands: Bands, threshold: float, progress: ProgressSink, *, remove: bool
) -> None:
    assert taken.signatures is not None
    with taken.spill_path.open("rb") as spill:
        similarity = Similarity(lambda row: taken.compared_text(spill, row))
        kept = np.flatnonzero(fates == Fate.KEPT).astype(np.int64)
        sink: Callable[[int, int], None] = lambda done, total: progress(  # noqa: E731
            Progress("looking for near-duplicates", done, total, "bands")
        )
        unite_near(clusters, kept, taken.signatures, bands, threshold, similarity, sink)
        mark_near(fates, taken.columns, clusters.numbers(), threshold, similarity, remove=remove)


def _strata(taken: Taken, config: DataConfig, labelled: bool) -> tuple[I64, I64 | None]:
    """Labels where there are; the stratify column within them, or instead of them."""
    by_column = taken.strata.astype(np.int64)
    if not labelled:
        return by_column, None
    return taken.labels.astype(np.int64), by_column if config.split.stratify is not None else None


def _apply_limit(
    fates: U8,
    files: U8,
    keys: npt.NDArray[np.uint64],
    strata: I64,
    limit: int,
    labelled: Taken | None,
    sources: tuple[Source, ...],
) -> None:
    """Keep ``limit`` rows of the training file; files given for validation and test stay whole."""
    rows = np.flatnonzero((fates == Fate.KEPT) & (files == TRAIN_FILE))
    classes = len(np.unique(strata[rows]))
    if labelled is not None and limit < classes:
        raise DataError(
            f"data.limit is {limit}, but there are {classes} labels.",
            path=sources[0].files[0],
            remedy=f"Set data.limit to {classes * 10} or more.",
        )
    kept = draw(keys[rows], strata[rows], limit)
    fates[rows[~kept]] = Fate.OVER_LIMIT


def _write_rows(
    folder: Path,
    taken: Taken,
    decisions: Decisions,
    sources: tuple[Source, ...],
    quarantine: Quarantine,
    progress: ProgressSink,
) -> None:
    names = {ROLES.index(source.role): source.name for source in sources}
    with ExitStack() as stack:
        files: list[IO[bytes]] = [stack.enter_context((folder / f"{split}.jsonl").open("wb")) for split in SPLITS]
        spill = stack.enter_context(taken.spill_path.open("rb"))
        for index, line in enumerate(spill):
            fate = int(decisions.fates[index])
            if fate == Fate.KEPT:
                files[int(decisions.splits[index])].write(line)
            elif fate in REASONS:
                file, row = int(taken.columns.files[index]), int(taken.rows[index])
                quarantine.add(names[file], row, REASONS[Fate(fate)], line.decode().rstrip("\n"))
    total = len(decisions.fates)
    progress(Progress("writing rows", total, total))


# --- checks -------------------------------------------------------------------------------------------------------


def _check_ids(taken: Taken, config: DataConfig, sources: tuple[Source, ...]) -> None:
    if config.id is None:
        return
    for source in sources:
        ids = taken.columns.ids[taken.columns.files == ROLES.index(source.role)]
        if len(ids) > 1 and (ids == ids[0]).all():
            raise DataError(
                f"The column {config.id!r} holds the same id in all {len(ids)} rows.",
                path=source.files[0],
                remedy="Set data.id to a column of unique ids, or leave it out.",
            )


def _check_train_left(fates: U8, files: U8, sources: tuple[Source, ...]) -> None:
    own = fates[files == TRAIN_FILE]
    if (own == Fate.KEPT).any():
        return
    overlap = int(np.isin(own, [Fate.OVERLAP_EXACT, Fate.OVERLAP_NEAR]).sum())
    conflicts = int((own == Fate.CONFLICT).sum())
    raise DataError(
        f"No row is left for training: {overlap} are in the validation or test file too, {conflicts} have the text of "
        "another row with a different label.",
        path=sources[0].files[0],
        remedy="Give different files for data.train, data.validation and data.test." if overlap else None,
    )


def _check_splits(fates: U8, splits: U8, sources: tuple[Source, ...]) -> None:
    kept = splits[fates == Fate.KEPT]
    for split in (TRAIN, VALIDATION, TEST):
        if not (kept == split).any():
            raise DataError(
                f"{len(kept)} usable rows are too few: no row is left for {SPLITS[split]}.",
                path=sources[0].files[0],
                remedy="Give more rows, or larger shares in data.split.",
            )


def _cluster_warnings(clusters: Clusters, numbers: I64, rows: int) -> list[str]:
    warnings: list[str] = []
    _, sizes = np.unique(numbers, return_counts=True)
    if rows >= 20 and sizes.max() > rows / 10:
        warnings.append(
            f"{int(sizes.max())} of {rows} rows are variations of one text and stay in one split; "
            "a higher data.near_duplicates would part them."
        )
    if clusters.truncated:
        warnings.append(
            "So many rows are alike that not all of them were compared with each other: near-duplicates may be left."
        )
    return warnings
