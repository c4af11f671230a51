"""Stage 1 for open tasks with a local teacher: what it thinks of every token of the answers, kept for all epochs.

Guarantees: the size is known before a weight is loaded, and refused where the disk has no room for it; what is written
belongs to one tokenizer and to exactly these tokens (:mod:`slmops.artifacts.token_signals`); a killed run goes on
behind the last piece that was written; the teacher's probabilities never pile up in memory.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from slmops.artifacts import Dataset, Draft, Message, Row
from slmops.artifacts.token_signals import FLOOR, ROW_DTYPE, SignalHeader, checksum
from slmops.chat import ChatTokenizer
from slmops.errors import DataError, StorageError, TeacherError
from slmops.progress import Progress, ProgressSink, ignore

PIECE_ROWS = 64
SPARE_BYTES = 256 << 20
"""Left free on the disk for everybody else."""
SPLIT = "train"

ToMessages = Callable[[Row], tuple[Message, ...]]


class TopTokens(Protocol):
    """As :class:`slmops.runtime.token_teacher.TopTokens`."""

    @property
    def ids(self) -> NDArray[np.int64]: ...
    @property
    def logs(self) -> NDArray[np.float32]: ...
    @property
    def tail(self) -> NDArray[np.float32]: ...
    @property
    def next(self) -> NDArray[np.float32]: ...


class TokenTeacher(Protocol):
    """As :class:`slmops.runtime.token_teacher.TokenTeacher`."""

    @property
    def vocabulary(self) -> int: ...

    def top(
        self, sequences: Sequence[Sequence[int]], wanted: Sequence[Sequence[int]], top_k: int, temperature: float
    ) -> Sequence[TopTokens]: ...


@dataclass(frozen=True)
class SignalPlan:
    """What will be asked: ids of each row, and the places of its tokens that are learnt (none: the row is left out)."""

    header: SignalHeader
    sequences: Sequence[Sequence[int]]
    wanted: Sequence[Sequence[int]]

    @property
    def tokens(self) -> int:
        return sum(map(len, self.wanted))

    @property
    def size_bytes(self) -> int:
        return self.tokens * self.header.token_bytes + len(self.sequences) * ROW_DTYPE.itemsize


def plan_token_signals(
    dataset: Dataset,
    tokenizer: ChatTokenizer,
    to_messages: ToMessages,
    *,
    tokenizer_digest: str,
    vocabulary: int,
    top_k: int,
    temperature: float,
    max_tokens: int,
) -> SignalPlan:
    """Cut and mark the rows as training does, so that the size is known before the teacher is loaded."""
    sequences: list[list[int]] = []
    wanted: list[list[int]] = []
    for row in dataset.rows(SPLIT):
        if row.target is None:
            sequences.append([])
            wanted.append([])
            continue
        chat = tokenizer.encode_training(to_messages(row), row.target)
        sequences.append(chat.input_ids[:max_tokens])
        wanted.append([at for at, on in enumerate(chat.loss_mask[:max_tokens]) if on and at])
    header = SignalHeader(tokenizer_digest, vocabulary, min(top_k, vocabulary - 1), temperature, max_tokens)
    plan = SignalPlan(header, sequences, wanted)
    if not plan.tokens:
        raise DataError(
            f"No row of the {SPLIT} split has an answer that fits into {max_tokens} tokens.",
            path=dataset.path,
            remedy="Raise train.max_tokens, or look at the data with: slmops data RECIPE",
        )
    return plan


def check_room(plan: SignalPlan, folder: Path) -> None:
    """Raises :class:`StorageError` where ``folder``'s disk cannot hold what is planned."""
    free_bytes = shutil.disk_usage(folder).free
    if plan.size_bytes + SPARE_BYTES > free_bytes:
        raise StorageError(
            f"The teacher's signals for {plan.tokens:,} tokens need {plan.size_bytes / 1e6:,.1f} MB "
            f"({plan.header.token_bytes} bytes a token) and {SPARE_BYTES / 1e6:,.0f} MB beside them, and "
            f"{free_bytes / 1e6:,.1f} MB are free at {folder}.",
            remedy="Free some space, lower distill.top_k or data.limit, or choose another --store.",
        )


def keep_token_signals(
    plan: SignalPlan, open_teacher: Callable[[], TokenTeacher], draft: Draft, *, progress: ProgressSink = ignore
) -> None:
    """Ask the teacher for every token that is planned, and write the signals into ``draft.path``.

    Raises:
        StorageError: the disk has no room; nothing was done then.
        TeacherError: the teacher's answer is not a distribution.
    """
    started_s = time.monotonic()
    check_room(plan, draft.work)
    tokens_path, state_path = draft.work / f"tokens_{SPLIT}.npy", draft.work / "token_signals_state.json"
    identity = {**asdict(plan.header), "tokens": plan.tokens, "rows": len(plan.sequences)}
    rows = row_table(plan)
    done_rows = _rows_done(state_path, tokens_path, identity)
    kept = np.lib.format.open_memmap(
        tokens_path, mode="r+" if done_rows else "w+", dtype=plan.header.dtype, shape=(plan.tokens,)
    )
    teacher = open_teacher() if done_rows < len(plan.sequences) else None
    for first in range(done_rows, len(plan.sequences), PIECE_ROWS):
        piece = range(first, min(first + PIECE_ROWS, len(plan.sequences)))
        asked = [row for row in piece if plan.wanted[row]]
        if teacher is not None and asked:
            answers = teacher.top(
                [plan.sequences[row] for row in asked],
                [plan.wanted[row] for row in asked],
                plan.header.top_k,
                plan.header.temperature,
            )
            for row, answer in zip(asked, answers, strict=True):
                start = int(rows["start"][row])
                kept[start : start + len(plan.wanted[row])] = _record(answer, plan.header)
        kept.flush()
        temporary = state_path.with_suffix(".tmp")
        temporary.write_text(json.dumps({**identity, "done_rows": piece.stop}), "utf-8")
        temporary.replace(state_path)
        progress(Progress("token signals", piece.stop, len(plan.sequences), "rows", f"{plan.size_bytes / 1e6:.1f} MB"))
    del kept
    np.save(draft.path / f"rows_{SPLIT}.npy", rows)
    shutil.move(tokens_path, draft.path / tokens_path.name)
    plan.header.write(draft.path)
    draft.metrics["token_signals"] = {
        "tokens": plan.tokens,
        "token_bytes": plan.header.token_bytes,
        "size_bytes": plan.size_bytes,
        "seconds": round(time.monotonic() - started_s, 3),
    }


def row_table(plan: SignalPlan) -> NDArray[Any]:
    table = np.zeros(len(plan.sequences), dtype=ROW_DTYPE)
    table["tokens"] = [len(places) for places in plan.wanted]
    table["start"] = np.cumsum(table["tokens"], dtype=np.int64) - table["tokens"]
    table["checksum"] = [checksum(sequence) for sequence in plan.sequences]
    return table


def _record(answer: TopTokens, header: SignalHeader) -> NDArray[Any]:
    parts = (answer.logs, answer.next)
    if not all(np.isfinite(part).all() for part in parts) or np.isnan(answer.tail).any():
        raise TeacherError(
            "The teacher's probabilities of tokens are not a distribution: some are NaN or infinite.",
            remedy="Adapt it again with a lower teacher.learning_rate.",
        )
    record = np.zeros(len(answer.ids), dtype=header.dtype)
    record["ids"] = answer.ids
    record["logs"] = np.maximum(answer.logs, FLOOR)
    record["tail"] = np.maximum(answer.tail, FLOOR)
    record["next"] = np.maximum(answer.next, FLOOR)
    return record


def _rows_done(state_path: Path, tokens_path: Path, identity: dict[str, Any]) -> int:
    """How many rows an earlier run of the same work has written; 0 where it was other work."""
    if not tokens_path.exists():
        return 0
    try:
        state = json.loads(state_path.read_text("utf-8"))
    except (FileNotFoundError, ValueError):
        return 0
    done = state.pop("done_rows", 0)
    return int(done) if state == identity else 0
