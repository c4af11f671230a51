"""Where what is watched lies, and how a server begins to record there.

::

    <store>/monitor/events.db     events, feedback, judgements; or a database by URL
    <store>/monitor/subject.key   the key of subjects' hashes; never leaves
    <store>/monitor/running/      a locked file for each server that records
    <store>/monitor/alerts.json   rules that fired last time
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from slmops.errors import MissingExtraError
from slmops.monitor.policy import MonitorPolicy
from slmops.monitor.prepare import Preparation, format_check
from slmops.monitor.reference import read_reference
from slmops.privacy import SubjectKey

if TYPE_CHECKING:
    from slmops.monitor.log import EventLog
    from slmops.monitor.writer import EventRecorder

DATABASE_VARIABLE = "SLMOPS_EVENTS"


@dataclass(frozen=True)
class Place:
    """``database``: URL, or None for the file in the store."""

    folder: Path
    database: str | None = None

    @classmethod
    def of(cls, store: Path, policy: MonitorPolicy | None = None, database: str | None = None) -> Place:
        return cls(store / "monitor", database or (policy.database if policy else None))

    def open(self, *, create: bool = False) -> EventLog:
        """Raises as :meth:`slmops.monitor.log.EventLog.open`, and :class:`MissingExtraError`."""
        try:
            from slmops.monitor.log import EventLog
        except ModuleNotFoundError as error:
            raise MissingExtraError(f"Watching (it needs {error.name})", "serve") from None
        return EventLog.open(self.database or self.folder / "events.db", create=create)

    def key(self, policy: MonitorPolicy | None = None) -> SubjectKey:
        """Raises as :meth:`slmops.privacy.SubjectKey.at`."""
        return SubjectKey.at(policy.key if policy and policy.key else self.folder / "subject.key")


def open_recorder(
    place: Place,
    policy: MonitorPolicy,
    *,
    model: str,
    version: str,
    bundle: Path | None = None,
    task: str = "",
    labels: Sequence[str] = (),
    joules: Callable[[], float | None] = lambda: None,
) -> EventRecorder:
    """A recorder for one served model. ``bundle``: whose reference tells how new a text is; ``version``: its digest.

    Raises:
        UsageError: the policy names a recognizer that is not there.
        StorageError: the place cannot be written to.
    """
    recognizers = policy.recognizers()
    reference = read_reference(bundle) if bundle is not None else None
    log = place.open(create=True)
    from slmops.monitor.writer import EventRecorder

    preparation = Preparation(
        policy,
        place.key(policy),
        recognizers,
        model=model,
        version=version,
        format_ok=format_check(task, labels),
        surprisal=None if reference is None else reference.surprisal,
    )
    return EventRecorder.open(log, preparation, folder=place.folder, joules=joules)
