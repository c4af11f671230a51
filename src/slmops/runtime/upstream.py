"""A model behind another server that speaks OpenAI's chat completions: an upstream, or Foundry Local as a child.

Guarantees: nothing is sent before :func:`check_allowed` has agreed, which for another machine it does only where that
was asked for by name; texts to another machine go through ``redact`` first; no proxy is used for this machine. An
upstream that fails is an error in words; a request is tried once. Closing a stream ends the request.
Not covered: log-probabilities, adapters, plain continuation, constrained answers.
"""

from __future__ import annotations

import ipaddress
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from slmops.artifacts import Message
from slmops.errors import MissingExtraError, PrivacyError, ServeError, UsageError
from slmops.runtime.base import Delta, FinishReason, Generation, GenerationRequest, TextScore
from slmops.runtime.description import ModelDescription
from slmops.runtime.foundry import FoundryServer
from slmops.runtime.gguf_slots import whole

AT_ONCE = 16
TIMEOUT_S = 120.0
Redact = Callable[[str], str]


@dataclass(frozen=True)
class Upstream:
    """
    ``model``     what the upstream calls it
    ``base_url``  with ``/v1`` or what stands in its place
    ``key``       sent as a bearer token; None: no header
    ``remote``    whether another machine may be asked
    """

    model: str
    base_url: str
    key: str | None = None
    remote: bool = False

    @property
    def is_local(self) -> bool:
        """Whether it is this machine."""
        host = urlsplit(self.base_url).hostname or ""
        if host == "localhost":
            return True
        try:
            return ipaddress.ip_address(host).is_loopback
        except ValueError:
            return False


def check_allowed(upstream: Upstream, *, redacts: bool) -> None:
    """Refuse what would send texts to another machine without leave.

    Raises:
        UsageError: the address is none.
        PrivacyError: another machine, and that was not allowed, or nothing takes personal data out.
    """
    parts = urlsplit(upstream.base_url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise UsageError(f"{upstream.base_url!r} is no address of a server.", remedy="Write http://HOST:PORT/v1.")
    if upstream.is_local:
        return
    if not upstream.remote:
        raise PrivacyError(
            f"{parts.hostname} is another machine, and what callers write would be sent there.",
            remedy="If that is meant, say so: --privacy remote.",
        )
    if not redacts:
        raise PrivacyError(f"Texts for {parts.hostname} would be sent as they are.", remedy="Redact them first.")


class UpstreamGenerator:
    """See the module. :attr:`at_once` threads may use it at the same time."""

    at_once = AT_ONCE

    def __init__(
        self,
        upstream: Upstream | Callable[[], Upstream],
        *,
        redact: Redact | None = None,
        on_close: Callable[[], None] | None = None,
        timeout_s: float = TIMEOUT_S,
    ) -> None:
        """``upstream`` may be a function, for one that moves. ``on_close``: what else ends with it.

        Raises:
            PrivacyError, UsageError: see :func:`check_allowed`.
            MissingExtraError: httpx is not installed.
        """
        try:
            import httpx
        except ImportError:
            raise MissingExtraError("Asking an upstream", "serve") from None
        self._where = upstream if callable(upstream) else lambda: upstream
        check_allowed(self._where(), redacts=redact is not None)
        local = self._where().is_local
        self._redact = None if local else redact
        self._on_close = on_close
        self._httpx = httpx
        self._client = httpx.Client(timeout=httpx.Timeout(timeout_s, connect=10.0), trust_env=not local)
        self.description = ModelDescription("openai", "generator", name=self._where().model)
        self.child_pid: Callable[[], int] = lambda: 0
        """Of the process that answers, where it is a child of ours; 0 while there is none."""

    @classmethod
    def foundry(cls, folder: Path) -> UpstreamGenerator:
        """The model folder in Foundry Local, which runs as a child of ours and is started again when it dies.

        Raises:
            UsageError: Foundry Local is not installed.
            ModelError: it cannot serve this folder.
        """
        server = FoundryServer.start(folder)
        try:
            made = cls(lambda: Upstream(server.model_id, server.base_url), on_close=server.close)
        except BaseException:
            server.close()
            raise
        made.description = ModelDescription.read(folder)
        made.child_pid = lambda: server.pid
        return made

    def generate(self, requests: Sequence[GenerationRequest]) -> list[Generation]:
        """Answers in the order of ``requests``, several at once.

        Raises:
            ServeError: the upstream refused, or was not there.
        """
        with ThreadPoolExecutor(self.at_once) as threads:
            return list(threads.map(lambda request: whole(self.stream(request)), requests))

    def stream(self, request: GenerationRequest) -> Iterator[Delta]:
        """One answer, piece by piece; the last piece has the finish reason and the counts, where the upstream tells.

        Raises:
            ServeError: the upstream refused, or was not there.
        """
        upstream = self._where()
        headers = {"Authorization": f"Bearer {upstream.key}"} if upstream.key else {}
        body = asking(upstream.model, request, self._redact)
        url = f"{upstream.base_url.rstrip('/')}/chat/completions"
        try:
            with self._client.stream("POST", url, json=body, headers=headers) as reply:
                if reply.status_code != 200:
                    raise refusal(reply.status_code, reply.read())
                yield from written(event_lines(reply.iter_lines()))
        except self._httpx.HTTPError as error:
            raise ServeError(
                f"The upstream could not be asked: {type(error).__name__}.", remedy="Is it running? Ask again."
            ) from None

    def score(self, conversations: Sequence[tuple[tuple[Message, ...], str]]) -> list[TextScore]:
        """Raises :class:`NotImplementedError`: an upstream does not tell how likely a given text is."""
        raise NotImplementedError("An upstream does not tell how likely a given text is.")

    def close(self) -> None:
        """End connections, and the child where there is one."""
        self._client.close()
        if self._on_close is not None:
            self._on_close()


def asking(model: str, request: GenerationRequest, redact: Redact | None) -> dict[str, Any]:
    """The body of the request; only what differs from the API's defaults, for servers that know less."""
    clean = redact or (lambda text: text)
    body: dict[str, Any] = {
        "model": model,
        "messages": [{"role": one.role, "content": clean(one.content)} for one in request.messages],
        "max_tokens": request.max_tokens,
        "temperature": request.temperature,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    if request.top_p != 1:
        body["top_p"] = request.top_p
    if request.seed is not None:
        body["seed"] = request.seed
    if request.stop:
        body["stop"] = list(request.stop)
    return body


def event_lines(lines: Iterator[str]) -> Iterator[Mapping[str, Any]]:
    """The JSON of server-sent events, up to ``[DONE]``."""
    for line in lines:
        if not line.startswith("data:"):
            continue
        data = line[5:].strip()
        if data == "[DONE]":
            return
        yield json.loads(data)


def written(events: Iterator[Mapping[str, Any]]) -> Iterator[Delta]:
    """Events as pieces. Raises :class:`ServeError` where one tells of a failure, or the end never came."""
    reason: FinishReason | None = None
    usage: Mapping[str, Any] = {}
    for event in events:
        if "error" in event:
            raise ServeError(f"The upstream failed: {event['error']}")
        usage = event.get("usage") or usage
        for choice in event.get("choices") or ():
            if text := (choice.get("delta") or {}).get("content"):
                yield Delta(text)
            if choice.get("finish_reason"):
                reason = "length" if choice["finish_reason"] == "length" else "stop"
    if reason is None:
        raise ServeError("The upstream ended within an answer.", remedy="Ask again.")
    yield Delta("", reason, int(usage.get("prompt_tokens") or 0), int(usage.get("completion_tokens") or 0))


def refusal(status: int, content: bytes) -> ServeError:
    """An upstream's error in words: its own message where it has OpenAI's form."""
    try:
        said = json.loads(content)["error"]["message"]
    except (ValueError, KeyError, TypeError):
        said = content[:200].decode("utf-8", "replace").strip() or "no more than that"
    return ServeError(f"The upstream answered {status}: {said}")
