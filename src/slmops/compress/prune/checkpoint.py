"""A checkpoint in, a smaller checkpoint out: tokens, layers and widths, zeros."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import torch

from slmops.artifacts import Draft, Message, Row
from slmops.chat import ChatTokenizer
from slmops.chat.files import open_tokenizer, read_object
from slmops.compress.prune.calibration import ToMessages, calibration_batches, check_rows
from slmops.compress.prune.shape import shaped
from slmops.compress.prune.sparsity import NOTE, sparsify
from slmops.compress.prune.stream import Stream, divergence
from slmops.compress.prune.subject import Subject, copy_beside
from slmops.models.cut import Cut
from slmops.models.vocabulary import TrimmedVocabulary, renumber_added_tokens, trim_vocabulary
from slmops.progress import ProgressSink, ignore
from slmops.recipe import PruneConfig

KEEP = "Set compress.prune.vocabulary: keep."


def prune_checkpoint(
    folder: Path,
    draft: Draft,
    config: PruneConfig,
    rows: Sequence[Row],
    *,
    further: Sequence[Row] = (),
    to_messages: ToMessages | None,
    max_tokens: int,
    seed: int,
    progress: ProgressSink = ignore,
) -> None:
    """Fill ``draft`` with the checkpoint at ``folder`` without what ``config`` removes, and not yet trained again.

    ``rows``         for calibration; those of the training split
    ``further``      rows that a trimmed vocabulary has to read as before, beside ``rows``
    ``to_messages``  what a language model is shown for a row; None for a classifier

    What was removed, and how far the model moved by it, goes into ``draft.metrics``.

    Raises:
        ModelError: the model cannot be pruned: of an unknown family, damaged, or with weights that are not finite.
        DataError: no rows to calibrate on.
        UsageError: so much cannot be removed.
    """
    torch.manual_seed(seed)
    check_rows(rows)
    subject = Subject.load(folder)
    before = subject.parameters
    tokens_before = subject.sizes.tokens
    trimmed: TrimmedVocabulary | None = None
    if config.vocabulary == "trim":
        trimmed = trimmed_for(folder, row_texts(folder, [*rows, *further], to_messages), config.common_merges)
        subject = subject.cut(Cut(tokens=trimmed.kept_ids))
    copy_beside(folder, draft.path)
    if trimmed is not None:
        _write_tokenizer(trimmed, draft.path)
    batches = calibration_batches(draft.path, rows, to_messages, count=config.rows, max_tokens=max_tokens, seed=seed)
    result = shaped(subject, batches, config, progress=progress)
    subject = result.subject
    zeros: float | None = None
    if config.sparsity is not None:
        said = Stream(subject, batches).answers()
        zeros = sparsify(subject, batches, config.sparsity, progress=progress)
        draft.metrics["divergence_of_zeros"] = divergence(said, Stream(subject, batches).answers())
    subject.save(draft.path, source=folder, kept_ids=trimmed.kept_ids if trimmed else None)
    sizes = subject.sizes
    draft.metrics |= {
        "parameters": subject.parameters,
        "parameters_before": before,
        "removed": 1 - subject.parameters / before,
        "tokens": sizes.tokens,
        "tokens_before": tokens_before,
        "layers": sizes.layers,
        "layers_gone": sorted(result.gone),
        "heads": sizes.heads,
        "groups": sizes.groups,
        "channels": sizes.channels,
        "hidden": sizes.hidden,
        "divergence": result.divergence,
        "tried": result.tried,
        "calibration_tokens": sum(batch.tokens for batch in batches),
    }
    if zeros is not None:
        draft.metrics |= {"zeros": zeros, "notes": [NOTE]}


def row_texts(folder: Path, rows: Sequence[Row], to_messages: ToMessages | None) -> list[str]:
    """The texts of ``rows`` as the model at ``folder`` reads them."""
    if to_messages is None:
        return [row.text for row in rows]
    chat = ChatTokenizer.load(folder)
    return [
        chat.render([*to_messages(row), Message("assistant", row.target or "")], add_generation_prompt=False)
        for row in rows
    ]


def trimmed_for(folder: Path, texts: Sequence[str], common_merges: int) -> TrimmedVocabulary:
    """The tokenizer at ``folder`` with what ``texts`` need.

    Raises:
        ModelError: the tokenizer is of a kind that cannot be trimmed.
    """
    tokenizer = open_tokenizer(folder / "tokenizer.json")
    return trim_vocabulary(tokenizer, texts, common_merges=common_merges, remedy=KEEP)


def _write_tokenizer(trimmed: TrimmedVocabulary, folder: Path) -> None:
    trimmed.tokenizer.save(str(folder / "tokenizer.json"))
    path = folder / "tokenizer_config.json"
    if path.is_file():
        config = renumber_added_tokens(read_object(path), trimmed.kept_ids)
        path.write_text(json.dumps(config, indent=1, ensure_ascii=False) + "\n", "utf-8")
