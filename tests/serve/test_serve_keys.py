"""Keys: made, found, limited, revoked; and the gate that asks for them."""

from __future__ import annotations

import errno
import json
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fakes.tiny_models import write_tiny_classifier
from slmops.errors import CorruptArtifactError, ServeError, StorageError, UsageError
from slmops.serve import keys as keys_module
from slmops.serve.access import needed_scope
from slmops.serve.engine import Engine
from slmops.serve.keys import Bucket, KeyFile, KeyRing
from slmops.serve.operate import ServeOptions, operate
from slmops.serve.reload import Version
from slmops.serve.server import background

QUESTION = {"input": "my card is lost"}


class Clock:
    def __init__(self) -> None:
        self.now_s = 1000.0

    def __call__(self) -> float:
        return self.now_s


# The file


def test_a_key_is_shown_once_and_kept_as_a_hash(tmp_path: Path) -> None:
    file = KeyFile(tmp_path / "keys.json")
    key, text = file.make("bob", ["infer"], per_minute=60, days=2)
    assert file.read() == (key,)
    kept = file.path.read_text() + file.secret_path.read_text()
    secret = text.rsplit("_", 1)[0], text.split("_", 2)[2]
    assert secret[1] not in kept
    assert text not in kept
    assert "hash" not in key.told()
    assert key.expires == key.created + 2 * 86_400
    for path in (file.path, file.secret_path):
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert KeyRing(file.path).find(text) == key


def test_the_file_of_keys_alone_tests_nothing(tmp_path: Path) -> None:
    file = KeyFile(tmp_path / "keys.json")
    _, text = file.make("bob", ["infer"])
    file.secret_path.write_text("00" * 32 + "\n")
    assert KeyRing(file.path).find(text) is None
    file.secret_path.unlink()
    with pytest.raises(ServeError, match=r"keys\.json\.secret is missing"):
        KeyRing(file.path)
    with pytest.raises(ServeError, match="is missing"):  # a second secret would shut out every key there is
        file.make("eve", ["infer"])


def test_a_wrong_key_is_no_key(tmp_path: Path) -> None:
    file = KeyFile(tmp_path / "keys.json")
    _, text = file.make("bob", ["infer"])
    ring = KeyRing(file.path)
    other = "A" if text[-1] != "A" else "B"
    for wrong in ("", "slm_", text[:-1], text[:-1] + other, text + "x", text.upper(), text.replace("slm_", "sk_"), "ü"):
        assert ring.find(wrong) is None


def test_an_expired_key_is_no_key(tmp_path: Path) -> None:
    file = KeyFile(tmp_path / "keys.json")
    _, text = file.make("bob", ["infer"], days=1, now=lambda: 1_000_000)
    assert KeyRing(file.path).find(text) is None


def test_bad_names_and_scopes_are_refused(tmp_path: Path) -> None:
    file = KeyFile(tmp_path / "keys.json")
    file.make("bob", ["infer"])
    with pytest.raises(UsageError, match="'bob' already"):
        file.make("bob", ["infer"])
    with pytest.raises(UsageError, match="root is no scope"):
        file.make("eve", ["root"])  # type: ignore[list-item]
    with pytest.raises(UsageError, match="no scope"):
        file.make("eve", [])
    with pytest.raises(UsageError, match="no key 'eve'"):
        file.revoke("eve")
    with pytest.raises(ServeError, match="slmops keys make"):
        KeyRing(tmp_path / "nothing.json")
    (tmp_path / "junk.json").write_text("{")
    with pytest.raises(CorruptArtifactError, match="no keys that can be read"):
        KeyFile(tmp_path / "junk.json").read()


def test_a_full_disk_leaves_the_keys_as_they_were(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = KeyFile(tmp_path / "keys.json")
    file.make("bob", ["infer"])
    before = file.path.read_bytes()

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(keys_module.os, "fsync", full)
    with pytest.raises(StorageError, match="No space left"):
        file.make("eve", ["infer"])
    assert file.path.read_bytes() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["keys.json", "keys.json.lock", "keys.json.secret"]


def test_a_running_server_sees_changes_and_survives_damage(tmp_path: Path) -> None:
    file, clock = KeyFile(tmp_path / "keys.json"), Clock()
    key, text = file.make("bob", ["infer"])
    ring = KeyRing(file.path, clock=clock)
    _, second = file.make("eve", ["infer"])
    assert ring.find(second) is None  # not looked for yet
    clock.now_s += 1.1
    assert ring.find(second) is not None
    file.revoke("bob")
    clock.now_s += 1.1
    assert ring.find(text) is None
    file.path.write_text("junk")
    clock.now_s += 1.1
    assert ring.find(second) is not None
    assert key.id not in ring._keys


# Limits


@given(
    per_minute=st.integers(1, 600),
    gaps=st.lists(st.floats(0, 30, allow_nan=False), min_size=1, max_size=200),
)
def test_no_more_than_a_burst_and_the_rate(per_minute: int, gaps: list[float]) -> None:
    bucket, now_s, taken = Bucket(per_minute), 0.0, 0
    for gap in gaps:
        now_s += gap
        if not bucket.wait_s(now_s):
            bucket.take(1)
            taken += 1
    assert taken <= per_minute + now_s * per_minute / 60 + 1e-6


@given(per_minute=st.integers(1, 600), used=st.integers(0, 5000))
def test_whoever_waits_as_told_is_let_in(per_minute: int, used: int) -> None:
    bucket = Bucket(per_minute)
    bucket.wait_s(0.0)
    bucket.take(used)
    wait_s = bucket.wait_s(0.0)
    assert bucket.wait_s(wait_s) == pytest.approx(0, abs=1e-6)
    assert (wait_s == 0) == (used <= per_minute - 1)


def test_tokens_are_counted_afterwards(tmp_path: Path) -> None:
    clock = Clock()
    file = KeyFile(tmp_path / "keys.json")
    key, text = file.make("bob", ["infer"], tokens_per_minute=100)
    ring = KeyRing(file.path, clock=clock)
    assert ring.find(text)
    assert ring.wait_s(key) == 0
    ring.spend(key.id, 160)
    assert ring.wait_s(key) == pytest.approx(61 * 60 / 100)
    clock.now_s += 37
    assert ring.wait_s(key) == 0


@pytest.mark.parametrize(
    ("path", "scope"),
    [
        ("/v1/chat/completions", "infer"),
        ("/v1/models", "infer"),
        ("/v1/feedback", "feedback"),
        ("/metrics", "metrics"),
        ("/admin/reload", "admin"),
        ("/admin/anything", "admin"),
        ("/anything", "infer"),
    ],
)
def test_each_path_needs_its_scope(path: str, scope: str) -> None:
    assert needed_scope(path) == scope


# The gate, over HTTP


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("labels")
    write_tiny_classifier(folder)
    return folder


def served(folder: Path, keys: Path | None) -> Any:
    def load(source: str) -> tuple[Version, Engine]:
        return Version(source, folder, ""), Engine.open(folder)

    return background(operate(str(folder), load, ServeOptions("intents", keys)))


@pytest.fixture(scope="module")
def guarded(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, dict[str, str]]]:
    file = KeyFile(tmp_path_factory.mktemp("keys") / "keys.json")
    texts = {
        "user": file.make("user", ["infer"])[1],
        "operator": file.make("operator", ["admin"])[1],
        "prometheus": file.make("prometheus", ["metrics"])[1],
        "slow": file.make("slow", ["infer"], per_minute=2)[1],
        "short": file.make("short", ["infer"], tokens_per_minute=3)[1],
    }
    with served(folder, file.path) as url:
        yield url, texts


def bearer(text: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {text}"}


def code_of(response: httpx.Response) -> tuple[int, str]:
    error = response.json()["error"]
    assert list(error) == ["message", "type", "param", "code"]
    return response.status_code, error["code"]


def test_a_key_opens_what_its_scope_covers(guarded: tuple[str, dict[str, str]]) -> None:
    url, texts = guarded
    assert httpx.post(f"{url}/v1/classify", json=QUESTION, headers=bearer(texts["user"])).status_code == 200
    assert httpx.get(f"{url}/metrics", headers=bearer(texts["prometheus"])).status_code == 200
    assert httpx.get(f"{url}/metrics", headers=bearer(texts["operator"])).status_code == 200
    assert httpx.get(f"{url}/admin/status", headers=bearer(texts["operator"])).status_code == 200
    lacking = (403, "insufficient_scope")
    assert code_of(httpx.get(f"{url}/metrics", headers=bearer(texts["user"]))) == lacking
    assert code_of(httpx.post(f"{url}/admin/reload", headers=bearer(texts["user"]))) == lacking
    assert code_of(httpx.post(f"{url}/v1/classify", json=QUESTION, headers=bearer(texts["operator"]))) == lacking


def test_without_a_key_only_health_is_told(guarded: tuple[str, dict[str, str]]) -> None:
    url, texts = guarded
    for path in ("/health", "/health/live", "/health/ready"):
        assert httpx.get(f"{url}{path}").status_code == 200
    for headers in ({}, bearer("wrong"), bearer(texts["user"][:-2] + "xx"), {"Authorization": texts["user"]}):
        for path in ("/v1/models", "/metrics", "/admin/status", "/nothing"):
            response = httpx.get(f"{url}{path}", headers=headers)
            assert code_of(response) == (401, "invalid_api_key")
            assert response.headers["www-authenticate"] == "Bearer"


def test_the_official_clients_key_is_the_one_that_is_checked(guarded: tuple[str, dict[str, str]]) -> None:
    import openai

    url, texts = guarded
    client = openai.OpenAI(base_url=f"{url}/v1", api_key=texts["user"], max_retries=0)
    assert client.models.list().data[0].id == "intents"
    with pytest.raises(openai.AuthenticationError):
        openai.OpenAI(base_url=f"{url}/v1", api_key="wrong", max_retries=0).models.list()


def test_a_key_in_a_url_is_refused_with_and_without_keys(
    guarded: tuple[str, dict[str, str]], folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    url, texts = guarded
    caplog.set_level("INFO")
    with served(folder, None) as open_url:
        for base in (url, open_url):
            for tail in (
                f"/v1/models?api_key={texts['user']}",
                "/v1/models?api_key=sk-other",
                f"/v1/models?q={texts['user']}",
                f"/v1/models/{texts['user']}",
                f"/health?token={texts['user']}",
            ):
                assert code_of(httpx.get(f"{base}{tail}", headers=bearer(texts["user"]))) == (400, "key_in_url")
        assert httpx.get(f"{open_url}/v1/models?api_key=").status_code == 200
    assert texts["user"] not in "".join(record.getMessage() for record in caplog.records if "slmops" in record.name)


def test_a_key_over_its_limits_is_told_when_to_come_again(guarded: tuple[str, dict[str, str]]) -> None:
    url, texts = guarded
    slow = [httpx.post(f"{url}/v1/classify", json=QUESTION, headers=bearer(texts["slow"])) for _ in range(3)]
    assert [answer.status_code for answer in slow] == [200, 200, 429]
    assert code_of(slow[2]) == (429, "rate_limit_exceeded")
    assert 1 <= int(slow[2].headers["retry-after"]) <= 30
    short = [httpx.post(f"{url}/v1/classify", json=QUESTION, headers=bearer(texts["short"])) for _ in range(2)]
    assert [answer.status_code for answer in short] == [200, 429]
    assert httpx.post(f"{url}/v1/classify", json=QUESTION, headers=bearer(texts["user"])).status_code == 200


def test_without_keys_administration_is_shut(folder: Path) -> None:
    with served(folder, None) as url:
        assert code_of(httpx.post(f"{url}/admin/reload", content=json.dumps({}))) == (403, "keys_required")
        assert httpx.post(f"{url}/v1/classify", json=QUESTION).status_code == 200
