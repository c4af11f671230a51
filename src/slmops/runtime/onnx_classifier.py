"""A classifier in one forward pass of onnxruntime.

Guarantees: rows come back in the order given and sum to 1; a text's answer does not depend on which texts came with it
beyond the rounding of the kernels (dynamically quantized kernels scale by the whole batch: there a neighbour can move
the third decimal); nothing is sent anywhere. Imports numpy, tokenizers and onnxruntime, nothing heavier: Python and
these three are most of the memory that a small student takes.

The graph: ``input_ids`` and ``attention_mask``, int64 ``[batch, tokens]``, to ``logits``, float32 ``[batch, labels]``,
and to ``states``, float32 ``[batch, hidden]``, where it was made with them.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from slmops.errors import CorruptArtifactError, ModelError
from slmops.runtime.base import Probabilities, States
from slmops.runtime.description import ModelDescription

MODEL_FILE = "model.onnx"
TOKENIZER_FILE = "tokenizer.json"
STATES = "states"
SINGLE_THREAD_PARAMETERS = 20_000_000
"""Below so many parameters a second thread costs more to wake than it computes."""

TOKEN_CHARACTERS = 128
"""No text is read beyond so many characters a token: longer than the tokens of any natural text."""

BATCH_TOKENS = 512
"""Padded tokens in one call of the session: bounds the memory of a batch of any length. More would not be faster:
measured on a student of width 256, a text took 92 µs of a core at 400 tokens a call and 192 µs at 4,400, and the peak
was 87 MB instead of 159."""


class OnnxClassifier:
    """See the module. One instance may be used from one thread at a time."""

    def __init__(self, session: Any, tokenizer: Any, description: ModelDescription) -> None:
        self._run = session.run
        self._shows_states = any(one.name == STATES for one in session.get_outputs())
        self._encode = tokenizer.encode
        self._encode_batch = tokenizer.encode_batch_fast
        self._empty = [description.pad_token_id]
        self._max_characters = description.max_tokens * TOKEN_CHARACTERS
        self.description = description

    @classmethod
    def load(cls, path: Path | str, *, threads: int | None = None) -> OnnxClassifier:
        """Open the model folder at ``path``. ``threads``: of one forward pass; None chooses by size.

        Raises:
            ModelNotFoundError: not a model folder.
            CorruptArtifactError: a file of it is missing, damaged, or does not fit the others.
            ModelError: the folder holds another kind of model.
        """
        folder = Path(path)
        description = ModelDescription.read(folder)
        if (description.runtime, description.form) != ("onnx", "classifier"):
            raise ModelError(
                f"{folder} holds a {description.form} for {description.runtime}, not a classifier for onnx.",
                remedy="Name a variant that was compressed for a closed label set.",
            )
        session = _open_session(folder / MODEL_FILE, threads or default_threads(description.parameters))
        _check_graph(session, folder / MODEL_FILE, len(description.labels))
        return cls(session, _open_tokenizer(folder / TOKENIZER_FILE, description.max_tokens), description)

    @property
    def labels(self) -> tuple[str, ...]:
        return self.description.labels

    def probabilities(self, texts: Sequence[str]) -> Probabilities:
        """``[len(texts), len(labels)]`` float32, in the order of ``texts``; each row sums to 1."""
        if len(texts) == 1:  # the way of every live request: no sorting, no padding
            encoding = self._encode(encodable(texts[0], self._max_characters))
            ids = np.array([encoding.ids or self._empty], dtype=np.int64)
            return softmax(self._run(("logits",), {"input_ids": ids, "attention_mask": np.ones_like(ids)})[0])
        return softmax(self._output("logits", self._ids(texts)))

    def embed(self, texts: Sequence[str]) -> tuple[States, int]:
        """The mean hidden state over each text's tokens, ``[len(texts), hidden]`` float32, and the tokens read.

        Raises:
            NotImplementedError: the graph was made without its states.
        """
        if not self._shows_states:
            raise NotImplementedError("the graph does not give its states")
        encoded = self._ids(texts)
        return self._output(STATES, encoded), sum(map(len, encoded))

    def _ids(self, texts: Sequence[str]) -> list[list[int]]:
        readable = [encodable(text, self._max_characters) for text in texts]
        return [encoding.ids or self._empty for encoding in self._encode_batch(readable)]

    def _output(self, name: str, encoded: Sequence[list[int]]) -> NDArray[np.float32]:
        """One of the graph's outputs, ``[rows, width]`` in the order of the rows; asked by length."""
        made = np.empty((0, len(self.labels)), np.float32)
        for rows in length_batches([len(ids) for ids in encoded], BATCH_TOKENS):
            ids, mask = pad([encoded[row] for row in rows], self.description.pad_token_id)
            part = self._run((name,), {"input_ids": ids, "attention_mask": mask})[0]
            if not len(made):
                made = np.empty((len(encoded), part.shape[1]), np.float32)
            made[rows] = part
        return made

    def count_tokens(self, text: str) -> int:
        """Tokens of ``text`` that are read, after the cut at ``max_tokens``."""
        return len(self._encode(encodable(text, self._max_characters)).ids)

    def close(self) -> None:
        """Free the session. The classifier cannot be used afterwards."""
        self._run = _closed


def default_threads(parameters: int) -> int:
    """Threads of one forward pass: 1 for a small model, every core for a large or unknown one."""
    return 1 if 0 < parameters < SINGLE_THREAD_PARAMETERS else _usable_cores()


def _usable_cores() -> int:
    """Those that this process may use: a process pinned to one must not start a thread for each."""
    affinity = getattr(os, "sched_getaffinity", None)
    return len(affinity(0)) if affinity else os.cpu_count() or 1


def softmax(logits: NDArray[np.float32]) -> Probabilities:
    """Softmax over the last axis, computed in float64."""
    exact = logits.astype(np.float64)
    exact -= exact.max(axis=-1, keepdims=True)
    np.exp(exact, out=exact)
    exact /= exact.sum(axis=-1, keepdims=True)
    return exact.astype(np.float32)


def length_batches(lengths: Sequence[int], max_tokens: int) -> Iterator[list[int]]:
    """Indices grouped so that like lengths meet and ``longest * rows <= max_tokens`` (one row at least)."""
    batch: list[int] = []
    for row in sorted(range(len(lengths)), key=lengths.__getitem__):
        # Ascending order: the row at hand is the longest of the batch.
        if batch and lengths[row] * (len(batch) + 1) > max_tokens:
            yield batch
            batch = []
        batch.append(row)
    if batch:
        yield batch


def pad(rows: Sequence[Sequence[int]], pad_token_id: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Ids and attention mask, both ``[rows, longest]``, padded on the right."""
    ids = np.full((len(rows), max(map(len, rows))), pad_token_id, dtype=np.int64)
    mask = np.zeros_like(ids)
    for index, row in enumerate(rows):
        ids[index, : len(row)] = row
        mask[index, : len(row)] = 1
    return ids, mask


def encodable(text: str, max_characters: int) -> str:
    """The text as the tokenizer can take it: its first ``max_characters``, so that a row of megabytes costs no more
    than what is read of it; lone surrogates (half of an emoji, out of broken JSON) become question marks."""
    text = text[:max_characters]
    return text if text.isascii() else text.encode("utf-8", "replace").decode()


def _open_session(path: Path, threads: int) -> Any:
    import onnxruntime

    onnxruntime.disable_telemetry_events()
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL
    options.log_severity_level = 3
    # Workers that spin between two requests take a core from everybody else on the device.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    if not path.is_file():
        raise CorruptArtifactError(f"{path} is missing.", remedy="Fetch the bundle anew, or run again.")
    try:
        return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime's errors have no base of their own
        raise CorruptArtifactError(
            f"{path} cannot be loaded: {error}", remedy="Fetch the bundle anew, or run again."
        ) from error


def _open_tokenizer(path: Path, max_tokens: int) -> Any:
    from tokenizers import Tokenizer

    if not path.is_file():
        raise CorruptArtifactError(f"{path} is missing.", remedy="Fetch the bundle anew, or run again.")
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises bare Exception
        raise CorruptArtifactError(
            f"{path} is not a tokenizer: {error}", remedy="Fetch the bundle anew, or run again."
        ) from error
    tokenizer.no_padding()
    tokenizer.enable_truncation(max_tokens)
    return tokenizer


def _check_graph(session: Any, path: Path, labels: int) -> None:
    inputs = {item.name for item in session.get_inputs()}
    outputs = {item.name: item.shape for item in session.get_outputs()}
    if inputs != {"input_ids", "attention_mask"} or "logits" not in outputs:
        raise CorruptArtifactError(
            f"{path} reads {sorted(inputs)} and writes {sorted(outputs)}, where a classifier reads input_ids and "
            "attention_mask and writes logits.",
            remedy="Compress the checkpoint again.",
        )
    width = outputs["logits"][-1]
    if isinstance(width, int) and width != labels:
        raise CorruptArtifactError(
            f"{path} has {width} outputs for {labels} labels.", remedy="Compress the checkpoint again."
        )


def _closed(*_: Any) -> Any:
    raise RuntimeError("The classifier is closed.")
