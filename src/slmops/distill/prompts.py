"""What the teacher and the student are shown for a row.

Pure: the same row, task and labels give the same messages. The teacher is told the form of the answer, so that it can
be checked (:mod:`slmops.distill.checks`); the student learns the form from the answers and is told next to nothing,
because every token of its prompt is paid for on the device.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

from slmops.artifacts import Message, Row
from slmops.distill.teachers import TeacherRequest
from slmops.recipe import CLOSED_TASKS, Task, TeacherConfig

FEW_LABELS = 8
"""Up to so many labels are listed to the student."""


Reasoning = Literal["none", "strip", "keep"]


def reasoning_of(task: Task, wanted: Reasoning | None) -> Reasoning:
    """Whether the teacher reasons first: as ``wanted``, or where it helps. What is a label is never kept with it.

    A worked solution helps teacher and student alike in mathematics; between two sentences it helps the teacher, and
    the student has a label to learn. Source: J. Wei et al., "Chain-of-Thought Prompting Elicits Reasoning in Large
    Language Models", arXiv:2201.11903.
    """
    chosen: Reasoning = wanted or {"math": "keep", "nli": "strip"}.get(task, "none")  # type: ignore[assignment]
    return "strip" if chosen == "keep" and task != "math" else chosen


def teacher_messages(
    task: Task, labels: Sequence[str] | None, row: Row, system: str | None = None, reasoning: Reasoning = "none"
) -> tuple[Message, ...]:
    """The row's messages, behind one system message: ``system`` (the recipe's ``teacher.system``), the row's own
    system message, and the form that the answer must have.
    """
    return _with_system(row, [system, *_own_system(row), answer_form(task, labels, reasoning)])


def teacher_request(
    task: Task,
    labels: Sequence[str] | None,
    row: Row,
    config: TeacherConfig,
    *,
    temperature: float | None = None,
    messages: tuple[Message, ...] | None = None,
) -> TeacherRequest:
    """The request for a row's answer. ``messages`` instead of the teacher's own, for one that knows the task."""
    reasoning = reasoning_of(task, config.reasoning) if config.remote or config.reasoning else _local_reasoning(task)
    shown = messages or teacher_messages(task, labels, row, config.system, reasoning)
    wanted = config.remote and config.structured is not False and messages is None
    return TeacherRequest(
        shown,
        max_tokens=config.max_tokens,
        temperature=config.temperature if temperature is None else temperature,
        response_format=response_format(task, labels, reasoning, config.answer_schema) if wanted else None,
    )


def _local_reasoning(task: Task) -> Reasoning:
    """A small model here is not asked to reason about labels: it would not come to an end."""
    return "keep" if task == "math" else "none"


def answer_form(task: Task, labels: Sequence[str] | None, reasoning: Reasoning = "none") -> str:
    """The instruction that says what a good answer looks like."""
    if task in CLOSED_TASKS:
        listed = "\n".join(f"- {label}" for label in labels or ())
        if reasoning != "none":
            what = "how the second text follows from the first" if task == "nli" else "which label fits"
            return (
                f"Reason in at most three sentences about {what}. End with a line that holds only 'Answer: ' and "
                f"exactly one of the labels below, spelled as it is here.\n{listed}"
            )
        return f"Answer with exactly one of the labels below, spelled as it is here, and nothing else.\n{listed}"
    if task == "math":
        steps = (
            "Answer without showing the steps." if reasoning == "none" else "Solve the problem step by step, briefly."
        )
        return f"{steps} End with a line that holds only '#### ' and the final number, without units."
    form = {
        "extraction": "Answer with one JSON object and nothing else: no explanation, no code fence.",
        "qa": "Answer the question directly and plainly, without preamble.",
        "summarization": "Answer with the summary only, in plain text: what matters, nothing that is not in the text.",
        "conversation": "Answer the last message in plain text, as the one who is spoken to, without comments about "
        "the answer.",
    }.get(task, "Answer in plain text, directly, without comments about the answer.")
    if reasoning == "none":
        return form
    return f"First reason briefly between <think> and </think>. Then, after </think>: {form[0].lower()}{form[1:]}"


def response_format(
    task: Task, labels: Sequence[str] | None, reasoning: Reasoning, schema: Mapping[str, Any] | None
) -> dict[str, Any] | None:
    """What OpenAI's API calls ``response_format``, where the task's answers have a form that JSON can hold.

    Labels become ``{"answer": label}``, with ``"reasoning"`` before it where it is asked for: what comes first is
    written first. Source of that order mattering: Z. R. Tam et al., "Let Me Speak Freely?", arXiv:2408.02442.
    """
    if task in CLOSED_TASKS:
        properties: dict[str, Any] = {} if reasoning == "none" else {"reasoning": {"type": "string"}}
        properties["answer"] = {"type": "string", "enum": list(labels or ())}
        return _json_schema("answer", properties)
    if task == "extraction" and reasoning == "none":
        if schema is None:
            return {"type": "json_object"}
        return {"type": "json_schema", "json_schema": {"name": "answer", "schema": dict(schema)}}
    return None


def texts_format() -> dict[str, Any]:
    """The form of a list of texts."""
    return _json_schema("texts", {"texts": {"type": "array", "items": {"type": "string"}}})


def score_format() -> dict[str, Any]:
    """The form of a judge's answer."""
    return _json_schema(
        "judgement", {"reason": {"type": "string"}, "score": {"type": "integer", "enum": [1, 2, 3, 4, 5]}}
    )


def _json_schema(name: str, properties: dict[str, Any]) -> dict[str, Any]:
    schema = {"type": "object", "properties": properties, "required": [*properties], "additionalProperties": False}
    return {"type": "json_schema", "json_schema": {"name": name, "strict": True, "schema": schema}}


def student_messages(task: Task, labels: Sequence[str] | None, row: Row) -> tuple[Message, ...]:
    """The row's messages; a row without a system message gets one short line where the task needs a form."""
    own = _own_system(row)
    return row.messages if own else _with_system(row, [_short_form(task, labels)])


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
