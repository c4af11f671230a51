"""The stage's two ways to write JSON: one value, or one a line. UTF-8, no NaN."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any


def write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False) + "\n", "utf-8")


def write_jsonl(path: Path, values: Iterable[Any], *, append: bool = False) -> None:
    with path.open("a" if append else "w", encoding="utf-8") as lines:
        for value in values:
            lines.write(json.dumps(value, ensure_ascii=False, allow_nan=False) + "\n")
