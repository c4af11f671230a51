"""What may be kept of a request: the one file that whoever runs a server writes for it, typed and checked.

Without a file: no texts, no slices, everything gone after 30 days.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from slmops.errors import UsageError
from slmops.privacy.names import recognizer
from slmops.privacy.redact import Recognizer

CONTENT = ("off", "sampled", "full")
Content = Literal["off", "sampled", "full"]


class MonitorPolicy(BaseModel):
    """
    ``content``         texts: none, those of a share of the requests, or all; redacted before they are written
    ``sample``          that share
    ``retention_days``  older rows are deleted
    ``database``        URL of a PostgreSQL database; left out: SQLite in the store
    ``names``           people's names in texts: ``none``, ``cues``, or ``module:function``
    ``slices``          what callers may say of a request to have figures by it; other keys are not kept
    ``key``             file with the key of subjects' hashes; left out: in the store. Servers of one database share it
    ``sketches_per_s``  texts of so many requests a second become numbers for the drift tests; 0: none
    ``max_waiting``     requests that wait to be written; further ones are counted and lost
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    content: Content = "off"
    sample: Annotated[float, Field(gt=0, le=1)] = 0.1
    retention_days: Annotated[int, Field(ge=1, le=36_500)] = 30
    database: str | None = None
    names: str = "none"
    slices: tuple[str, ...] = ()
    key: Path | None = None
    sketches_per_s: Annotated[float, Field(ge=0)] = 20.0
    max_waiting: Annotated[int, Field(ge=1)] = 10_000

    @field_validator("content", mode="before")
    @classmethod
    def _off_is_no_boolean(cls, value: Any) -> Any:
        return "off" if value is False else value  # YAML reads a bare off as false

    def recognizers(self) -> tuple[Recognizer, ...]:
        """Raises :class:`UsageError` where ``names`` names nothing."""
        found = recognizer(self.names)
        return () if found is None else (found,)


def load_policy(source: str) -> MonitorPolicy:
    """The policy that ``source`` means: ``off``, ``sampled``, ``full``, or a YAML file.

    Raises:
        UsageError: no such file, no YAML, or a key that says nothing here.
    """
    if source in CONTENT:
        return MonitorPolicy.model_validate({"content": source})
    path = Path(source)
    try:
        raw = yaml.safe_load(path.read_text("utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(
            f"{source} cannot be read: {getattr(error, 'strerror', None) or error}.",
            remedy=f"Name one of {', '.join(CONTENT)}, or a YAML file.",
        ) from None
    except yaml.YAMLError as error:
        raise UsageError(f"{source} is no YAML: {error}.") from None
    return parse_policy(raw, source)


def parse_policy(raw: Any, source: str) -> MonitorPolicy:
    """Raises :class:`UsageError` with the first key that is wrong, and its value."""
    try:
        return MonitorPolicy.model_validate({} if raw is None else raw)
    except ValidationError as error:
        problem = error.errors()[0]
        key = ".".join(map(str, problem["loc"])) or "the file"
        if problem["type"] == "extra_forbidden":
            raise UsageError(
                f"{source}: there is no key {key!r}.", remedy=f"Keys: {', '.join(MonitorPolicy.model_fields)}."
            ) from None
        raise UsageError(f"{source}: {key} is {problem['input']!r}: {problem['msg']}.") from None
