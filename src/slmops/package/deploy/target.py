"""Ask and measure a runtime that has the bundle, over OpenAI's API on this machine."""

from __future__ import annotations

import json
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from slmops.errors import ServeError
from slmops.progress import Progress, ProgressSink, ignore

PROMPTS = (
    "My card was charged twice for the same order. What should I do?",
    "Write a short, polite reply to a customer whose parcel is late.",
    "How do I change the address of my account?",
    "Please tell me whether I can return shoes without the box.",
)
ASK_LIMIT_S = 300.0
AT_ONCE = (1, 4)
_NO_PROXY = urllib.request.build_opener(urllib.request.ProxyHandler({}))


class Target(Protocol):
    """A runtime that serves the bundle.

    ``base_url``  OpenAI's paths are below it
    ``models``    what it lists, the bundle's among them
    ``pid``       of its process, 0 where that is not ours to know
    ``notes``     what a person has to know of it
    """

    @property
    def name(self) -> str: ...
    @property
    def version(self) -> str: ...
    @property
    def base_url(self) -> str: ...
    @property
    def model_id(self) -> str: ...
    @property
    def models(self) -> Sequence[str]: ...
    @property
    def pid(self) -> int: ...
    @property
    def notes(self) -> Sequence[str]: ...


@dataclass(frozen=True)
class Answer:
    """``first_s`` and ``whole_s`` from the request's sending; ``tokens`` as the runtime counts them."""

    text: str
    tokens: int
    first_s: float
    whole_s: float


@dataclass(frozen=True)
class Deployed:
    """
    ``ttft_ms``, ``latency_ms``  ``{"p50", "p95"}`` of single requests, streamed
    ``tokens_per_s``             of a single request, its prompt included: p50
    ``together_tokens_per_s``    by how many callers at once: all their new tokens over the time of all
    ``memory_bytes_peak``        resident at most (VmHWM); None where it is not told
    """

    target: str
    version: str
    model: str
    models: tuple[str, ...]
    base_url: str
    question: str
    answer: str
    requests: int
    ttft_ms: dict[str, float]
    latency_ms: dict[str, float]
    tokens_per_s: float
    together_tokens_per_s: dict[str, float]
    memory_bytes_peak: int | None
    notes: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def try_out(
    target: Target,
    *,
    question: str = PROMPTS[0],
    requests: int = 8,
    max_tokens: int = 64,
    at_once: Sequence[int] = AT_ONCE,
    progress: ProgressSink = ignore,
) -> Deployed:
    """List, ask and measure. The first answer, which the reader sees, is also the warm-up.

    Raises:
        ServeError: the runtime does not list the model, refuses, or answers nothing.
    """
    if target.model_id not in target.models:
        raise ServeError(f"{target.name} lists {', '.join(target.models) or 'nothing'}, not {target.model_id}.")
    steps, done = 1 + requests + len(at_once), 0

    def step() -> None:
        nonlocal done
        done += 1
        progress(Progress("deploy", done, steps, "turns", target.name))

    first = ask(target, question, max_tokens)
    step()
    singles = []
    for number in range(requests):
        singles.append(ask(target, PROMPTS[number % len(PROMPTS)], max_tokens))
        step()
    together = {}
    for callers in at_once:
        together[str(callers)] = _together(target, callers, max_tokens)
        step()
    return Deployed(
        target=target.name,
        version=target.version,
        model=target.model_id,
        models=tuple(target.models),
        base_url=target.base_url,
        question=question,
        answer=first.text,
        requests=requests,
        ttft_ms=_percentiles([one.first_s for one in singles]),
        latency_ms=_percentiles([one.whole_s for one in singles]),
        tokens_per_s=float(np.median([one.tokens / one.whole_s for one in singles])),
        together_tokens_per_s=together,
        memory_bytes_peak=_peak_bytes(target.pid),
        notes=tuple(target.notes),
    )


def ask(target: Target, question: str, max_tokens: int) -> Answer:
    """One answer, streamed and greedy.

    Raises:
        ServeError: the runtime refuses, or answers nothing.
    """
    body = {
        "model": target.model_id,
        "messages": [{"role": "user", "content": question}],
        "max_tokens": max_tokens,
        "temperature": 0,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    request = urllib.request.Request(
        f"{target.base_url}/chat/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    started_s, first_s, text, pieces, counted = time.perf_counter(), 0.0, "", 0, 0
    try:
        with _NO_PROXY.open(request, timeout=ASK_LIMIT_S) as reply:
            for line in reply:
                event = _event(line)
                if event is None:
                    continue
                counted = (event.get("usage") or {}).get("completion_tokens", counted)
                piece = "".join((one.get("delta") or {}).get("content") or "" for one in event.get("choices") or ())
                if piece:
                    first_s = first_s or time.perf_counter() - started_s
                    text, pieces = text + piece, pieces + 1
    except urllib.error.HTTPError as error:
        said = error.read(2000).decode("utf-8", "replace").strip()
        raise ServeError(f"{target.name} refused the question with {error.code}: {said[:300]}") from None
    except OSError as error:
        raise ServeError(f"{target.name} at {target.base_url} does not answer: {error}.") from None
    if not text:
        raise ServeError(f"{target.name} answered nothing to {question!r}.", remedy="Try slmops chat on the bundle.")
    return Answer(text, counted or pieces, first_s, time.perf_counter() - started_s)


def _event(line: bytes) -> dict[str, Any] | None:
    if not line.startswith(b"data:") or line[5:].strip() == b"[DONE]":
        return None
    event: dict[str, Any] = json.loads(line[5:])
    if "error" in event:
        raise ServeError(f"The runtime failed within its answer: {event['error']}")
    return event


def _together(target: Target, callers: int, max_tokens: int) -> float:
    started_s = time.perf_counter()
    with ThreadPoolExecutor(callers) as pool:
        answers = list(pool.map(lambda n: ask(target, PROMPTS[n % len(PROMPTS)], max_tokens), range(callers)))
    return sum(one.tokens for one in answers) / (time.perf_counter() - started_s)


def _percentiles(seconds: Sequence[float]) -> dict[str, float]:
    if not seconds:
        return {}
    return {f"p{share}": 1e3 * float(np.percentile(seconds, share)) for share in (50, 95)}


def _peak_bytes(pid: int) -> int | None:
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return None
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith("VmHWM:")), None)
