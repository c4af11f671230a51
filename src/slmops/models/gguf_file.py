"""Is this a GGUF file? By its first bytes, without any library: a device asks too."""

from __future__ import annotations

from pathlib import Path

from slmops.errors import ModelError

_MAGIC = b"GGUF"


def check_gguf(gguf: Path) -> None:
    """Raise a :class:`ModelError` unless the file begins like a GGUF file."""
    with gguf.open("rb") as file:
        magic = file.read(len(_MAGIC))
    if magic != _MAGIC:
        raise ModelError(f"{gguf} is not a GGUF file: it begins with {magic!r}.", remedy="Fetch the file again.")
