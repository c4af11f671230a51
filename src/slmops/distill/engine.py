"""Asks a teacher over any OpenAI-compatible endpoint, many requests at once.

Guarantees: at most ``concurrency`` requests in flight, fewer while the server is slow or overloaded
(:mod:`slmops.distill.pace`); each request is tried ``retries + 1`` times at most, each try bounded by ``timeout_s`` as
a whole; Retry-After is honoured by every request, not only by the one that was told; tokens and money are reserved
before a request leaves, so that a budget is not overrun (:mod:`slmops.distill.budget`); after the time limit nothing is
asked, and what is in flight is waited for. A server that refuses ``response_format`` is asked without it from then on.
Each request carries an Idempotency-Key, for the gateways that know it. Redirects are not followed, proxies are not
used for this machine, and nothing is read from the client library's own environment variables: rows and keys go to
``base_url`` and nowhere else. Memory does not grow with the answers that were handed out.

Not here: what was answered before (:mod:`slmops.distill.journal`), whether answers are any good
(:mod:`slmops.distill.checks`).
"""

from __future__ import annotations

import asyncio
import json
import logging
import queue
import random
import ssl
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AsyncExitStack, suppress
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from slmops.distill.budget import UNLIMITED, Ledger, Limits, load_prices
from slmops.distill.journal import request_digest
from slmops.distill.pace import CONGESTION, Pace
from slmops.distill.privacy import OPENAI_URL, api_key, is_loopback, teacher_url
from slmops.distill.retry import LONGEST_RETRY_AFTER_S, Breaker, Trouble, backoff_s, retry_after_s
from slmops.distill.teachers import TeacherFailure, TeacherRequest, estimated_tokens
from slmops.errors import MissingExtraError, TeacherError
from slmops.recipe import TeacherConfig
from slmops.runtime import Generation, GenerationRequest

if TYPE_CHECKING:
    from openai import AsyncOpenAI

logger = logging.getLogger(__name__)

_RETRIED_STATUSES = frozenset({408, 409, 425, 429})
LAG_EVERY_S = 0.05
WORKERS_PER_CLIENT = 16
"""A client looks at all of its connections for each request, a third of its time where they are 64: small pools."""
_CUT = frozenset({"length", "content_filter"})
"""Reasons to finish that leave an answer without its end."""
FORMAT_STATUSES = frozenset({400, 404, 415, 422, 501})
"""Answers to a request with ``response_format`` that may mean that the server does not have it."""
_Outcome = tuple[int, Generation | TeacherFailure]


class OpenAITeacher:
    """The teacher named by ``config.model`` ("openai:MODEL") at ``config.base_url``.

    Raises:
        RecipeError: the URL is not one, the API key's variable is not set, or the price of the model is not known.
        MissingExtraError: the client library is not installed.
    """

    def __init__(self, config: TeacherConfig, *, seed: int | None = None) -> None:
        self.url = teacher_url(config)
        self.model = config.model.removeprefix("openai:")
        self.identity = f"{config.model} at {self.url}"
        self.prices = load_prices(config)
        self.structured = config.structured is not False
        self._structured_before = False
        self._config = config
        self._key = api_key(config)
        self._rng = random.Random(seed)
        _require_client()

    def answer(self, requests: Sequence[GenerationRequest], *, limits: Limits = UNLIMITED) -> Iterator[_Outcome]:
        """As :meth:`slmops.distill.teachers.TextTeacher.answer`. The work runs in a thread of its own."""
        outcomes: queue.SimpleQueue[_Outcome | None] = queue.SimpleQueue()
        asking = _Asking(self, requests, limits, outcomes.put)
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
        # Reading certificates takes 20 ms a client; without TLS, and with no redirect followed, none is needed.
        plain: Any = {"verify": ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)} if self.url.startswith("http://") else {}
        trust_env = not is_loopback(self.url)
        return AsyncOpenAI(
            base_url=self.url,
            api_key=self._key or "none",
            max_retries=0,
            timeout=self._config.timeout_s,
            default_headers=silent,  # type: ignore[arg-type]  # Omit is allowed; the signature does not say so
            http_client=DefaultAsyncHttpxClient(follow_redirects=False, trust_env=trust_env, **plain),
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
        if self.structured and isinstance(request, TeacherRequest) and request.response_format is not None:
            body["response_format"] = request.response_format
        return body

    async def attempt(self, client: AsyncOpenAI, request: GenerationRequest) -> Generation | Trouble:
        """One try. Every way in which it can go wrong comes back as a :class:`Trouble`."""
        from openai import APIConnectionError, APIStatusError, APITimeoutError

        body = self.body(request)
        options: Any = {"headers": {"Idempotency-Key": request_digest(self.identity, request)[:48]}}
        timed_out = Trouble("timeout", f"no answer from {self.url} within {self._config.timeout_s:g} s", billed=True)
        try:
            async with asyncio.timeout(self._config.timeout_s):
                # The plain post, not chat.completions.create: that one walks the types of every message, a sixth of
                # the time of a request, and the answer is checked here anyway.
                content = await client.post("/chat/completions", cast_to=str, body=body, options=options)
        except (TimeoutError, APITimeoutError):
            return timed_out
        except APIConnectionError as error:
            never_left = "Connect" in type(error.__cause__).__name__
            return Trouble(
                "connection", f"{self.url} cannot be reached: {error.__cause__ or error}", billed=not never_left
            )
        except APIStatusError as error:
            named = "response_format" in error.message or "schema" in error.message.casefold()
            doubtful = "response_format" in body and error.status_code in FORMAT_STATUSES
            if doubtful and (named or not self._structured_before):
                return Trouble("refused_format", f"{self.url} answered {error.status_code}: {error.message[:300]}")
            return self._status_trouble(error.status_code, error.response.headers, error.message, error.code)
        outcome = read_completion(content, request)
        self._structured_before |= "response_format" in body and isinstance(outcome, Generation)
        return outcome

    def _status_trouble(self, status: int, headers: Mapping[str, str], message: str, code: str | None) -> Trouble:
        detail = f"{self.url} answered {status}: {message[:300]}"
        if status == 429 and code == "insufficient_quota":
            return Trouble("refused_request", detail, retry=False, fatal=True)
        if status in _RETRIED_STATUSES or status >= 500:
            kind = "rate_limit" if status == 429 else "overloaded" if status in {503, 529} else "server_error"
            return Trouble(kind, detail, wait_s=retry_after_s(headers))  # type: ignore[arg-type]
        return Trouble("refused_request", detail, retry=False, fatal=status in {401, 402, 404} or 300 <= status < 400)

    def stopped(self, trouble: Trouble, answers: int) -> TeacherError:
        """The error of a run that cannot go on."""
        begun = f" after {answers:,} answers, which are kept" if answers else ""
        variable = self._config.api_key_env or "(none: set teacher.api_key_env)"
        match trouble.kind:
            case "connection" | "timeout":
                remedy = "Check that the server runs and that teacher.base_url is right, then run again."
            case "rate_limit" | "overloaded":
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
        limits: Limits,
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
        self._ledger = Ledger(limits, teacher.prices)
        self._settled = asyncio.Condition()
        self._gate = _Gate(Pace(config.concurrency))
        self._lag_s = 0.0
        self._resume_at = 0.0
        self._ends_at = float("inf")
        self._loop: asyncio.AbstractEventLoop | None = None
        self._task: asyncio.Task[None] | None = None
        self._stopped = False

    async def run(self, ended: Callable[[], None]) -> None:
        self._loop, self._task = asyncio.get_running_loop(), asyncio.current_task()
        if (limit_s := self._ledger.limits.time_s) is not None:
            self._ends_at = self._loop.time() + limit_s
        try:
            if self._stopped:
                return
            async with AsyncExitStack() as clients, asyncio.TaskGroup() as workers:
                watch = asyncio.create_task(self._watch_lag())
                clients.callback(watch.cancel)
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

    async def _watch_lag(self) -> None:
        """How long this loop keeps a request waiting by itself: twice what a sleeper wakes too late, once when it is
        sent and once when its answer is there."""
        loop = asyncio.get_running_loop()
        while True:
            begun_s = loop.time()
            await asyncio.sleep(LAG_EVERY_S)
            late_s = loop.time() - begun_s - LAG_EVERY_S
            self._lag_s = 0.5 * self._lag_s + 0.5 * 2 * late_s

    async def _work(self, client: AsyncOpenAI) -> None:
        loop = asyncio.get_running_loop()
        for index in self._waiting:
            outcome = self._over() if loop.time() >= self._ends_at else await self._ask(client, self._requests[index])
            self._emit((index, outcome))

    def _over(self) -> TeacherFailure:
        return TeacherFailure("time_limit", f"{self._ledger.limits.time_s or 0:g} s were over")

    async def _ask(self, client: AsyncOpenAI, request: GenerationRequest) -> Generation | TeacherFailure:
        loop = asyncio.get_running_loop()
        attempt = 0
        while True:
            # Everyone waits out a pause that the server asked for, then starts a little apart.
            while (pause_s := self._resume_at - loop.time()) > 0:
                await asyncio.sleep(min(pause_s + self._teacher._rng.uniform(0, 0.1 * pause_s), self._left_s()))
                if loop.time() >= self._ends_at:
                    return self._over()
            outcome = await self._try(client, request)
            if not isinstance(outcome, Trouble):
                if isinstance(outcome, Generation):
                    self._breaker.succeeded()
                return outcome
            if outcome.kind == "refused_format":
                self._drop_format(outcome)
                continue
            if self._breaker.failed(outcome):
                raise self._teacher.stopped(outcome, self._breaker.answers)
            attempt += 1
            if not outcome.retry or attempt > self._retries:
                return TeacherFailure(outcome.kind, outcome.detail)
            if outcome.wait_s is not None:
                self._resume_at = max(self._resume_at, loop.time() + outcome.wait_s)
            else:
                await asyncio.sleep(min(backoff_s(attempt, self._teacher._rng), self._left_s()))
            if loop.time() >= self._ends_at:
                return TeacherFailure("time_limit", f"{self._over().detail}; the last try: {outcome.detail}")

    def _left_s(self) -> float:
        return max(0.0, self._ends_at - asyncio.get_running_loop().time())

    async def _try(self, client: AsyncOpenAI, request: GenerationRequest) -> Generation | TeacherFailure | Trouble:
        """One try, in its place in the queue and paid for."""
        loop = asyncio.get_running_loop()
        await self._gate.enter()
        begun_s = loop.time()
        congested = False
        try:
            if begun_s >= self._ends_at:
                return self._over()
            outcome = await self._paid(client, request)
            congested = isinstance(outcome, Trouble) and outcome.kind in CONGESTION
            if isinstance(outcome, Generation):
                self._gate.pace.answered(begun_s, loop.time(), self._lag_s)
            elif congested:
                self._gate.pace.congested(begun_s, loop.time())
            return outcome
        finally:
            self._gate.leave()

    async def _paid(self, client: AsyncOpenAI, request: GenerationRequest) -> Generation | TeacherFailure | Trouble:
        ledger = self._ledger
        if not ledger.bounded:
            return await self._teacher.attempt(client, request)
        estimated = estimated_tokens(request.messages)
        if isinstance(request, TeacherRequest) and request.response_format is not None:
            estimated += len(json.dumps(request.response_format)) // 3  # servers count it as prompt
        async with self._settled:
            while not ledger.reserve(most := ledger.most_prompt_tokens(estimated), request.max_tokens):
                if ledger.idle:
                    return TeacherFailure("budget", ledger.told())
                await self._settled.wait()
        reserved = (most, request.max_tokens)
        used = reserved  # at most, where it is not known
        try:
            outcome = await self._teacher.attempt(client, request)
            if isinstance(outcome, Generation):
                used = (outcome.prompt_tokens, outcome.completion_tokens)
                ledger.learn(estimated, outcome.prompt_tokens)
            elif not outcome.billed:
                used = (0, 0)
            return outcome
        finally:
            async with self._settled:
                ledger.settle(reserved, used)
                self._settled.notify_all()

    def _drop_format(self, refused: Trouble) -> None:
        """Once refused, it is not sent again; a request that the server refuses for something else fails then."""
        if self._teacher.structured:
            logger.info("The teacher is asked without response_format from here on: %s", refused.detail)
        self._teacher.structured = False


class _Gate:
    """Lets as many in as ``pace`` says at the moment, in the order in which they came."""

    def __init__(self, pace: Pace) -> None:
        self.pace = pace
        self._inside = 0
        self._queue: deque[asyncio.Future[None]] = deque()

    async def enter(self) -> None:
        if self._inside < self.pace.at_once and not self._queue:
            self._inside += 1
            return
        place: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._queue.append(place)
        try:
            await place
        except asyncio.CancelledError:
            if place.done() and not place.cancelled():
                self.leave()
            raise

    def leave(self) -> None:
        self._inside -= 1
        while self._queue and self._inside < self.pace.at_once:
            place = self._queue.popleft()
            if not place.done():
                self._inside += 1
                place.set_result(None)


def read_completion(content: str, request: GenerationRequest) -> Generation | Trouble:
    """The answer in the body of a chat completion; :class:`Trouble` "junk" for any other body.

    Token counts are the server's, or estimated from bytes where it gives none.
    """
    try:
        raw = json.loads(content)
        choice = raw["choices"][0]
        text = _message_text(choice["message"])
    except (ValueError, KeyError, IndexError, TypeError, AttributeError, RecursionError) as error:
        told = f"the answer is not a chat completion ({type(error).__name__}): {content[:80]!r}"
        return Trouble("junk", told, billed=True)
    usage = raw.get("usage") if isinstance(raw.get("usage"), dict) else {}
    return Generation(
        text=text,
        finish_reason="length" if choice.get("finish_reason") in _CUT else "stop",
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
