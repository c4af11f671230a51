"""SHA-256 digests.

Laws:

* ``digest_json`` depends on the value alone, and a value has the same digest after it was written and read again:
  keys are text and sorted, tuples are lists, no whitespace, UTF-8, NaN refused.
* ``tree_digest`` depends on relative POSIX paths and contents alone: not on times, owners, or the order of a listing.
* Symbolic links are refused inside a tree: a digest must not depend on what lies outside it. So are devices and
  pipes, and names that are not UTF-8: neither could be sent to another machine. Empty directories do not count.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from slmops.errors import ArtifactError

CHUNK_BYTES = 1 << 20


@dataclass(frozen=True)
class FileDigest:
    """SHA-256 (lower-case hex) and size of one file."""

    sha256: str
    size_bytes: int


def digest_bytes(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def digest_json(value: Any) -> str:
    """Digest of a JSON value in canonical form.

    Raises:
        ValueError: the value holds NaN or infinity, which JSON cannot carry.
    """
    # Through JSON once, because numbers as keys sort otherwise than the text that they become.
    plain = json.loads(json.dumps(value, allow_nan=False))
    text = json.dumps(plain, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return digest_bytes(text.encode())


def digest_file(path: Path) -> FileDigest:
    """Digest of one file, read in pieces of :data:`CHUNK_BYTES`."""
    hasher, size_bytes = hashlib.sha256(), 0
    with path.open("rb") as file:
        while chunk := file.read(CHUNK_BYTES):
            hasher.update(chunk)
            size_bytes += len(chunk)
    return FileDigest(hasher.hexdigest(), size_bytes)


def digest_tree(root: Path, *, exclude: frozenset[str] = frozenset()) -> dict[str, FileDigest]:
    """Digests of all files below ``root`` by relative POSIX path, sorted by path.

    ``exclude`` names relative paths to leave out.

    Raises:
        ArtifactError: the tree holds a symbolic link, a device or pipe, or a name that is not UTF-8.
    """
    digests: dict[str, FileDigest] = {}
    for path in sorted(root.rglob("*")):
        name = path.relative_to(root).as_posix()
        if name in exclude:
            continue
        if path.is_symlink():
            raise ArtifactError(f"{path} is a symbolic link.", remedy="Put the file itself there.")
        if not _is_utf8(name):
            raise ArtifactError(f"{str(path)!a} has a name that is not UTF-8.", remedy="Rename the file.")
        if path.is_file():
            digests[name] = digest_file(path)
        elif not path.is_dir():
            raise ArtifactError(f"{path} is neither a file nor a directory.", remedy="Remove it.")
    return digests


def tree_digest(files: Mapping[str, FileDigest]) -> str:
    """One digest for a whole tree, from the digests of its files."""
    return digest_json({name: digest.sha256 for name, digest in files.items()})


def _is_utf8(name: str) -> bool:
    """Python reads the bytes of a name that is not UTF-8 as lone surrogates."""
    try:
        name.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True
