"""The children that convert models, run in this process: half a second each, where starting one takes four."""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest

from slmops.compress import generator, openvino_export


def run_here(arguments: Sequence[str], *_: Any, **__: Any) -> None:
    """In place of :func:`slmops.compress.child.run_child`; prints, and what is raised, are the test's."""
    importlib.import_module(arguments[1]).main(list(arguments[2:]))


@contextmanager
def children_here() -> Iterator[None]:
    """onnxruntime-genai's builder and OpenVINO's tracing in this process. Olive's child is none of them: what it gives
    up, it gives up for good."""
    with pytest.MonkeyPatch.context() as patch:
        for module in (generator, openvino_export):
            patch.setattr(module, "run_child", run_here)
        patch.setenv("HF_HUB_OFFLINE", "1")
        yield
