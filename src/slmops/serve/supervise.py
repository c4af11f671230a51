"""A server that comes back: a parent that holds the address, and a child that answers on it.

Guarantees: a child that dies, of whatever, is started again, after a pause that doubles up to :data:`LONGEST_PAUSE_S`;
callers that connect meanwhile wait in the system's queue and are not refused; SIGTERM, SIGINT and SIGHUP reach the
child. A child that ends with an error before it has lived for :data:`SETTLED_S` is not tried again: its configuration
is wrong.
Not covered: the requests at hand when the child dies; a parent that is killed, whose child answers on alone.

The child finds the listening socket by its number in ``SLMOPS_LISTEN_FD``; systemd's socket activation works alike.
"""

from __future__ import annotations

import logging
import os
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Sequence

log = logging.getLogger(__name__)
LISTEN_VARIABLE = "SLMOPS_LISTEN_FD"
SYSTEMD_FIRST_FD = 3
SETTLED_S = 5.0
FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.1, 5.0
BACKLOG = 2048


def inherited_socket() -> socket.socket | None:
    """The listening socket that whoever started this process has opened already: our supervisor, or systemd."""
    number = os.environ.pop(LISTEN_VARIABLE, "")
    if number.isdigit():
        return socket.socket(fileno=int(number))
    if os.environ.get("LISTEN_PID") == str(os.getpid()) and os.environ.get("LISTEN_FDS") == "1":
        return socket.socket(fileno=SYSTEMD_FIRST_FD)
    return None


def next_pause_s(pause_s: float, lived_s: float) -> float:
    """How long to wait before the next start: from the beginning again once a child has settled."""
    return FIRST_PAUSE_S if lived_s >= SETTLED_S else min(2 * pause_s, LONGEST_PAUSE_S)


def gives_up(exit_code: int, lived_s: float) -> bool:
    """Whether another start would end alike. A signal is not the configuration's fault."""
    return exit_code > 0 and lived_s < SETTLED_S


def supervise(command: Sequence[str], taken: socket.socket) -> int:
    """Run ``command`` over and over on the socket, until told to end; its last exit code."""
    taken.listen(BACKLOG)
    ending = threading.Event()
    child: subprocess.Popen[bytes] | None = None

    def pass_on(number: int, _: object) -> None:
        if number != signal.SIGHUP:
            ending.set()
        if child is not None and child.poll() is None:
            child.send_signal(number)

    before = {number: signal.signal(number, pass_on) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)}
    pause_s = FIRST_PAUSE_S / 2
    try:
        while True:
            started_s = time.monotonic()
            environment = {**os.environ, LISTEN_VARIABLE: str(taken.fileno())}
            child = subprocess.Popen(command, env=environment, pass_fds=[taken.fileno()])
            exit_code = child.wait()
            lived_s = time.monotonic() - started_s
            if ending.is_set() or gives_up(exit_code, lived_s):
                return exit_code
            pause_s = next_pause_s(pause_s, lived_s)
            log.error("The server ended with exit code %d after %.1f s: it is started again", exit_code, lived_s)
            if ending.wait(pause_s):
                return 0
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        taken.close()
