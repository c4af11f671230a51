"""What the teacher and the student are shown for a row.

Pure: the same row, task and labels give the same messages. The teacher is told the form of the answer, so that it can
be checked (:mod:`slmops.distill.checks`); the student learns the form from the answers and is told next to nothing,
because every token of its prompt is paid for on the device.
"""

from __future__ import annotations

from collections.abc import Sequence

from slmops.artifacts import Message, Row
from slmops.recipe import CLOSED_TASKS, Task

FEW_LABELS = 8
"""Up to so many labels are listed to the student."""


def teacher_messages(
    task: Task, labels: Sequence[str] | None, row: Row, system: str | None = None
) -> tuple[Message, ...]:
    """The row's messages, behind one system message: ``system`` (the recipe's ``teacher.system``), the row's own
    system message, and the form that the answer must have.
    """
    return _with_system(row, [system, *_own_system(row), answer_form(task, labels)])


def student_messages(task: Task, labels: Sequence[str] | None, row: Row) -> tuple[Message, ...]:
    """The row's messages; a row without a system message gets one short line where the task needs a form."""
    own = _own_system(row)
    return row.messages if own else _with_system(row, [_short_form(task, labels)])


def answer_form(task: Task, labels: Sequence[str] | None) -> str:
    """The instruction that says what a good answer looks like."""
    if task in CLOSED_TASKS:
        listed = "\n".join(f"- {label}" for label in labels or ())
        return f"Answer with exactly one of the labels below, spelled as it is here, and nothing else.\n{listed}"
    match task:
        case "math":
            return (
                "Solve the problem step by step, briefly. End with a line that holds only '#### ' and the final "
                "number, without units."
            )
        case "extraction":
            return "Answer with one JSON object and nothing else: no explanation, no code fence."
        case "qa":
            return "Answer the question directly and plainly, without preamble."
        case "summarization":
            return "Answer with the summary only, in plain text."
        case _:
            return "Answer in plain text, directly, without comments about the answer."


def _short_form(task: Task, labels: Sequence[str] | None) -> str | None:
    if task in CLOSED_TASKS:
        few = labels is not None and len(labels) <= FEW_LABELS
        return f"Answer with one of: {', '.join(labels or ())}." if few else "Answer with the label."
    return {"math": "Solve. End with: #### number", "extraction": "Answer with one JSON object."}.get(task)


def _own_system(row: Row) -> list[str]:
    return [message.content for message in row.messages if message.role == "system"]


def _with_system(row: Row, parts: Sequence[str | None]) -> tuple[Message, ...]:
    text = "\n\n".join(part for part in parts if part)
    turns = tuple(message for message in row.messages if message.role != "system")
    return (Message("system", text), *turns) if text else turns
