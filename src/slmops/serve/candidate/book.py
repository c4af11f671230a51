"""What a rollout leaves on disk: ``state.json``, replaced as a whole, and ``journal.jsonl``, which only grows.

Guarantees: a decision is in the journal, flushed, before it takes effect, and a server that is killed in between makes
it take effect when it starts again; counts of the last second may be lost. No text of a caller is in either file.
"""

from __future__ import annotations

import json
import os
import secrets
import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from slmops.artifacts.base import sync_directory
from slmops.errors import CorruptArtifactError, StorageError
from slmops.rollout import Policy, Tally

Outcome = Literal["running", "over", "back"]
SCHEMA = 1
STATE, JOURNAL = "state.json", "journal.jsonl"
ROLLOUT = "rollout"
"""The folder of rollouts, beside the candidate's bundle unless another is named."""


def pair_name(old: str, new: str) -> str:
    """The folder of one rollout, by the digests of both versions."""
    return f"{old[:12]}-{new[:12]}"


@dataclass(frozen=True)
class State:
    """
    ``old``, ``new``  digests of the version in use and of the candidate
    ``key``           hexadecimal, secret: who gets which version follows from it
    ``step``          -1: the shadow; then the number of the share
    ``tally``         seen in this step
    ``slow_ms``       from when on an answer is slow; None until enough was seen of the old version
    ``number``        of the last line of the journal that this state knows
    """

    old: str
    new: str
    key: str
    policy: Policy
    step: int
    outcome: Outcome = "running"
    tally: Tally = field(default_factory=Tally)
    slow_ms: float | None = None
    number: int = 0

    @property
    def share(self) -> float:
        """Of the callers that get the candidate."""
        if self.outcome != "running":
            return 1.0 if self.outcome == "over" else 0.0
        return 0.0 if self.step < 0 else self.policy.shares[self.step]

    @property
    def stage(self) -> str:
        """In words: ``shadow``, ``5 %``, ``over``, ``back``."""
        if self.outcome != "running":
            return self.outcome
        return "shadow" if self.step < 0 else f"{100 * self.share:g} %"

    def after(self, action: str) -> State:
        """Where a decision leads: a new step begins with nothing seen."""
        match action:
            case "further":
                return replace(self, step=self.step + 1, tally=Tally())
            case "over" | "back":
                return replace(self, outcome="over" if action == "over" else "back")
            case _:
                return self

    def to_json(self) -> dict[str, Any]:
        return {
            "schema": SCHEMA,
            **{name: getattr(self, name) for name in ("old", "new", "key", "step", "outcome", "slow_ms", "number")},
            "policy": self.policy.to_json(),
            "tally": self.tally.to_json(),
        }

    @classmethod
    def from_json(cls, raw: Mapping[str, Any]) -> State:
        plain = {name: raw[name] for name in ("old", "new", "key", "step", "outcome", "slow_ms", "number")}
        return cls(policy=Policy.from_json(raw["policy"]), tally=Tally.from_json(raw["tally"]), **plain)


class Book:
    """The two files in ``folder``."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def begin(self, old: str, new: str, policy: Policy) -> State:
        """The state of a rollout of ``new`` beside ``old``: that which is here, or a first one.

        Raises:
            StorageError: the folder cannot be written to.
            CorruptArtifactError: what is here cannot be read, or belongs to other versions.
        """
        found = self.read()
        if found is not None:
            if (found.old, found.new) != (old, new):
                raise CorruptArtifactError(
                    f"{self.folder} tells of the rollout of {found.new[:12]} after {found.old[:12]}, not of {new[:12]} "
                    f"after {old[:12]}.",
                    remedy="Choose another --rollout-folder.",
                )
            self.note(found, "resumed", {"step": found.stage})
            return replace(found, number=found.number + 1)
        state = State(old, new, secrets.token_hex(32), policy, step=-1 if policy.shadow_requests else 0)
        self._made()
        self.note(state, "begun", {"step": state.stage, "old": old, "new": new, "policy": policy.to_json()})
        state = replace(state, number=1)
        self.save(state)
        return state

    def read(self) -> State | None:
        """The state as it was left, with what the journal knows beyond it; None where there is none.

        Raises:
            CorruptArtifactError: it cannot be read.
        """
        path = self.folder / STATE
        try:
            state = State.from_json(json.loads(path.read_text("utf-8")))
        except FileNotFoundError:
            return None
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise CorruptArtifactError(
                f"{path} cannot be read: {error}.", remedy="Delete its folder: the rollout begins anew."
            ) from None
        for entry in self.entries():
            if entry["number"] > state.number:
                state = replace(state.after(entry["event"]), number=entry["number"])
        return state

    def entries(self) -> list[dict[str, Any]]:
        """The journal, oldest first. A line that was torn by a kill is left out."""
        path = self.folder / JOURNAL
        found: list[dict[str, Any]] = []
        for line in path.read_bytes().splitlines() if path.is_file() else ():
            try:
                entry = json.loads(line)
            except ValueError:
                continue
            if isinstance(entry, dict) and isinstance(entry.get("number"), int) and "event" in entry:
                found.append(entry)
        return found

    def note(self, state: State, event: str, more: Mapping[str, Any]) -> None:
        """Add a line, and have it on disk before this returns.

        Raises:
            StorageError: the disk would not take it.
        """
        at = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        line = json.dumps({"number": state.number + 1, "at": at, "event": event, **more}, ensure_ascii=False)
        path = self.folder / JOURNAL
        try:
            with path.open("ab+") as journal:
                end = journal.tell()
                torn = end > 0 and os.pread(journal.fileno(), 1, end - 1) != b"\n"
                journal.write((b"\n" if torn else b"") + line.encode() + b"\n")
                journal.flush()
                os.fsync(journal.fileno())
        except OSError as error:
            raise StorageError.from_os_error(error, "write the rollout's journal to", path) from error

    def save(self, state: State) -> None:
        """Replace the state as a whole.

        Raises:
            StorageError: the disk would not take it; the state before is still there.
        """
        path, temporary = self.folder / STATE, self.folder / f".{STATE}.tmp"
        try:
            with temporary.open("w", encoding="utf-8") as file:
                os.fchmod(file.fileno(), 0o600)  # it holds the key
                file.write(json.dumps(state.to_json()) + "\n")
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
            sync_directory(self.folder)
        except OSError as error:
            raise StorageError.from_os_error(error, "write the rollout's state to", path) from error

    def _made(self) -> None:
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise StorageError.from_os_error(error, "make the folder", self.folder) from error
