"""Run the application: bind first, load, say that it is ready, reload on SIGHUP, drain on SIGTERM."""

from __future__ import annotations

import asyncio
import errno
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import uvicorn
from starlette.types import ASGIApp

from slmops.errors import ServeError
from slmops.serve.connections import Guarded, raise_file_limit
from slmops.serve.operate import Operated
from slmops.serve.supervise import inherited_socket

DRAIN_S = 30
"""Answers that are being written when SIGTERM comes may go on for so long."""


def bind(host: str, port: int) -> socket.socket:
    """A listening address, taken before the model is loaded: the one that a supervisor has taken already, else this.
    Port 0 lets the system choose.

    Raises:
        ServeError: the port is in use, not permitted, or the host is not one of this machine's.
    """
    if (inherited := inherited_socket()) is not None:
        return inherited
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except (socket.gaierror, UnicodeError) as error:
        raise ServeError(f"{host!r} is not a host: {error}.", remedy="Use --host 127.0.0.1.") from None
    # With the protocol named, asyncio sets TCP_NODELAY on every connection; without, each answer waits 40 ms for the
    # caller's delayed acknowledgement.
    taken = socket.socket(family, kind, protocol)
    taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        taken.bind(address)
    except OSError as error:
        taken.close()
        raise ServeError(
            f"Cannot serve on {host}:{port}: {error.strerror}.", remedy=_REMEDIES.get(error.errno)
        ) from None
    return taken


_REMEDIES: dict[int | None, str] = {
    errno.EADDRINUSE: "Another program has this port: choose one with --port, or --port 0 for any free one.",
    errno.EACCES: "Ports below 1024 need rights: choose one with --port.",
    errno.EADDRNOTAVAIL: "This machine has no such address: use --host 127.0.0.1.",
}


def url_of(taken: socket.socket) -> str:
    """The address as a person writes it."""
    host, port = taken.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def run(
    app: ASGIApp | Operated, taken: socket.socket, *, on_ready: Callable[[str], None], drain_s: int = DRAIN_S
) -> None:
    """Serve until SIGTERM or SIGINT; then take no more callers, finish the answers at hand and return. On SIGHUP an
    operated application goes over to the version that its path leads to now.

    ``on_ready`` is called with the URL once requests are answered.
    """
    server = _Server(app, drain_s, lambda: on_ready(url_of(taken)), signals=True)
    # uvicorn raises the signal again when it has drained. A server that was told to end has not failed.
    before = signal.signal(signal.SIGTERM, lambda *_: None)
    try:
        server.run(sockets=[taken])
    finally:
        signal.signal(signal.SIGTERM, before)
        taken.close()


@contextmanager
def background(
    app: ASGIApp | Operated, *, host: str = "127.0.0.1", port: int = 0, drain_s: int = DRAIN_S
) -> Iterator[str]:
    """Serve in a thread of this process while the block runs; gives the URL. The way of :func:`run`, without signals.

    Raises:
        ServeError: the address cannot be had, or the server did not start.
    """
    taken = bind(host, port)
    started = threading.Event()
    server = _Server(app, drain_s, started.set)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [taken]}, name="serve", daemon=True)
    thread.start()
    try:
        while not started.wait(0.02):
            if not thread.is_alive():
                raise ServeError("The server did not start.", remedy="Run slmops --verbose serve to see why.")
        yield url_of(taken)
    finally:
        server.should_exit = True
        thread.join()
        taken.close()


def _config(app: ASGIApp, drain_s: int, connections: int) -> uvicorn.Config:
    return uvicorn.Config(
        app,
        http=type("Guarded", (Guarded,), {"max_connections": connections}),
        ws="none",
        log_level="warning",
        access_log=False,  # paths and queries are the callers' business
        server_header=False,
        timeout_graceful_shutdown=drain_s,
        lifespan="on",
    )


class _Server(uvicorn.Server):
    def __init__(
        self, app: ASGIApp | Operated, drain_s: int, on_started: Callable[[], None], *, signals: bool = False
    ) -> None:
        self._operated = app if isinstance(app, Operated) else None
        super().__init__(_config(app.app if isinstance(app, Operated) else app, drain_s, raise_file_limit()))
        self._on_started = on_started
        self._signals = signals

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if not self.started:
            return
        if self._operated is not None:
            self._operated.metrics.connections.set_function(lambda: len(self.server_state.connections))
            if self._signals and hasattr(signal, "SIGHUP"):
                loop = asyncio.get_running_loop()
                loop.add_signal_handler(signal.SIGHUP, self._operated.switch.reload_soon)
        self._on_started()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        if self._operated is not None:
            self._operated.switch.closing = True
        await super().shutdown(sockets)
