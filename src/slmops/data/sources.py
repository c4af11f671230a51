"""Where rows come from: a file, ``sample:support``, ``hf:owner/name@revision[:split[slice]]``, or a folder of running
text.

Guarantees: a source stands for a fixed list of files in a fixed order, and its digest is over their bytes. Slices mean
what ``datasets`` makes of them: ``train[:4096]``, ``train[10%:20%]`` (percent rounded to the closest row),
``train[-100:]``. Not covered: sums of splits, and fetching, for which a function is handed in.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Literal

from slmops.data.readers import DOCUMENT_SUFFIXES, SUFFIXES
from slmops.errors import DataError, RecipeError
from slmops.recipe import DataConfig
from slmops.trust import digest_file, digest_json

FetchHub = Callable[[str, str | None], Path]
"""``(owner/name, revision or None) -> folder`` with the repository's files."""

Role = Literal["train", "validation", "test"]
ROLES: tuple[Role, ...] = ("train", "validation", "test")
SPLIT_WORDS: dict[str, tuple[str, ...]] = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test", "testing", "eval", "evaluation"),
}

_HUB = re.compile(
    r"hf:(?P<repository>[\w.-]+/[\w.-]+)(?:@(?P<revision>[^:@\s]+))?(?::(?P<split>[\w./-]+)(?:\[(?P<slice>[^\]]*)\])?)?"
)
_BOUND = re.compile(r"-?\d+%?")


@dataclass(frozen=True)
class Slice:
    """A range of rows as written: bounds are rows or percent, either may be open or negative."""

    start: str = ""
    stop: str = ""

    @property
    def needs_total(self) -> bool:
        """Whether the number of all rows must be known first."""
        return any("%" in bound or bound.startswith("-") for bound in (self.start, self.stop))

    def rows(self, total: int) -> tuple[int, int]:
        """Half-open range of 0-based rows out of ``total``."""
        start = _absolute(self.start, total) if self.start else 0
        stop = _absolute(self.stop, total) if self.stop else total
        return min(start, total), min(stop, total)


@dataclass(frozen=True)
class Source:
    """``name`` is short and free of machine paths: it goes into the summary. ``slice`` is None for all rows.

    ``folder``: that ``files`` lie in, at any depth; None where their names alone tell them apart.
    """

    role: Role
    name: str
    files: tuple[Path, ...]
    slice: Slice | None = None
    folder: Path | None = None

    def digest(self) -> str:
        """SHA-256 of the file; for several, of their names and digests."""
        digests = {self._name_of(path): digest_file(path).sha256 for path in self.files}
        return next(iter(digests.values())) if len(self.files) == 1 else digest_json([*digests.items()])

    def _name_of(self, path: Path) -> str:
        return path.name if self.folder is None else path.relative_to(self.folder).as_posix()


def resolve(config: DataConfig, fetch_hub: FetchHub | None) -> tuple[Source, ...]:
    """The sources that ``config`` names, train first.

    Raises:
        DataError: a file that is not there, a split that the repository does not have.
        RecipeError: a source that cannot be understood.
    """
    given = {"train": config.train, "validation": config.validation, "test": config.test}
    return tuple(
        text_folder(role, Path(text))
        if config.text is not None and Path(text).is_dir()
        else resolve_one(role, text, fetch_hub)
        for role in ROLES
        if (text := given[role]) is not None
    )


def text_folder(role: Role, folder: Path) -> Source:
    """All txt and md files below ``folder`` that hold something, by path; hidden ones are left out.

    Raises:
        DataError: there is none.
    """
    files = tuple(
        path
        for path in sorted(folder.rglob("*"))
        if path.is_file()
        and path.name.lower().removesuffix(".gz").endswith(DOCUMENT_SUFFIXES)
        and not _hidden(path, folder)
        and path.stat().st_size
    )
    if not files:
        raise DataError(f"The folder {folder} holds no txt or md file.", remedy=f"Name another in data.{role}.")
    return Source(role, folder.name, files, folder=folder)


def resolve_one(role: Role, text: str, fetch_hub: FetchHub | None, *, key: str | None = None) -> Source:
    """The source that ``text`` names, read as ``role``; ``key`` is the recipe's, where it is not ``data.ROLE``.

    Raises:
        DataError, RecipeError: as :func:`resolve`.
    """
    key = key or f"data.{role}"
    if text.startswith("sample:"):
        return Source(role, text, (_sample(text),))
    if text.startswith("hf:"):
        return _resolve_hub(role, text, fetch_hub, key)
    path = Path(text)
    if not path.exists():
        raise DataError(f"There is no file {path}.", remedy=f"Check {key}, or name another: --set {key}=FILE.")
    if not path.is_file():
        raise DataError(
            f"{path} is not a file.", remedy=f"Name a file in {key}; a folder of txt and md files goes with data.text."
        )
    return Source(role, path.name, (path,))


def parse_slice(text: str, *, source: str) -> Slice:
    """The part between brackets: ``:4096``, ``10%:20%``, ``-100:``.

    Raises:
        RecipeError: anything else.
    """
    start, colon, stop = (part.strip() for part in text.partition(":"))
    if not colon or any(bound and not _BOUND.fullmatch(bound) for bound in (start, stop)):
        raise RecipeError(
            f"{source}: [{text}] is not a slice.", remedy="Write rows [:4096], percent [10%:20%], or the end [-100:]."
        )
    if any(abs(int(bound[:-1])) > 100 for bound in (start, stop) if bound.endswith("%")):
        raise RecipeError(f"{source}: [{text}] asks for more than 100 percent.")
    return Slice(start, stop)


def _sample(text: str) -> Path:
    from slmops import sample

    if text != "sample:support":
        raise RecipeError(f"There is no sample {text}.", remedy="There is sample:support.")
    return sample.path()


def _resolve_hub(role: Role, text: str, fetch_hub: FetchHub | None, key: str) -> Source:
    found = _HUB.fullmatch(text)
    if found is None:
        raise RecipeError(
            f"{key} is {text!r}, which cannot be understood.",
            remedy="Write hf:owner/name@revision:split, for example hf:owner/name@main:train[:4096].",
        )
    if fetch_hub is None:
        raise DataError(f"{text} must be fetched, and nothing here can.", remedy="Name a file on this machine.")
    folder = fetch_hub(found["repository"], found["revision"])
    part = parse_slice(found["slice"], source=text) if found["slice"] is not None else None
    return Source(role, text, choose_files(folder, found["split"] or role, source=text), part)


def choose_files(folder: Path, split: str, *, source: str) -> tuple[Path, ...]:
    """Files of one split below ``folder``: parquet rather than jsonl rather than csv; sorted by path.

    A split is recognised as a whole word in a path (``data/train-00000-of-00002.parquet``, ``test/rows.jsonl``), under
    any of its usual names. ``config/train`` narrows to one folder. Files that name no split are the training split.

    Raises:
        DataError: no such split, or the split in several folders.
    """
    *configuration, name = split.split("/")
    base = folder.joinpath(*configuration)
    readable = [path for path in sorted(base.rglob("*")) if path.is_file() and _suffix(path) is not None]
    paths = {path: PurePosixPath(path.relative_to(base).as_posix()) for path in readable if not _hidden(path, base)}
    words = next((names for names in SPLIT_WORDS.values() if name in names), (name,))
    chosen = [path for path, relative in paths.items() if words_of(relative) & set(words)]
    if not chosen and name in SPLIT_WORDS["train"]:
        any_split = {word for names in SPLIT_WORDS.values() for word in names}
        chosen = [path for path, relative in paths.items() if not words_of(relative) & any_split]
    if not chosen:
        there = ", ".join(str(relative) for relative in [*paths.values()][:8]) or "no csv, jsonl or parquet file"
        raise DataError(f"{source} has no split {split!r}; there is: {there}.", remedy="Name a split that is there.")
    best = min(SUFFIXES[::-1].index(_suffix(path) or "") for path in chosen)
    chosen = [path for path in chosen if SUFFIXES[::-1].index(_suffix(path) or "") == best]
    folders = sorted({paths[path].parent.as_posix() for path in chosen})
    if len(folders) > 1:
        raise DataError(
            f"{source}: the split {split!r} is in several folders: {', '.join(folders)}.",
            remedy=f"Name one, for example hf:owner/name@revision:{folders[0]}/{name}.",
        )
    return tuple(chosen)


def words_of(path: PurePosixPath) -> set[str]:
    """Words of a path in lower case: what lies between slashes, dots, dashes and underscores."""
    return set(re.split(r"[/._-]+", path.as_posix().lower()))


def _suffix(path: Path) -> str | None:
    name = path.name.lower().removesuffix(".gz")
    return next((suffix for suffix in SUFFIXES if name.endswith(suffix)), None)


def _hidden(path: Path, base: Path) -> bool:
    return any(step.startswith(".") for step in path.relative_to(base).parts)


def _absolute(bound: str, total: int) -> int:
    row = round(int(bound[:-1]) * total / 100) if bound.endswith("%") else int(bound)
    return max(row + total, 0) if row < 0 else row


def absolute_ranges(part: Slice | None, counts: Sequence[int] | None) -> tuple[int, int | None]:
    """Range of rows over all files of a source; ``counts`` are needed where ``part.needs_total``."""
    if part is None:
        return 0, None
    if counts is not None:
        return part.rows(sum(counts))
    return int(part.start or 0), int(part.stop) if part.stop else None
