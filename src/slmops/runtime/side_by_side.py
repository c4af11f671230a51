"""An engine that calls back with pieces of an answer, as an iterator of them."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator
from typing import TypeVar

T = TypeVar("T")


def called_back(work: Callable[[Callable[[T], bool]], None]) -> Iterator[T]:
    """What ``work`` hands to its callback, as an iterator. The callback returns True once the iterator is closed: stop.
    What ``work`` raises is raised here, behind the pieces that came before.
    """
    pieces: queue.SimpleQueue[tuple[str, T | BaseException | None]] = queue.SimpleQueue()
    gone = threading.Event()

    def take(piece: T) -> bool:
        pieces.put(("piece", piece))
        return gone.is_set()

    def run() -> None:
        try:
            work(take)
        except BaseException as error:  # noqa: BLE001 (raised again below)
            pieces.put(("error", error))
        pieces.put(("end", None))

    thread = threading.Thread(target=run, name="answer", daemon=True)
    thread.start()
    try:
        while True:
            kind, piece = pieces.get()
            if kind == "end":
                return
            if isinstance(piece, BaseException):
                raise piece
            yield piece  # type: ignore[misc]
    finally:
        gone.set()
        thread.join()
