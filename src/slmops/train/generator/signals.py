"""What teachers left on disk for the tokens of the answers, brought to the student's tokens.

Checked before training starts: the signals belong to this tokenizer (or are aligned by text, where that is wanted), to
these rows and to this temperature. A token that the student's trimmed vocabulary lacks has its mass in the tail.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from slmops.artifacts import Dataset
from slmops.artifacts.token_signals import TokenSignals, checksum
from slmops.chat import ChatTokenizer
from slmops.errors import DataError
from slmops.train.generator.answers import EncodedRow, ToMessages
from slmops.train.losses import NOTHING

SPLIT = "train"


@dataclass(frozen=True)
class Heard:
    """One teacher's view of the supervised tokens of a batch.

    ``ids`` int64 ``[tokens, k]``: the student's ids, -1 for a token that it lacks; ``logs`` ``[tokens, k]``;
    ``tail`` ``[tokens]``: of everything else; ``following`` ``[tokens]``: of the token that came; ``known``
    ``[tokens]``: 1 where the teacher was heard.
    """

    ids: Tensor
    logs: Tensor
    tail: Tensor
    following: Tensor
    known: Tensor


class TeacherTokens:
    """One teacher's signals, row by row as the student reads them."""

    def __init__(self, signals: TokenSignals, rows: Sequence[int], places: Sequence[NDArray[np.int64]] | None) -> None:
        """``rows``: the signals' row of each of the student's; ``places``: for each of the student's supervised tokens
        the teacher's token at the same place of the text, -1 for none. None: they are the same tokens.
        """
        self.signals, self._rows, self._places = signals, rows, places
        self.lookup: Tensor | None = None

    def batch(self, indices: Sequence[int]) -> Heard:
        """Of the student's rows at ``indices``, one after the other."""
        records, known = [], []
        for index in indices:
            found = self.signals.of_row(self._rows[index])
            if self._places is None:
                known.append(np.ones(len(found), dtype=np.float32))
            else:
                places = self._places[index]
                known.append((places >= 0).astype(np.float32))
                found = found[np.maximum(places, 0)]
            records.append(found)
        whole = np.concatenate(records)
        ids = torch.from_numpy(whole["ids"].astype(np.int64))
        logs, tail, following = (torch.from_numpy(whole[name].astype(np.float32)) for name in ("logs", "tail", "next"))
        if self.lookup is not None:
            ids, logs, tail = to_student(ids, logs, tail, self.lookup)
        return Heard(ids, logs, tail, following, torch.from_numpy(np.concatenate(known)))


def to_student(ids: Tensor, logs: Tensor, tail: Tensor, lookup: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Teacher's ids to the student's by ``lookup`` ``[teacher's vocabulary]``, -1 for a token that the student lacks:
    its mass goes into the tail.
    """
    mapped = lookup[ids]
    lost = mapped < 0
    dropped = logs.masked_fill(~lost, NOTHING).logsumexp(dim=-1)
    return mapped, logs.masked_fill(lost, NOTHING), torch.logaddexp(tail, dropped)


def student_ids(vocabulary: int, kept_ids: Sequence[int] | None, student_vocabulary: int) -> Tensor | None:
    """Where each of the teacher's tokens stands in the student's vocabulary, -1 for nowhere; None: all as they are."""
    if kept_ids is None and student_vocabulary >= vocabulary:
        return None
    lookup = torch.full((vocabulary,), -1, dtype=torch.int64)
    kept = range(min(vocabulary, student_vocabulary)) if kept_ids is None else kept_ids
    lookup[list(kept)] = torch.arange(len(kept))
    return lookup


def read_teacher_tokens(
    folder: Path,
    rows: Sequence[EncodedRow],
    *,
    tokenizer_digest: str,
    kept_ids: Sequence[int] | None,
    student_vocabulary: int,
    temperature: float,
    max_tokens: int,
) -> TeacherTokens:
    """Signals of a teacher with the student's tokenizer. ``rows``: the student's, in the order of the data set.

    Raises:
        DataError: they belong to another tokenizer, temperature, or to other rows.
    """
    signals = TokenSignals.read(folder, SPLIT)
    header = signals.header
    if header.tokenizer != tokenizer_digest:
        raise DataError(
            f"The teacher's token signals belong to another tokenizer ({header.tokenizer[:12]}…, the student's is "
            f"{tokenizer_digest[:12]}…): its tokens are not the student's.",
            path=folder,
            remedy="Choose a student of the teacher's family, or learn by distill.losses.uld.",
        )
    _check_same(signals, folder, temperature, max_tokens)
    whole = kept_ids if kept_ids is not None else range(max(header.vocabulary, student_vocabulary))
    found = [int(row) for row in np.flatnonzero(signals.rows["tokens"])]
    same = len(found) == len(rows) and all(
        checksum([whole[token] for token in row.tokens]) == signals.rows["checksum"][index]
        and sum(row.supervised[1:]) == signals.rows["tokens"][index]
        for row, index in zip(rows, found, strict=True)
    )
    if not same:
        raise _other_rows(folder)
    teacher = TeacherTokens(signals, found, None)
    teacher.lookup = student_ids(header.vocabulary, kept_ids, student_vocabulary)
    return teacher


def align_teacher_tokens(
    folder: Path,
    dataset: Dataset,
    rows: Sequence[EncodedRow],
    *,
    tokenizer: ChatTokenizer,
    teacher_tokenizer: ChatTokenizer,
    to_messages: ToMessages,
    temperature: float,
    max_tokens: int,
) -> TeacherTokens:
    """Signals of a teacher with any tokenizer: each of the student's tokens hears what the teacher thought at the same
    place of the answer, where both have cut the text there.

    Raises:
        DataError: the signals belong to other rows.
    """
    signals = TokenSignals.read(folder, SPLIT)
    _check_same(signals, folder, temperature, max_tokens)
    found, places = [], []
    asked = list(dataset.rows(SPLIT))
    if len(asked) != len(signals.rows):
        raise _other_rows(folder)
    learnt = iter(rows)
    for index, row in enumerate(asked):
        if row.target is None:
            continue
        ours = tokenizer.encode_training(to_messages(row), row.target)
        if not any(ours.loss_mask[1:max_tokens]):
            continue
        encoded = next(learnt)
        theirs = teacher_tokenizer.encode_training(to_messages(row), row.target)
        if checksum(theirs.input_ids[:max_tokens]) != signals.rows["checksum"][index]:
            raise _other_rows(folder)
        their_starts = prefixes(teacher_tokenizer, theirs.input_ids[:max_tokens], theirs.loss_mask[:max_tokens])
        found.append(index)
        places.append(same_places(prefixes(tokenizer, encoded.tokens, encoded.supervised), their_starts))
    return TeacherTokens(signals, found, places)


def prefixes(tokenizer: ChatTokenizer, ids: Sequence[int], learnt: Sequence[bool]) -> list[str]:
    """The text of the answer before each of its tokens."""
    places = [at for at, on in enumerate(learnt) if on and at]
    return [tokenizer.decode(ids[places[0] : at]) if at > places[0] else "" for at in places]


def same_places(ours: Sequence[str], theirs: Sequence[str]) -> NDArray[np.int64]:
    """For each of our prefixes the place of the same among theirs, -1 for none."""
    at = {prefix: place for place, prefix in reversed(list(enumerate(theirs)))}
    return np.array([at.get(prefix, -1) for prefix in ours], dtype=np.int64)


def _check_same(signals: TokenSignals, folder: Path, temperature: float, max_tokens: int) -> None:
    for name, ours, theirs in (
        ("distill.temperature", temperature, signals.header.temperature),
        ("train.max_tokens", max_tokens, signals.header.max_tokens),
    ):
        if ours != theirs:
            raise DataError(
                f"The teacher's token signals were kept with {name} {theirs:g}, and the student is to learn with "
                f"{ours:g}.",
                path=folder,
                remedy="Keep them again with the same value.",
            )


def _other_rows(folder: Path) -> DataError:
    return DataError(
        "The teacher's token signals belong to other rows than the student learns from.",
        path=folder,
        remedy="Delete the artifact and run again.",
    )
