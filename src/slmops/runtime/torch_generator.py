"""A causal language model run by transformers on the CPU: generate, stream, score.

Guarantees
    ``generate``: requests of like sampling run in one batch, padded on the left, prompts of like length together. A
    greedy answer is the one that the request gets alone (up to ties that rounding decides: in fp32 none were seen).
    A sampled answer with a seed depends on the request alone, not on its neighbours.
    ``finish_reason`` is ``stop`` where the model ended its turn or a stop text came, else ``length``, also where the
    model's context is full. ``completion_tokens`` does not count the token that ends the turn; ``logprob`` does. It is
    under the model's own distribution (temperature 1, no top-p), whatever was sampled with.
    ``score``: teacher-forced, on the ids and the mask of :meth:`slmops.chat.ChatTokenizer.encode_training`, padded on
    the right. Logits are computed only where a token is scored: ``[scored tokens, vocabulary]``, never
    ``[rows, length, vocabulary]``.
    Nothing is fetched or sent; code inside the model folder is not run.

Not covered: accelerators, quantized weights, encoder-decoder models.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING, Any, Literal

from slmops.artifacts import Message
from slmops.chat import ChatTokenizer, EncodedChat
from slmops.errors import ContextLengthError, MissingExtraError, ModelError, ModelNotFoundError, UsageError
from slmops.models.quiet import load_bitsandbytes, quiet_transformers
from slmops.runtime.base import Delta, FinishReason, Generation, GenerationRequest, TextScore
from slmops.runtime.stops import StopScanner

if TYPE_CHECKING:
    import numpy as np
    import torch
    from numpy.typing import NDArray
    from torch import Tensor

Precision = Literal["fp32", "bf16"]

BATCH_ROWS = 16
BATCH_TOKENS = 8192
"""Padded tokens of a batch, those to come included: bounds the cache."""

SCORE_TOKENS = 4096
"""Padded tokens of a batch that is scored."""

SCORE_LOGITS = 2**26
"""Logits of a batch that is scored, at most (256 MB in fp32), unless one row alone has more."""


class TorchGenerator:
    """See the module. Calls from several threads are safe and take turns at each forward pass."""

    def __init__(self, model: Any, chat: ChatTokenizer) -> None:
        import inspect

        self.chat = chat
        self._model = model.eval()
        self._accepts = frozenset(inspect.signature(model.forward).parameters)
        self._turn = Lock()

    @classmethod
    def load(
        cls,
        path: Path | str,
        *,
        adapter: Path | str | None = None,
        precision: Precision = "fp32",
        threads: int | None = None,
    ) -> TorchGenerator:
        """Open a folder in the layout of transformers.

        ``adapter``: a peft folder, merged into the weights. ``threads``: of torch, for the whole process.

        Raises:
            MissingExtraError: torch or transformers are not installed.
            ModelNotFoundError: no model, or no adapter, there.
            ModelError: the weights cannot be read, or are not those of a causal language model.
        """
        folder = Path(path)
        if not (folder / "config.json").is_file():
            raise ModelNotFoundError(
                f"{folder} is not a model folder: it has no config.json.",
                remedy="Name a folder with config.json, model.safetensors and tokenizer.json.",
            )
        chat = ChatTokenizer.load(folder)
        try:
            import torch
        except ImportError:
            raise MissingExtraError("Running a torch model", "train") from None
        quiet_transformers()
        if threads is not None:
            torch.set_num_threads(threads)
        model = _load_model(folder)
        if adapter is not None:
            model = _merge(model, Path(adapter))
        return cls(model.to(torch.bfloat16) if precision == "bf16" else model, chat)

    def generate(self, requests: Sequence[GenerationRequest]) -> list[Generation]:
        """Answers in the order of the requests.

        Raises:
            UsageError: settings that mean nothing (``max_tokens`` below 1, ``top_p`` outside (0, 1], ...).
            ModelError: a prompt that the template refuses.
            ContextLengthError: a prompt that leaves no room for an answer.
        """
        answers = [self._open(request) for request in requests]
        for batch in plan_batches(answers):
            for _ in self._run(batch):
                pass
        return [answer.generation() for answer in answers]

    def stream(self, request: GenerationRequest) -> Iterator[Delta]:
        """One answer, piece by piece; errors as :meth:`generate`, raised at once. Closing the iterator stops it."""
        return self._stream(self._open(request))

    def score(self, conversations: Sequence[tuple[tuple[Message, ...], str]]) -> list[TextScore]:
        """How likely each target is after its messages, the end of the turn included.

        Raises:
            ModelError: the template refuses a conversation.
            ContextLengthError: conversation and target are longer than the model's context.
        """
        chats = [self.chat.encode_training(messages, target) for messages, target in conversations]
        for encoded in chats:
            self._check_length(len(encoded.input_ids), room=0)
        sums = [0.0] * len(chats)
        for rows in self._plan_scores(chats):
            for row, value in zip(rows, self._score_batch([chats[row] for row in rows]), strict=True):
                sums[row] = value
        return [
            # The first token of all has nothing before it: it is given, not scored.
            TextScore(logprob, sum(encoded.loss_mask[1:]), len(target.encode("utf-8", "replace")))
            for logprob, encoded, (_, target) in zip(sums, chats, conversations, strict=True)
        ]

    def target_logits(self, messages: tuple[Message, ...], target: str) -> NDArray[np.float32]:
        """Logits that predict each token of ``target``, ``[tokens, vocabulary]`` float32; raises as :meth:`score`."""
        import torch

        encoded = self.chat.encode_training(messages, target)
        self._check_length(len(encoded.input_ids), room=0)
        ids = torch.tensor([encoded.input_ids])
        wanted = torch.tensor([encoded.loss_mask])[:, 1:]
        with self._turn, torch.inference_mode():
            logits = self._logits_at(ids, torch.ones_like(ids), torch.nn.functional.pad(wanted, (0, 1)))
        rows: NDArray[np.float32] = logits.float().numpy()
        return rows

    def close(self) -> None:
        """Free the weights. The generator cannot be used afterwards."""
        self._model = None

    @property
    def model(self) -> Any:
        """The model of transformers, for whoever looks inside."""
        return self._model

    # Generation

    @property
    def context_tokens(self) -> int | None:
        """Tokens that the model can hold, prompt and answer together; None where its configuration does not say."""
        limit = getattr(self._model.config.get_text_config(), "max_position_embeddings", None)
        return limit if isinstance(limit, int) and limit > 0 else None

    def _open(self, request: GenerationRequest) -> Answer:
        check_request(request)
        prompt = self.chat.encode_prompt(request.messages)
        self._check_length(len(prompt), room=1)
        limit = self.context_tokens
        room = request.max_tokens if limit is None else min(request.max_tokens, limit - len(prompt))
        return Answer(request, prompt, room, self.chat)

    def _check_length(self, tokens: int, room: int) -> None:
        limit = self.context_tokens
        if limit is not None and tokens + room > limit:
            raise ContextLengthError(tokens, limit)

    def _stream(self, answer: Answer) -> Iterator[Delta]:
        shown = 0
        for _ in self._run([answer]):
            piece, shown = answer.text[shown:], len(answer.text)
            if answer.finish_reason is not None:
                yield Delta(piece, answer.finish_reason, len(answer.prompt), answer.tokens)
            elif piece:
                yield Delta(piece)

    def _run(self, answers: Sequence[Answer]) -> Iterator[None]:
        """Carry the answers on together, one token at a time, until all are finished; finished rows leave the batch."""
        import torch

        active = list(answers)
        ids, mask = _pad([answer.prompt for answer in active], self.chat.pad_token_id, left=True)
        cache: Any = None
        while True:
            logits, cache = self._forward(ids, mask, cache)
            tokens, logprobs = choose(logits, active)
            for answer, token, logprob in zip(active, tokens, logprobs, strict=True):
                answer.take(token, logprob)
            yield
            going = [row for row, answer in enumerate(active) if answer.finish_reason is None]
            if not going:
                return
            if len(going) < len(active):
                rows = torch.tensor(going)
                active = [active[row] for row in going]
                mask = mask[rows]
                cache.batch_select_indices(rows)
            ids = torch.tensor([[tokens[row]] for row in going])
            mask = torch.cat([mask, mask.new_ones(len(going), 1)], dim=1)

    def _forward(self, ids: Tensor, mask: Tensor, cache: Any) -> tuple[Tensor, Any]:
        """Logits of each row's next token, float32 ``[rows, vocabulary]``, and the cache."""
        import torch

        extra: dict[str, Any] = {}
        if "position_ids" in self._accepts:
            positions = (mask.cumsum(dim=1) - 1).clamp(min=0)
            extra["position_ids"] = positions[:, -ids.shape[1] :]
        if "logits_to_keep" in self._accepts:
            extra["logits_to_keep"] = 1
        with self._turn, torch.inference_mode():
            out = self._model(input_ids=ids, attention_mask=mask, past_key_values=cache, use_cache=True, **extra)
        return out.logits[:, -1].float(), out.past_key_values

    # Scores

    def _plan_scores(self, chats: Sequence[EncodedChat]) -> Iterator[list[int]]:
        """Rows of like length together, within the bounds on tokens and logits."""
        most = max(1, SCORE_LOGITS // self._model.config.get_text_config().vocab_size)
        batch: list[int] = []
        scored = 0
        for row in sorted(range(len(chats)), key=lambda row: len(chats[row].input_ids)):
            here = sum(chats[row].loss_mask)
            if batch and (len(chats[row].input_ids) * (len(batch) + 1) > SCORE_TOKENS or scored + here > most):
                yield batch
                batch, scored = [], 0
            batch.append(row)
            scored += here
        if batch:
            yield batch

    def _score_batch(self, chats: Sequence[EncodedChat]) -> list[float]:
        """Sum of the log-probabilities of each row's masked tokens (nats)."""
        import torch

        ids, mask = _pad([encoded.input_ids for encoded in chats], self.chat.pad_token_id, left=False)
        wanted = torch.zeros_like(mask, dtype=torch.bool)
        for row, encoded in enumerate(chats):
            wanted[row, : len(encoded.loss_mask)] = torch.tensor(encoded.loss_mask)
        wanted = wanted[:, 1:]  # position i tells of token i + 1
        predicting = torch.nn.functional.pad(wanted, (0, 1))
        with self._turn, torch.inference_mode():
            logits = self._logits_at(ids, mask, predicting)
            logprobs = _logprobs(logits, ids[:, 1:][wanted])
        rows = predicting.nonzero()[:, 0]
        sums = torch.zeros(len(chats), dtype=torch.float64).index_add_(0, rows, logprobs.double())
        return [float(value) for value in sums]

    def _logits_at(self, ids: Tensor, mask: Tensor, where: Tensor) -> Tensor:
        """Logits at the positions that ``where`` names, ``[positions, vocabulary]``.

        The hidden states are thinned out on their way into the output layer, so that whatever a model does to its
        logits behind that layer (Gemma 2 caps them, Granite scales them) is done as ever.
        """
        head = self._model.get_output_embeddings()
        hooks = []
        if head is not None:
            hooks.append(head.register_forward_pre_hook(lambda _, args: (args[0][where].unsqueeze(0), *args[1:])))
        try:
            logits: Tensor = self._model(input_ids=ids, attention_mask=mask, use_cache=False).logits
        finally:
            for hook in hooks:
                hook.remove()
        return logits[where] if logits.shape[:2] == ids.shape and not hooks else logits[0]


class Answer:
    """One request on its way: what has been written, and whether and why it ended."""

    def __init__(self, request: GenerationRequest, prompt: list[int], room: int, chat: ChatTokenizer) -> None:
        self.request = request
        self.prompt = prompt
        self.room = room  # new tokens at most
        self.text = ""
        self.tokens = 0
        self.logprob = 0.0
        self.finish_reason: FinishReason | None = None
        self.random = _random(request)
        self._enders = frozenset(chat.eos_token_ids)
        self._decoder = chat.stream_decoder()
        self._stop = StopScanner(request.stop)

    def take(self, token: int, logprob: float) -> None:
        """Go on by one token."""
        self.logprob += logprob
        ended = token in self._enders
        if not ended:
            self.tokens += 1
            self.text += self._stop.push(self._decoder.push(token))
        if not self._stop.stopped and (ended or self.tokens >= self.room):
            self.text += self._stop.push(self._decoder.flush())
            self.text += self._stop.flush()
            self.finish_reason = "stop" if ended else "length"
        if self._stop.stopped:
            self.finish_reason = "stop"

    def generation(self) -> Generation:
        if self.finish_reason is None:
            raise RuntimeError("The answer is not finished.")
        return Generation(self.text, self.finish_reason, len(self.prompt), self.tokens, self.logprob)


def plan_batches(answers: Sequence[Answer]) -> list[list[Answer]]:
    """Answers of like sampling together, by length of prompt, within :data:`BATCH_ROWS` and :data:`BATCH_TOKENS`."""
    batches: list[list[Answer]] = []
    settings: tuple[float, float] | None = None
    tokens = 0  # of the longest row of the batch at hand, its answer included
    for answer in sorted(answers, key=lambda a: (_settings(a.request), len(a.prompt))):
        tokens = max(tokens, len(answer.prompt) + answer.room)
        full = batches and (len(batches[-1]) >= BATCH_ROWS or (len(batches[-1]) + 1) * tokens > BATCH_TOKENS)
        if _settings(answer.request) != settings or full:
            batches.append([])
            settings, tokens = _settings(answer.request), len(answer.prompt) + answer.room
        batches[-1].append(answer)
    return batches


def choose(logits: Tensor, answers: Sequence[Answer]) -> tuple[list[int], list[float]]:
    """The next token of each row and its log-probability under the model. ``logits``: ``[rows, vocabulary]``."""
    import torch

    with torch.inference_mode():
        tokens = logits.argmax(dim=-1)
        for row, answer in enumerate(answers):
            if answer.random is not None:
                tokens[row] = _sample(logits[row], answer.request, answer.random)
        logprobs = logits.gather(1, tokens[:, None])[:, 0] - logits.logsumexp(dim=-1)
        return tokens.tolist(), logprobs.tolist()


def check_request(request: GenerationRequest) -> None:
    """Refuse settings that mean nothing.

    Raises:
        UsageError: says which, and the value.
    """
    if request.adapter:
        raise UsageError(
            f"There is no adapter named {request.adapter!r}: this model is whole.",
            remedy="Keep adapters apart: slmops adapters export.",
        )
    if request.constraint is not None or request.top_logprobs is not None or request.tools:
        raise UsageError(
            "torch writes plain text here: no functions, no schema, no log-probabilities of tokens.",
            remedy="Compress the checkpoint, and ask that: slmops compress.",
        )
    if request.max_tokens < 1:
        raise UsageError(f"max_tokens is {request.max_tokens}.", remedy="Ask for at least 1 token.")
    if not 0 <= request.temperature < float("inf"):
        raise UsageError(f"temperature is {request.temperature}.", remedy="Give 0 (greedy) or a positive number.")
    if not 0 < request.top_p <= 1:
        raise UsageError(f"top_p is {request.top_p}.", remedy="Give a number above 0 and at most 1.")


def _settings(request: GenerationRequest) -> tuple[float, float]:
    return request.temperature, request.top_p if request.temperature > 0 else 1.0


def _random(request: GenerationRequest) -> torch.Generator | None:
    """Where a sampled answer's randomness comes from; None for a greedy one."""
    import torch

    if request.temperature == 0:
        return None
    random = torch.Generator()
    if request.seed is None:
        random.seed()
    else:
        random.manual_seed(request.seed)
    return random


def _sample(logits: Tensor, request: GenerationRequest, random: torch.Generator) -> Tensor:
    """Nucleus sampling (Holtzman et al. 2020, arXiv:1904.09751): from the fewest tokens that hold ``top_p``."""
    import torch

    probabilities = torch.softmax(logits / request.temperature, dim=-1)
    if request.top_p < 1:
        ordered, order = probabilities.sort(descending=True)
        before = ordered.cumsum(dim=-1) - ordered
        ordered[before >= request.top_p] = 0
        probabilities = torch.zeros_like(probabilities).scatter_(0, order, ordered)
    return torch.multinomial(probabilities, 1, generator=random)[0]


def _logprobs(logits: Tensor, tokens: Tensor, rows_at_once: int = 128) -> Tensor:
    """Log-probability of ``tokens`` ``[n]`` under ``logits`` ``[n, vocabulary]``, some rows at a time: a softmax over
    all would double the memory."""
    import torch

    parts = [torch.zeros(0)]
    for start in range(0, len(tokens), rows_at_once):
        part, wanted = logits[start : start + rows_at_once].float(), tokens[start : start + rows_at_once]
        parts.append(part.gather(1, wanted[:, None])[:, 0] - part.logsumexp(dim=-1))
    return torch.cat(parts)


def _pad(rows: Sequence[Sequence[int]], pad_token_id: int, *, left: bool) -> tuple[Tensor, Tensor]:
    """Ids and attention mask, int64 ``[rows, longest]``."""
    import torch

    longest = max(map(len, rows))
    ids = torch.full((len(rows), longest), pad_token_id, dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for index, row in enumerate(rows):
        place = slice(longest - len(row), longest) if left else slice(0, len(row))
        ids[index, place] = torch.tensor(row, dtype=torch.int64)
        mask[index, place] = 1
    return ids, mask


def _load_model(folder: Path) -> Any:
    import torch
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM

    from slmops.models.bottleneck import attach_saved_bottlenecks

    try:
        model, info = AutoModelForCausalLM.from_pretrained(
            str(folder), dtype=torch.float32, local_files_only=True, trust_remote_code=False, output_loading_info=True
        )
    except (OSError, ValueError, RuntimeError, LookupError, SafetensorError) as error:
        raise ModelError(
            f"{folder} cannot be loaded as a causal language model: {error}",
            remedy="Fetch or train the model again; a classifier is opened as a classifier.",
        ) from error
    missing = sorted(info["missing_keys"])
    if missing:
        raise ModelError(
            f"{folder} lacks {len(missing)} weights of a causal language model, the first {missing[0]!r}.",
            remedy="Fetch or train the model again; a classifier is opened as a classifier.",
        )
    attach_saved_bottlenecks(model, folder)
    return model


def _merge(model: Any, adapter: Path) -> Any:
    """The model with the adapter's change added to its weights: as fast as the model itself."""
    if not (adapter / "adapter_config.json").is_file():
        raise ModelNotFoundError(
            f"{adapter} is not an adapter: it has no adapter_config.json.",
            remedy="Name a folder that peft has written.",
        )
    load_bitsandbytes()
    try:
        from peft import PeftModel
    except ImportError:
        raise MissingExtraError("An adapter", "train") from None
    try:
        return PeftModel.from_pretrained(model, str(adapter)).merge_and_unload()
    except (OSError, ValueError, RuntimeError, LookupError) as error:
        raise ModelError(
            f"The adapter {adapter} does not fit the model: {error}", remedy="Name the model that it was trained on."
        ) from error
