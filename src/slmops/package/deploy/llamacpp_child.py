"""llama.cpp's own server in a process of its own: ``python -m slmops.package.deploy.llamacpp_child``.

One JSON object comes in as the first line of standard input, one goes out when the model is loaded; the end of standard
input ends the process.

::

    in    {"model": file, "alias", "port", "threads", "context_tokens", "at_once"}
    out   {"url", "version"}, or {"error"}
"""

from __future__ import annotations

import json
import os
import sys
from importlib.metadata import version
from typing import Any


def main() -> int:
    """Serve until standard input ends."""
    asked = json.loads(sys.stdin.readline())
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    server = None
    try:
        server = serve(asked)
        told = {"url": server.listening_address, "version": version("xllamacpp")}
    except Exception as error:  # noqa: BLE001 (told to the parent, which raises it)
        told = {"error": f"{type(error).__name__}: {error}"}
    answers.write(json.dumps(told) + "\n")
    answers.flush()
    if server is None:
        return 1
    sys.stdin.read()
    return 0


def serve(asked: dict[str, Any]) -> Any:
    """The server, listening on loopback. Conversations are rendered by the template that the file holds."""
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path = asked["model"]
    params.model_alias = {asked["alias"]}
    params.hostnames = ["127.0.0.1"]
    params.port = asked["port"]
    params.n_parallel = asked["at_once"]
    params.n_ctx = asked["context_tokens"] * asked["at_once"]
    params.n_gpu_layers = 0
    params.verbosity = -1
    params.offline = True
    params.use_jinja = True
    params.ui = params.endpoint_slots = params.endpoint_props = False
    if asked["threads"]:
        params.cpuparams.n_threads = params.cpuparams_batch.n_threads = asked["threads"]
    return xllamacpp.Server(params)


if __name__ == "__main__":
    sys.exit(main())
