"""Every error that a user of slmops can meet.

::

    SlmopsError                  something the user can act on; exit code 1
    ├── UsageError               the command line or the recipe is wrong; exit code 2
    │   ├── RecipeError          a recipe does not say what it must (carries file and line)
    │   └── MissingExtraError    the chosen verb needs an extra that is not installed
    ├── DataError                rows that cannot be used (carries file and row)
    ├── ModelError               a model that cannot be found, read or held
    │   ├── ModelNotFoundError   nothing there, or nothing of that name
    │   ├── GatedModelError      the hub wants a licence accepted or a token
    │   ├── MemoryBudgetError    the work cannot fit in memory (the message shows the arithmetic)
    │   └── ContextLengthError   a conversation does not fit in the model's context
    ├── TeacherError             a teacher that cannot be asked, or whose answers cannot be used
    ├── PrivacyError             data would leave the machine without leave
    ├── ArtifactError            an artifact that cannot be read, written or trusted
    │   ├── CorruptArtifactError bytes differ from the manifest (names the file)
    │   └── StorageError         disk full, read-only, or not writable
    ├── ConversionError          a tool ended without the output that it should have written
    ├── GateError                a quality gate did not hold
    └── ServeError               the server or a client of it cannot go on

A message says what happened and names the actual value; ``remedy`` says what to do about it. A bug keeps its traceback:
nothing here is raised for a programming error.
"""

from __future__ import annotations

from pathlib import Path


class SlmopsError(Exception):
    """Base of all errors for users. ``str(error)`` is one sentence, plus the remedy where there is one."""

    exit_code = 1

    def __init__(self, message: str, *, remedy: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.remedy = remedy

    def __str__(self) -> str:
        return f"{self.message} {self.remedy}" if self.remedy else self.message


class UsageError(SlmopsError):
    exit_code = 2


class RecipeError(UsageError):
    """A recipe that cannot be run. ``path`` and ``line`` (1-based) say where, when that is known."""

    def __init__(
        self, message: str, *, path: Path | None = None, line: int | None = None, remedy: str | None = None
    ) -> None:
        where = f"{path}:{line}: " if path and line else f"{path}: " if path else ""
        super().__init__(where + message, remedy=remedy)
        self.path = path
        self.line = line


class MissingExtraError(UsageError):
    """A verb was called whose libraries are not installed."""

    def __init__(self, what: str, extra: str) -> None:
        super().__init__(
            f"{what} needs libraries that are not installed.", remedy=f"Install them: pip install 'slmops[{extra}]'."
        )
        self.extra = extra


class DataError(SlmopsError):
    """Rows that cannot be used. ``row`` is 1-based and counts data rows, not lines."""

    def __init__(
        self, message: str, *, path: Path | None = None, row: int | None = None, remedy: str | None = None
    ) -> None:
        where = f"{path}, row {row}: " if path and row else f"{path}: " if path else ""
        super().__init__(where + message, remedy=remedy)
        self.path = path
        self.row = row


class ModelError(SlmopsError):
    pass


class ModelNotFoundError(ModelError):
    pass


class GatedModelError(ModelError):
    pass


class MemoryBudgetError(ModelError):
    pass


class ContextLengthError(ModelError):
    def __init__(self, prompt_tokens: int, context_tokens: int) -> None:
        super().__init__(
            f"The model's context holds {context_tokens} tokens, and the conversation alone has {prompt_tokens}.",
            remedy="Shorten the conversation, or leave out its first turns.",
        )
        self.prompt_tokens = prompt_tokens
        self.context_tokens = context_tokens


class TeacherError(SlmopsError):
    pass


class PrivacyError(SlmopsError):
    pass


class ArtifactError(SlmopsError):
    pass


class CorruptArtifactError(ArtifactError):
    pass


class StorageError(ArtifactError):
    """The disk would not take it. Nothing half-written is left under the final name."""

    @classmethod
    def from_os_error(cls, error: OSError, doing: str, path: Path) -> StorageError:
        remedies = {
            28: "Free some space or choose another --store.",  # ENOSPC
            122: "Free some space or choose another --store.",  # EDQUOT
            30: "Choose a writable --store.",  # EROFS
            13: "Choose a writable --store, or change its permissions.",  # EACCES
            17: "Choose a directory for --store.",  # EEXIST: a file is in the way
            20: "Choose a directory for --store.",  # ENOTDIR
        }
        return cls(f"Could not {doing} {path}: {error.strerror or error}.", remedy=remedies.get(error.errno or 0))


class ConversionError(SlmopsError):
    pass


class GateError(SlmopsError):
    pass


class ServeError(SlmopsError):
    pass
