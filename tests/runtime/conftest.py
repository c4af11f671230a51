"""Tiny models in the formats of several engines, made once."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from fakes.children import children_here
from fakes.tiny_models import write_tiny_generator, write_tiny_llama
from skipping import skip_or_fail
from slmops.artifacts import Draft

CONTEXT = 256
ABOUT: dict[str, Any] = {"task": "conversation", "name": "tiny", "system": None}


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("llama")
    write_tiny_llama(folder, context_tokens=CONTEXT)
    return folder


@pytest.fixture(scope="session")
def tiny_onnx(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("onnx") / "model"
    write_tiny_generator(folder, tiny_checkpoint)
    return folder


@pytest.fixture(scope="session")
def tiny_openvino(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    if any(find_spec(name) is None for name in ("openvino_genai", "openvino_tokenizers")):
        skip_or_fail("the extra openvino is not installed")
    from slmops.compress.openvino_export import export_openvino

    root = tmp_path_factory.mktemp("openvino")
    draft = Draft(root / "draft", root / "work")
    for path in (draft.path, draft.work):
        path.mkdir()
    with children_here():
        export_openvino(tiny_checkpoint, draft, precision="fp32", max_tokens=None, **ABOUT)
    return draft.path / "model"


@pytest.fixture(scope="session")
def tiny_gguf(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    if find_spec("xllamacpp") is None:
        skip_or_fail("the extra llamacpp is not installed")
    from slmops.compress.gguf_export import export_gguf

    root = tmp_path_factory.mktemp("gguf")
    draft = Draft(root / "draft", root / "work")
    for path in (draft.path, draft.work):
        path.mkdir()
    export_gguf(tiny_checkpoint, draft, quantization="f32", max_tokens=CONTEXT, **ABOUT)
    return draft.path / "model"
