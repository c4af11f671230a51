"""The child process that runs onnxruntime-genai's builder: ``python -m slmops.compress.builder_child REQUEST.json``.

The builder prints, sets loggers up and keeps memory; none of it reaches the process that asked. The request:
``{"checkpoint", "output", "precision", "cache", "options": ["key=value"]}``. Exit code 0 says only that the builder
came to its end: the caller looks at what was written.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path


def main(arguments: list[str]) -> None:
    request = json.loads(Path(arguments[0]).read_text("utf-8"))
    from onnxruntime_genai.models.builder import create_model, parse_extra_options

    place = ("", request["checkpoint"], request["output"], request["precision"], "cpu", request["cache"])
    create_model(*place, **parse_extra_options(*place, request["options"]))


if __name__ == "__main__":
    main(sys.argv[1:])
