"""Continuous batching over onnxruntime, for the graphs that onnxruntime-genai runs.

onnxruntime-genai's own engine (0.18) closes a batch of four until its last answer has ended, unless the graph was built
with paged attention. Here every answer is a row of one cache (:mod:`slmops.runtime.onnx_cache`) with a length of its
own: a step reads at most :data:`READ_TOKENS` tokens of one new prompt, then writes one token in each row.

Guarantees: greedy answers are those of :mod:`slmops.runtime.genai` but for rounding; the same seed gives the same
sample; the cache is sized to what runs; a prompt that begins as a recent one did is read from where they differ.
Nothing is sent anywhere.
Answers under a constraint and scores are left to :mod:`slmops.runtime.genai`.
Not covered: adapters that switch at run time.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from slmops.chat import ChatTokenizer
from slmops.errors import CorruptArtifactError, ModelError
from slmops.runtime.batch import BatchedStream, BatchGenerator
from slmops.runtime.careful import Careful
from slmops.runtime.description import ModelDescription
from slmops.runtime.genai import CONFIG_FILE, GenaiGenerator, end_ids, read_config
from slmops.runtime.onnx_cache import Beginnings, CacheShape, RowCache
from slmops.runtime.sampling import draw, log_softmax

READ_TOKENS = 128
"""Of a prompt in one step: the others wait for no longer than that takes."""
MASK_STEP = 64
MAX_ROWS = 16
"""Answers in one step; more would take longer for each and give few tokens more."""
KEPT_BYTES = 128 * 2**20
KEPT_LEAST_TOKENS = 32
IDS, MASK, POSITIONS, LOGITS = "input_ids", "attention_mask", "position_ids", "logits"
_KINDS: Mapping[str, type[np.floating]] = {"tensor(float)": np.float32, "tensor(float16)": np.float16}


class OnnxBatch(BatchGenerator):
    """See the module. The rows of answers that are being written come first in the cache; the row that is being read,
    if any, is the last."""

    def __init__(
        self,
        session: Any,
        shape: CacheShape,
        chat: ChatTokenizer,
        description: ModelDescription,
        config: Any,
        careful: Careful,
    ) -> None:
        super().__init__(chat, description, int(config["model"]["context_length"]), end_ids(chat, config), careful)
        self._session = session
        self._positions = any(one.name == POSITIONS for one in session.get_inputs())
        self._cache = RowCache(shape)
        self._beginnings = Beginnings(KEPT_BYTES // shape.token_bytes, KEPT_LEAST_TOKENS)
        self._rows: list[_Row] = []
        self._waiting: list[_Row] = []
        self._reading: _Row | None = None
        self._binding: Any = None  # of the rows that are written, as long as they stay the same
        self._bound = 0

    @classmethod
    def load(cls, path: Path | str, *, threads: int | None = None) -> OnnxBatch:
        """Open the model folder at ``path``. ``threads``: of one step; None leaves it to the engine.

        Raises:
            ModelNotFoundError: not a model folder.
            CorruptArtifactError: a file of it is missing, damaged, or does not fit the others.
            ModelError: the folder holds another kind of model, or a graph whose cache is laid out in another way.
        """
        folder = Path(path)
        description = ModelDescription.read(folder)
        if (description.runtime, description.form) != ("onnx-genai", "generator") or description.adapters:
            raise ModelError(
                f"{folder} cannot be served in batches of onnxruntime: it holds "
                + ("adapters." if description.adapters else f"a {description.form} for {description.runtime}."),
                remedy="Serve it with another --engine.",
            )
        config = read_config(folder / CONFIG_FILE)
        session = _open(folder / str(config["model"]["decoder"]["filename"]), threads)
        careful = Careful(lambda: GenaiGenerator.load(folder, threads=threads))
        shape = _cache_shape(session, config, folder)
        return cls(session, shape, ChatTokenizer.load(folder), description, config, careful)

    def _most(self) -> int:
        return MAX_ROWS

    def _admit(self, stream: BatchedStream) -> None:
        self._waiting.append(_Row(stream))

    def _advance(self) -> Iterator[tuple[BatchedStream, int, float]]:
        new: list[tuple[BatchedStream, int, float]] = []
        if self._reading is None and self._waiting:
            self._begin_reading(self._waiting.pop(0))
        writing = list(self._rows)
        if self._reading is not None:
            new += self._read(self._reading)
        if writing:
            new += self._write(writing)
        yield from new

    def _begin_reading(self, row: _Row) -> None:
        tokens = max([row.most_tokens, *(other.most_tokens for other in self._rows)])
        if self._cache.fit(len(self._rows) + 1, tokens):
            self._binding = None
        common, kept = self._beginnings.longest(row.stream.answer.prompt)
        if kept is not None:
            self._cache.copy_in(len(self._rows), kept.arrays, common)
        row.length = common
        self._reading = row

    def _read(self, row: _Row) -> Iterator[tuple[BatchedStream, int, float]]:
        """The next tokens of a prompt; its first new token once it is read."""
        prompt, place = row.stream.answer.prompt, len(self._rows)
        ids = prompt[row.length : row.length + READ_TOKENS]
        total = row.length + len(ids)
        binding = self._bind(place, 1)
        logits = self._run(binding, np.asarray([ids], np.int64), np.ones((1, total), np.int64), [row.length])
        row.length = total
        if total < len(prompt):
            return
        if self._beginnings.wants(prompt):
            self._beginnings.keep(prompt, self._cache.copy_out(place, total))
        self._rows.append(row)
        self._reading, self._binding = None, None
        yield row.stream, *row.choose(logits[0, -1], tell=self.tells_logprobs)

    def _write(self, rows: list[_Row]) -> Iterator[tuple[BatchedStream, int, float]]:
        if self._binding is None or self._bound != len(rows):
            self._binding, self._bound = self._bind(0, len(rows)), len(rows)
        lengths = [row.length for row in rows]
        width = min(-(-(max(lengths) + 1) // MASK_STEP) * MASK_STEP, self._cache.tokens)
        mask = (np.arange(width)[None] <= np.asarray(lengths)[:, None]).astype(np.int64)
        ids = np.asarray([[row.token] for row in rows], np.int64)
        logits = self._run(self._binding, ids, mask, lengths)[:, -1]
        for row, row_logits in zip(rows, logits, strict=True):
            row.length += 1
            yield row.stream, *row.choose(row_logits, tell=self.tells_logprobs)

    def _bind(self, first: int, count: int) -> Any:
        """The cache's rows from ``first`` on as inputs and, in the same memory, as outputs."""
        binding = self._session.io_binding()
        for name, array in zip(self._cache.shape.names, self._cache.arrays, strict=True):
            part = array[first : first + count]
            where = ("cpu", 0, self._cache.shape.kind, part.shape, part.ctypes.data)
            binding.bind_input(f"past_key_values.{name}", *where)
            binding.bind_output(f"present.{name}", *where)
        return binding

    def _run(
        self, binding: Any, ids: NDArray[np.int64], mask: NDArray[np.int64], begin: list[int]
    ) -> NDArray[np.floating]:
        """Logits ``[rows, tokens, vocabulary]``."""
        binding.bind_cpu_input(IDS, ids)
        binding.bind_cpu_input(MASK, mask)
        if self._positions:
            binding.bind_cpu_input(POSITIONS, np.asarray(begin)[:, None] + np.arange(ids.shape[1], dtype=np.int64))
        binding.bind_output(LOGITS, "cpu")
        self._session.run_with_iobinding(binding)
        logits: NDArray[np.floating] = binding.get_outputs()[-1].numpy()
        return logits

    def _drop(self, stream: BatchedStream) -> None:
        self._waiting = [row for row in self._waiting if row.stream is not stream]
        if self._reading is not None and self._reading.stream is stream:
            self._reading = None
        places = [place for place, row in enumerate(self._rows) if row.stream is stream]
        for place in places:
            self._fill(place)
        if not self._rows and self._reading is None and self._cache.idle():
            self._binding = None

    def _fill(self, place: int) -> None:
        """A row ends: the last one takes its place, and the row that is being read follows."""
        last = len(self._rows) - 1
        if place != last:
            self._cache.move(last, place, self._rows[last].length)
            self._rows[place] = self._rows[last]
        self._rows.pop()
        if self._reading is not None:
            self._cache.move(last + 1, last, self._reading.length)
        self._binding = None

    def _free(self) -> None:
        self._rows, self._waiting, self._reading, self._binding = [], [], None, None
        self._session = None


class _Row:
    """One answer in the cache: ``length`` tokens of it are there, and ``token`` comes next."""

    def __init__(self, stream: BatchedStream) -> None:
        self.stream = stream
        self.length = 0
        self.token = 0
        self._random = np.random.default_rng(stream.request.seed)

    @property
    def most_tokens(self) -> int:
        return len(self.stream.answer.prompt) + self.stream.answer.max_tokens

    def choose(self, logits: NDArray[np.floating], *, tell: bool) -> tuple[int, float]:
        """The next token and, where it is to be told, its log-probability (nats); ``logits``: ``[vocabulary]``."""
        request = self.stream.request
        if request.temperature <= 0:
            self.token = int(logits.argmax())
            return self.token, -float(np.log(np.exp(logits - logits[self.token]).sum())) if tell else 0.0
        logprobs = log_softmax(logits)
        self.token = draw(logprobs, request.temperature, request.top_p, self._random)
        return self.token, float(logprobs[self.token])


def _cache_shape(session: Any, config: Mapping[str, Any], folder: Path) -> CacheShape:
    prefix = "past_key_values."
    inputs = {one.name: one for one in session.get_inputs()}
    cached = {name.removeprefix(prefix): one for name, one in inputs.items() if name.startswith(prefix)}
    others = set(inputs) - {f"{prefix}{name}" for name in cached} - {IDS, MASK, POSITIONS}
    heads = {one.shape[1] for one in cached.values()}
    kinds = {one.type for one in cached.values()}
    alike = len(heads) == 1 == len(kinds) and isinstance(next(iter(heads)), int) and next(iter(kinds)) in _KINDS
    if not alike or others or LOGITS not in {one.name for one in session.get_outputs()}:
        raise ModelError(
            f"{folder} cannot be served in batches of onnxruntime: its graph keeps its cache in another way.",
            remedy="Serve it with another --engine.",
        )
    size = int(config["model"]["decoder"]["head_size"])
    return CacheShape(tuple(cached), next(iter(heads)), size, _KINDS[next(iter(kinds))])


def _open(file: Path, threads: int | None) -> Any:
    os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")  # read when the library is loaded
    import onnxruntime

    onnxruntime.disable_telemetry_events()
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    if threads:
        options.intra_op_num_threads = threads
    try:
        return onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime's errors have no common base
        raise CorruptArtifactError(
            f"{file} cannot be loaded: {error}", remedy="Fetch the bundle anew, or run again."
        ) from error
