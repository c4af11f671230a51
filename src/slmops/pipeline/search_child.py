"""A worker process of a search: ``python -m slmops.pipeline.search_child REQUEST.json``.

The request: ``{"recipe", "store", "offline", "deadline_s"}``. It ends when there are enough trials, and when its parent
is gone (its standard input closes then). An error is the last line of its output, and exit code 1.
"""

from __future__ import annotations

import json
import os
import sys
import threading
from pathlib import Path

from slmops.errors import SlmopsError


def main(arguments: list[str]) -> int:
    threading.Thread(target=_end_with_parent, daemon=True).start()
    request = json.loads(Path(arguments[0]).read_text("utf-8"))
    from slmops.pipeline.context import Context
    from slmops.pipeline.search import work
    from slmops.progress import ignore
    from slmops.recipe import parse_recipe
    from slmops.store import Store

    try:
        with Store.open(request["store"]) as store:
            work(request, Context(parse_recipe(request["recipe"]), store, request["offline"], ignore))
    except SlmopsError as error:
        sys.stderr.write(f"\n{error}\n")
        return 1
    return 0


def _end_with_parent() -> None:
    sys.stdin.read()
    os._exit(3)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
