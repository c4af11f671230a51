"""Loaded by every Python that starts with this folder on its path: writes down each attempt to reach another machine.

What native code does past Python is not seen here; in a network namespace of its own the kernel counts that too.
"""

import os
import sys

LOG = os.environ.get("SLMOPS_WATCHED_NETWORK")
HERE = ("127.", "::1", "localhost", "0.0.0.0", "::ffff:127.")


def _watch(event: str, arguments: tuple[object, ...]) -> None:
    if event not in ("socket.connect", "socket.sendto", "socket.getaddrinfo", "socket.gethostbyname") or not LOG:
        return
    named = arguments[1] if event in ("socket.connect", "socket.sendto") else arguments[0]
    host = named[0] if isinstance(named, tuple) else named
    if event in ("socket.connect", "socket.sendto") and not isinstance(named, tuple):
        return  # a socket of the file system
    text = host.decode() if isinstance(host, bytes) else host
    if text in (None, "") or str(text).startswith(HERE):
        return
    with open(LOG, "a") as file:  # noqa: PTH123 (nothing is imported here that could be what is watched)
        file.write(f"{event} {text} by {' '.join(sys.argv)[:200]}\n")


sys.addaudithook(_watch)
