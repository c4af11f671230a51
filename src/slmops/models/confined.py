"""A process that reaches this machine only, and Olive without its telemetry: for the children that run Olive.

Olive sends a heartbeat before it reads ``OLIVE_DISABLE_TELEMETRY``, so the sending itself is taken out before anything
of it runs, and a connection to anywhere else is refused whoever asks for it.
"""

from __future__ import annotations

import ipaddress
import sys
from typing import Any

REFUSED = "refused to reach"


def stay_here() -> None:
    """From now on this process reaches this machine only. Irrevocable, as audit hooks are."""

    def refuse(event: str, arguments: tuple[Any, ...]) -> None:
        if event == "socket.getaddrinfo":
            host = arguments[0]
        elif event == "socket.connect" and isinstance(arguments[1], tuple):
            host = arguments[1][0]
        else:
            return
        if not _is_here(host):
            sys.stderr.write(f"{REFUSED} {host}\n")
            raise ConnectionRefusedError(f"{host} is not this machine")

    sys.addaudithook(refuse)


def _is_here(host: Any) -> bool:
    if host in (None, "", "localhost", b"localhost"):
        return True
    try:
        return ipaddress.ip_address(host if isinstance(host, str) else host.decode()).is_loopback
    except ValueError:
        return False


def silence_olive() -> None:
    """Make Olive's telemetry do nothing, before its first object is made."""
    from olive.telemetry.telemetry import Telemetry

    def nothing(self: Any, *_: Any, **__: Any) -> None:
        return None

    for name in ("_log_heartbeat", "_create_logger", "_setup_payload_callbacks", "log"):
        if hasattr(Telemetry, name):
            setattr(Telemetry, name, nothing)
