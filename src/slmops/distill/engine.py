"""Asks a teacher over any OpenAI-compatible endpoint, many requests at once.

Guarantees: at most ``concurrency`` requests in flight; each request is tried ``retries + 1`` times at most, each try
bounded by ``timeout_s`` as a whole; Retry-After is honoured by every request, not only by the one that was told; the
token budget is reserved before a request leaves, so it is not overrun. Redirects are not followed, proxies are not used
for this machine, and nothing is read from the client library's own environment variables: rows and keys go to
``base_url`` and nowhere else.

Not here: what was answered before (:mod:`slmops.distill.journal`), whether answers are any good
(:mod:`slmops.distill.checks`).
"""

from __future__ import annotations

import asyncio
import json
import queue
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AsyncExitStack, suppress
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from slmops.distill.privacy import OPENAI_URL, api_key, is_loopback, teacher_url
from slmops.distill.retry import LONGEST_RETRY_AFTER_S, Breaker, Trouble, backoff_s, retry_after_s
from slmops.distill.teachers import TeacherFailure, estimated_tokens
from slmops.errors import MissingExtraError, TeacherError
from slmops.recipe import TeacherConfig
from slmops.runtime import Generation, GenerationRequest

if TYPE_CHECKING:
    from openai import AsyncOpenAI

_RETRIED_STATUSES = frozenset({408, 409, 425, 429})
WORKERS_PER_CLIENT = 64
"""A client keeps 100 idle connections and looks at all of them for each request: several small pools cost less."""
_Outcome = tuple[int, Generation | TeacherFailure]


class OpenAITeacher:
    """The teacher named by ``config.model`` ("openai:MODEL") at ``config.base_url``.

    Raises:
        RecipeError: the URL is not one, or the API key's variable is not set.
        MissingExtraError: the client library is not installed.
    """

    def __init__(self, config: TeacherConfig, *, seed: int | None = None) -> None:
        self.url = teacher_url(config)
        self.model = config.model.removeprefix("openai:")
        self.identity = f"{config.model} at {self.url}"
        self._config = config
        self._key = api_key(config)
        self._rng = random.Random(seed)
        _require_client()

    def answer(self, requests: Sequence[GenerationRequest], *, budget_tokens: int | None = None) -> Iterator[_Outcome]:
        """As :meth:`slmops.distill.teachers.TextTeacher.answer`. The work runs in a thread of its own."""
        outcomes: queue.SimpleQueue[_Outcome | None] = queue.SimpleQueue()
        asking = _Asking(self, requests, budget_tokens, outcomes.put)
        with ThreadPoolExecutor(1, thread_name_prefix="teacher") as executor:
            ended = executor.submit(asyncio.run, asking.run(lambda: outcomes.put(None)))
            try:
                while (outcome := outcomes.get()) is not None:
                    yield outcome
            finally:
                asking.stop()
            ended.result()

    def client(self) -> AsyncOpenAI:
        """The official client, set up to talk to :attr:`url` alone."""
        from openai import AsyncOpenAI, DefaultAsyncHttpxClient, Omit

        is_openai = self.url == OPENAI_URL
        silent = {} if is_openai else {"OpenAI-Organization": Omit(), "OpenAI-Project": Omit()}
        return AsyncOpenAI(
            base_url=self.url,
            api_key=self._key or "none",
            max_retries=0,
            timeout=self._config.timeout_s,
            default_headers=silent,  # type: ignore[arg-type]  # Omit is allowed; the signature does not say so
            http_client=DefaultAsyncHttpxClient(follow_redirects=False, trust_env=not is_loopback(self.url)),
        )

    def body(self, request: GenerationRequest) -> dict[str, Any]:
        """The request as JSON. OpenAI's own newer models know only ``max_completion_tokens``."""
        hosted = (urlsplit(self.url).hostname or "").endswith("openai.com")
        body: dict[str, Any] = {
            "model": self.model,
            "messages": [message.to_json() for message in request.messages],
            "max_completion_tokens" if hosted else "max_tokens": request.max_tokens,
            "temperature": request.temperature,
        }
        if request.top_p != 1.0:
            body["top_p"] = request.top_p
        if request.seed is not None:
            body["seed"] = request.seed
        if request.stop:
            body["stop"] = list(request.stop)
        return body

    async def attempt(self, client: AsyncOpenAI, request: GenerationRequest) -> Generation | Trouble:
        """One try. Every way in which it can go wrong comes back as a :class:`Trouble`."""
        from openai import APIConnectionError, APIStatusError, APITimeoutError

        timed_out = Trouble("timeout", f"no answer from {self.url} within {self._config.timeout_s:g} s")
        try:
            async with asyncio.timeout(self._config.timeout_s):
                # The plain post, not chat.completions.create: that one walks the types of every message, a sixth of
                # the time of a request, and the answer is checked here anyway.
                content = await client.post("/chat/completions", cast_to=str, body=self.body(request))
        except (TimeoutError, APITimeoutError):
            return timed_out
        except APIConnectionError as error:
            return Trouble("connection", f"{self.url} cannot be reached: {error.__cause__ or error}")
        except APIStatusError as error:
            return self._status_trouble(error.status_code, error.response.headers, error.message, error.code)
        return read_completion(content, request)

    def _status_trouble(self, status: int, headers: Mapping[str, str], message: str, code: str | None) -> Trouble:
        detail = f"{self.url} answered {status}: {message[:300]}"
        if status == 429 and code == "insufficient_quota":
            return Trouble("refused_request", detail, retry=False, fatal=True)
        if status in _RETRIED_STATUSES or status >= 500:
            kind = "rate_limit" if status == 429 else "server_error"
            return Trouble(kind, detail, wait_s=retry_after_s(headers))  # type: ignore[arg-type]
        return Trouble("refused_request", detail, retry=False, fatal=status in {401, 402, 404} or 300 <= status < 400)

    def stopped(self, trouble: Trouble, answers: int) -> TeacherError:
        """The error of a run that cannot go on."""
        begun = f" after {answers:,} answers, which are kept" if answers else ""
        variable = self._config.api_key_env or "(none: set teacher.api_key_env)"
        match trouble.kind:
            case "connection" | "timeout":
                remedy = "Check that the server runs and that teacher.base_url is right, then run again."
            case "rate_limit":
                remedy = "Run again later, or lower teacher.concurrency."
            case "refused_request":
                remedy = f"Check teacher.model, teacher.base_url, and the key in {variable}."
            case _:
                remedy = "Run again when the server is well; answers so far are not asked for again."
        wait = f" It asks to wait {trouble.wait_s:,.0f} s." if (trouble.wait_s or 0) > LONGEST_RETRY_AFTER_S else ""
        return TeacherError(
            f"The teacher {self._config.model} cannot be asked{begun}: {trouble.detail.rstrip('.')}.{wait}",
            remedy=remedy,
        )


class _Asking:
    """One call of :meth:`OpenAITeacher.answer`: all that lives inside the event loop."""

    def __init__(
        self,
        teacher: OpenAITeacher,
        requests: Sequence[GenerationRequest],
        budget_tokens: int | None,
        emit: Callable[[_Outcome], None],
    ) -> None:
        config = teacher._config
        self._teacher = teacher
        self._requests = requests
        self._emit = emit
        self._retries = config.retries
        self._workers = min(config.concurrency, len(requests))
        self._waiting = iter(range(len(requests)))
        self._breaker = Breaker(config.concurrency, config.retries)
        self._budget = _Budget(budget_tokens)
        self._resume_at = 0.0
        self._loop: asyncio.AbstractEventLoop | None = None
        self._task: asyncio.Task[None] | None = None
        self._stopped = False

    async def run(self, ended: Callable[[], None]) -> None:
        self._loop, self._task = asyncio.get_running_loop(), asyncio.current_task()
        try:
            if self._stopped:
                return
            async with AsyncExitStack() as clients, asyncio.TaskGroup() as workers:
                for start in range(0, self._workers, WORKERS_PER_CLIENT):
                    client = await clients.enter_async_context(self._teacher.client())
                    for _ in range(min(WORKERS_PER_CLIENT, self._workers - start)):
                        workers.create_task(self._work(client))
        except* TeacherError as errors:
            raise _first(errors) from None
        finally:
            self._task = None
            ended()

    def stop(self) -> None:
        """Called from the other thread; does nothing when the work has ended."""
        self._stopped = True
        loop, task = self._loop, self._task
        if loop is not None and task is not None:
            with suppress(RuntimeError):  # the loop closed in between
                loop.call_soon_threadsafe(task.cancel)

    async def _work(self, client: AsyncOpenAI) -> None:
        for index in self._waiting:
            request = self._requests[index]
            reserved = estimated_tokens(request.messages) + request.max_tokens
            if not await self._budget.reserve(reserved):
                self._emit((index, TeacherFailure("budget", self._budget.told())))
                continue
            used = 0
            try:
                outcome = await self._ask(client, request)
                if isinstance(outcome, Generation):
                    used = outcome.prompt_tokens + outcome.completion_tokens
            finally:
                await self._budget.settle(reserved, used)
            self._emit((index, outcome))

    async def _ask(self, client: AsyncOpenAI, request: GenerationRequest) -> Generation | TeacherFailure:
        loop = asyncio.get_running_loop()
        attempt = 0
        while True:
            # Everyone waits out a pause that the server asked for, then starts a little apart.
            while (pause_s := self._resume_at - loop.time()) > 0:
                await asyncio.sleep(pause_s + self._teacher._rng.uniform(0, 0.1 * pause_s))
            outcome = await self._teacher.attempt(client, request)
            if isinstance(outcome, Generation):
                self._breaker.succeeded()
                return outcome
            if self._breaker.failed(outcome):
                raise self._teacher.stopped(outcome, self._breaker.answers)
            attempt += 1
            if not outcome.retry or attempt > self._retries:
                return TeacherFailure(outcome.kind, outcome.detail)
            if outcome.wait_s is not None:
                self._resume_at = max(self._resume_at, loop.time() + outcome.wait_s)
            else:
                await asyncio.sleep(backoff_s(attempt, self._teacher._rng))


class _Budget:
    """Tokens reserved before and settled after each request: what is spent stays within ``limit_tokens``."""

    def __init__(self, limit_tokens: int | None) -> None:
        self._limit_tokens = limit_tokens
        self._spent_tokens = 0
        self._reserved_tokens = 0
        self._changed = asyncio.Condition()

    async def reserve(self, tokens: int) -> bool:
        """Wait until ``tokens`` fit; False when they cannot fit any more."""
        if self._limit_tokens is None:
            return True
        async with self._changed:
            while self._spent_tokens + self._reserved_tokens + tokens > self._limit_tokens:
                if self._reserved_tokens == 0:
                    return False
                await self._changed.wait()
            self._reserved_tokens += tokens
        return True

    async def settle(self, reserved: int, used: int) -> None:
        if self._limit_tokens is None:
            return
        async with self._changed:
            self._reserved_tokens -= reserved
            self._spent_tokens += used
            self._changed.notify_all()

    def told(self) -> str:
        return f"{self._spent_tokens:,} of {self._limit_tokens:,} tokens were spent"


def read_completion(content: str, request: GenerationRequest) -> Generation | Trouble:
    """The answer in the body of a chat completion; :class:`Trouble` "junk" for any other body.

    Token counts are the server's, or estimated from bytes where it gives none.
    """
    try:
        raw = json.loads(content)
        choice = raw["choices"][0]
        text = _message_text(choice["message"])
    except (ValueError, KeyError, IndexError, TypeError, AttributeError, RecursionError) as error:
        return Trouble("junk", f"the answer is not a chat completion ({type(error).__name__}): {content[:80]!r}")
    usage = raw.get("usage") if isinstance(raw.get("usage"), dict) else {}
    return Generation(
        text=text,
        finish_reason="length" if choice.get("finish_reason") == "length" else "stop",
        prompt_tokens=_count(usage.get("prompt_tokens"), estimated_tokens(request.messages)),
        completion_tokens=_count(usage.get("completion_tokens"), len(text.encode()) // 3 + 1),
    )


def _message_text(message: Mapping[str, Any]) -> str:
    """Text of a message: a string, parts of text, or a refusal. Half of a surrogate pair becomes "?"."""
    content = message["content"] if message.get("content") is not None else message.get("refusal") or ""
    if isinstance(content, list):
        content = "".join(part["text"] for part in content if part.get("type") == "text")
    if not isinstance(content, str):
        raise TypeError(f"content is a {type(content).__name__}")
    return content.encode("utf-8", "replace").decode("utf-8")


def _count(value: object, otherwise: int) -> int:
    return value if isinstance(value, int) and not isinstance(value, bool) and value >= 0 else otherwise


def _first(errors: BaseExceptionGroup[TeacherError]) -> TeacherError:
    first = errors.exceptions[0]
    return _first(first) if isinstance(first, BaseExceptionGroup) else first


def _require_client() -> None:
    from importlib.util import find_spec

    if find_spec("openai") is None:
        raise MissingExtraError("A teacher behind an API", "train")
