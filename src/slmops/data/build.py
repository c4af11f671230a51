"""Records to rows: templates or chat messages, cleaned, each with what the later decisions need.

Guarantees: a built row ends with a user's turn, holds no NUL and no half character, and is in Unicode NFC without
blanks around; what cannot be built says why in words that group well (no row's own text in them).
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

from slmops.artifacts import ChatRole, Message, Row
from slmops.data.readers import Record
from slmops.data.templates import ABSENT, MissingValueError, Template, lookup, parse_template, to_text
from slmops.data.text import clean, has_final_number
from slmops.errors import DataError
from slmops.recipe import DataConfig, Task

ROLES = ("system", "user", "assistant")
ROWS_TO_SEE_COLUMNS = 1000
MAX_COLUMNS_NAMED = 30


class UnusableRowError(Exception):
    """A row that cannot be used; the message is the reason for the quarantine."""


@dataclass(frozen=True)
class Built:
    """``content`` is what two rows are compared by: all turns but the system's. ``stratum`` is the stratify column's
    value as text, or ``""``."""

    row: Row
    content: str
    stratum: str


@dataclass(frozen=True)
class RowBuilder:
    """How one recipe turns records into rows."""

    config: DataConfig
    task: Task
    input: Template | None
    target: Template | None

    @classmethod
    def of(cls, config: DataConfig, task: Task) -> RowBuilder:
        """Parse the templates. Running text is a turn without an answer. Raises :class:`RecipeError`."""
        if config.text is not None:
            return cls(config, task, parse_template(config.text, key="data.text"), None)
        if config.messages is not None:
            return cls(config, task, None, None)
        target = None if config.target is None else parse_template(config.target, key="data.target")
        return cls(config, task, parse_template(config.input), target)

    @property
    def names(self) -> dict[str, str]:
        """Columns (or dotted paths) that must be there, each with the recipe's key that names it."""
        names: dict[str, str] = {}
        shown = "data.input" if self.config.text is None else "data.text"
        for key, template in ((shown, self.input), ("data.target", self.target)):
            for name in template.required if template else ():
                names.setdefault(name, key)
        for key, column in (
            ("data.messages", self.config.messages),
            ("data.id", self.config.id),
            ("data.split.stratify", self.config.split.stratify),
        ):
            if column is not None:
                names.setdefault(column, key)
        return names

    @property
    def single_column(self) -> bool:
        """Whether a row's text is one column's, and not several joined."""
        return self.input is not None and len(self.input.required) == 1

    @property
    def top_columns(self) -> tuple[str, ...]:
        """Columns to read from a file that can leave the others out."""
        return tuple(dict.fromkeys(top for name in self.names for top in (name, name.partition(".")[0])))

    def build(self, record: Record, automatic_id: str, id_prefix: str) -> Built:
        """The row of a record.

        Raises:
            UnusableRowError: with the reason.
        """
        try:
            messages, target = self._turns(record.values)
        except MissingValueError as reason:
            raise UnusableRowError(str(reason)) from None
        if self.config.system:
            messages = _with_system(self.config.system, messages)
        if target is not None and self.task == "math" and not has_final_number(target):
            raise UnusableRowError("the answer has no final number")
        meta, stratum = self._meta(record.values)
        row = Row(self._id(record.values, automatic_id, id_prefix), tuple(messages), target, meta)
        content = "\n".join(message.content for message in messages if message.role != "system")
        texts = [row.id, content, target or "", *(m.content for m in messages if m.role == "system")]
        if any("\0" in text for text in texts):
            raise UnusableRowError("NUL byte")
        try:
            "".join(texts).encode()
        except UnicodeEncodeError:
            raise UnusableRowError("half of a surrogate pair, which is no character") from None
        return Built(row, content, stratum)

    def _turns(self, values: Mapping[str, Any]) -> tuple[list[Message], str | None]:
        if self.config.messages is not None:
            return _chat(lookup(values, self.config.messages), self.config.messages, self.config.target is None)
        assert self.input is not None
        text = clean(self.input.render(values))
        target = None if self.target is None else clean(self.target.render(values))
        if not text:
            raise MissingValueError("input is empty" if self.config.text is None else "text is empty")
        if target == "":
            raise MissingValueError("target is empty")
        return [Message("user", text)], target

    def _id(self, values: Mapping[str, Any], automatic_id: str, id_prefix: str) -> str:
        if self.config.id is None:
            return automatic_id
        text = to_text(lookup(values, self.config.id))
        if text is None:
            raise UnusableRowError(f"column {self.config.id} (the id) is missing or empty")
        return id_prefix + text.strip()

    def _meta(self, values: Mapping[str, Any]) -> tuple[dict[str, Any], str]:
        column = self.config.split.stratify
        if column is None:
            return {}, ""
        text = to_text(lookup(values, column))
        text = None if text is None else clean(text).replace("\0", "").encode("utf-8", "replace").decode()
        return {column: text}, text or ""


@dataclass
class ColumnWatch:
    """Finds out whether the columns that a recipe names are in a file at all, and stops the reading where not.

    A file with a header says so at once; in JSON a column is missing when none of the first 1,000 objects has it.
    """

    path: Path
    names: Mapping[str, str]
    unseen: set[str] = field(init=False)
    there: dict[str, None] = field(default_factory=dict)
    rows: int = 0

    def __post_init__(self) -> None:
        self.unseen = set(self.names)

    def header(self, columns: Iterable[str]) -> None:
        """Check a file's header. Raises :class:`DataError`."""
        self.there = dict.fromkeys(columns)
        # A dotted path into a column of parquet can only be seen in the rows.
        self.unseen -= {name for name in self.unseen if name in self.there}
        if any(name.partition(".")[0] not in self.there for name in self.unseen):
            self.conclude()

    def see(self, values: Mapping[str, Any]) -> None:
        """Look at one row. Raises :class:`DataError` when enough were seen."""
        if not self.unseen:
            return
        self.rows += 1
        self.unseen -= {name for name in self.unseen if lookup(values, name) is not ABSENT}
        if len(self.there) < MAX_COLUMNS_NAMED:
            for name, value in values.items():
                self.there[name] = None
                if isinstance(value, dict):
                    self.there.update(dict.fromkeys(f"{name}.{inner}" for inner in value))
        if self.rows >= ROWS_TO_SEE_COLUMNS:
            self.conclude()

    def conclude(self) -> None:
        """Raise :class:`DataError` if a column was never seen."""
        missing = next((name for name in self.names if name in self.unseen), None)
        if missing is None or not self.there:
            return
        there = [*self.there][:MAX_COLUMNS_NAMED]
        near = difflib.get_close_matches(missing, there, n=1) or [n for n in there if n.lower() == missing.lower()]
        remedy = f"Did you mean {near[0]!r}? " if near else ""
        raise DataError(
            f"There is no column {missing!r}; there are: {', '.join(there)}.",
            path=self.path,
            remedy=f"{remedy}Set {self.names[missing]}.",
        )


def _with_system(system: str, messages: list[Message]) -> list[Message]:
    """``system`` before the row. A row's own system message follows in the same turn: templates take only one."""
    if messages[0].role == "system":
        return [Message("system", f"{system}\n\n{messages[0].content}"), *messages[1:]]
    return [Message("system", system), *messages]


def _chat(value: Any, column: str, answers_optional: bool) -> tuple[list[Message], str | None]:
    if value is None or value is ABSENT or value == "":
        raise MissingValueError(f"column {column} is {'missing' if value is ABSENT else 'empty'}")
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            raise MissingValueError(f"column {column} is not JSON") from None
    if not isinstance(value, list) or not value:
        raise MissingValueError(f"column {column} is not a list of messages")
    messages = [_message(raw, column) for raw in value]
    target = messages.pop().content if messages[-1].role == "assistant" else None
    if target is None and not answers_optional:
        raise MissingValueError("the last message is not the assistant's")
    if any(message.role == "system" for message in messages[1:]):
        raise MissingValueError("a system message after the first")
    if not messages or messages[-1].role != "user":
        raise MissingValueError("the last message before the answer is not the user's")
    return messages, target


def _message(raw: Any, column: str) -> Message:
    if not isinstance(raw, dict) or "role" not in raw or "content" not in raw:
        raise MissingValueError(f"column {column} holds a message without role and content")
    if raw["role"] not in ROLES:
        raise MissingValueError(f"a message of a role other than {', '.join(ROLES)}")
    content = raw["content"]
    if isinstance(content, list):  # content parts, as chat APIs have them
        content = _joined_parts(content)
    if not isinstance(content, str):
        raise MissingValueError("a message whose content is not text")
    content = clean(content)
    if not content:
        raise MissingValueError("an empty message")
    return Message(cast("ChatRole", raw["role"]), content)


def _joined_parts(parts: list[Any]) -> str | None:
    """The text of content parts; None where one of them is an image or the like."""
    texts = [part.get("text") for part in parts if isinstance(part, dict) and part.get("type") == "text"]
    strings = [text for text in texts if isinstance(text, str)]
    return "".join(strings) if len(strings) == len(parts) else None
