"""Models and data sets from a hub, against a stand-in on loopback."""

from __future__ import annotations

import logging
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.importorskip("huggingface_hub")

from fakes.hub import FakeHub
from slmops.errors import DataError, GatedModelError, ModelError, ModelNotFoundError
from slmops.models import fetch_hub_dataset, fetch_model
from slmops.progress import Progress


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    with FakeHub() as running:
        monkeypatch.setenv("HF_ENDPOINT", running.endpoint)
        yield running


def _paths(hub: FakeHub) -> set[str]:
    return {request.path for request in hub.requests}


def test_a_branch_is_resolved_to_its_commit(
    hub: FakeHub, model_bytes: dict[str, bytes], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    commit = hub.push("owner/tiny", model_bytes)
    with caplog.at_level(logging.INFO, "slmops"):
        model = fetch_model("hf:owner/tiny@main", cache=tmp_path / "cache")
    assert model.revision == commit
    assert model.license == "mit"
    assert model.source == "hf:owner/tiny@main"
    assert commit in caplog.text
    assert {path.name for path in model.path.iterdir()} == set(model_bytes)
    assert (model.path / "model.safetensors").read_bytes() == model_bytes["model.safetensors"]
    assert model.path.is_relative_to(tmp_path / "cache" / "hub")


def test_the_digest_is_of_contents_wherever_they_came_from(
    hub: FakeHub, model_bytes: dict[str, bytes], tiny_llama: Path, tmp_path: Path
) -> None:
    hub.push("owner/tiny", model_bytes)
    from_hub = fetch_model("hf:owner/tiny", cache=tmp_path / "cache")
    from_folder = fetch_model(str(tiny_llama), cache=tmp_path / "cache")
    assert from_hub.digest == from_folder.digest


def test_a_pinned_commit_stays_when_the_branch_moves(
    hub: FakeHub, model_bytes: dict[str, bytes], tmp_path: Path
) -> None:
    old = hub.push("owner/tiny", model_bytes)
    new = hub.push("owner/tiny", {**model_bytes, "README.md": b"---\nlicense: apache-2.0\n---\n"})
    assert old != new
    pinned = fetch_model(f"hf:owner/tiny@{old}", cache=tmp_path)
    latest = fetch_model("hf:owner/tiny", cache=tmp_path)
    assert (pinned.revision, pinned.license) == (old, "mit")
    assert (latest.revision, latest.license) == (new, "apache-2.0")


def test_code_pickles_and_other_layouts_are_not_fetched(
    hub: FakeHub, model_bytes: dict[str, bytes], tmp_path: Path
) -> None:
    unwanted = {
        "modeling_tiny.py": b"raise SystemExit",
        "pytorch_model.bin": b"pickle",
        "consolidated.safetensors": b"x",
        "onnx/config.json": b"{}",
        "model.fp16.safetensors": b"x",
    }
    hub.push("owner/tiny", {**model_bytes, **unwanted})
    model = fetch_model("hf:owner/tiny", cache=tmp_path)
    assert {path.name for path in model.path.iterdir()} == set(model_bytes)
    assert not [path for path in _paths(hub) for name in unwanted if path.endswith("/" + name)]


def test_only_the_model_is_asked_for(hub: FakeHub, model_bytes: dict[str, bytes], tmp_path: Path) -> None:
    hub.push("owner/tiny", model_bytes)
    fetch_model("hf:owner/tiny", cache=tmp_path)
    assert all("owner/tiny" in path for path in _paths(hub)), "a request that is not for the model"
    assert not any("torch/" in request.user_agent or "agent/" in request.user_agent for request in hub.requests)


def test_a_second_fetch_downloads_nothing(hub: FakeHub, model_bytes: dict[str, bytes], tmp_path: Path) -> None:
    hub.push("owner/tiny", model_bytes)
    first = fetch_model("hf:owner/tiny", cache=tmp_path)
    hub.requests.clear()
    assert fetch_model("hf:owner/tiny", cache=tmp_path) == first
    assert not [request for request in hub.requests if "/resolve/" in request.path and request.method == "GET"]


def test_a_cut_connection_is_resumed(hub: FakeHub, model_bytes: dict[str, bytes], tmp_path: Path) -> None:
    chunk = 10 << 20  # the hub library writes pieces of this size and resumes at the last whole one
    large = bytes(range(256)) * (2 * chunk // 256 + 1)
    hub.push("owner/tiny", {**model_bytes, "merges.txt": large})
    hub.cut_once("merges.txt", after_bytes=chunk + 1000)
    model = fetch_model("hf:owner/tiny", cache=tmp_path)
    assert (model.path / "merges.txt").read_bytes() == large
    assert [r.range for r in hub.requests if r.range] == [f"bytes={chunk}-"]


def test_progress_counts_bytes_up_to_all_of_them(
    hub: FakeHub, model_bytes: dict[str, bytes], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    hub.push("owner/tiny", model_bytes)
    events: list[Progress] = []
    fetch_model("hf:owner/tiny", cache=tmp_path, progress=events.append)
    total = sum(map(len, model_bytes.values()))
    assert (events[-1].done, events[-1].total, events[-1].unit) == (total, total, "bytes")
    assert [event.done for event in events] == sorted(event.done for event in events)
    assert capfd.readouterr() == ("", ""), "the library drew on the terminal"


@pytest.mark.parametrize("by", ["argument", "environment"])
def test_offline_uses_the_cache_and_asks_nobody(
    by: str, hub: FakeHub, model_bytes: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.push("owner/tiny", model_bytes)
    online = fetch_model("hf:owner/tiny", cache=tmp_path)
    hub.requests.clear()
    if by == "environment":
        monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert fetch_model("hf:owner/tiny", cache=tmp_path, offline=by == "argument") == online
    assert hub.requests == []


def test_offline_without_the_model_says_so(hub: FakeHub, tmp_path: Path) -> None:
    with pytest.raises(ModelNotFoundError, match=r"owner/tiny@v1 is not in the cache.*offline.*Run once") as caught:
        fetch_model("hf:owner/tiny@v1", cache=tmp_path, offline=True)
    assert hub.requests == []
    assert caught.value.remedy is not None


def test_offline_with_half_a_model_is_refused(hub: FakeHub, model_bytes: dict[str, bytes], tmp_path: Path) -> None:
    hub.push("owner/tiny", model_bytes)
    model = fetch_model("hf:owner/tiny", cache=tmp_path)
    (model.path / "model.safetensors").unlink()
    with pytest.raises(ModelNotFoundError, match="not all of it"):
        fetch_model("hf:owner/tiny", cache=tmp_path, offline=True)


def test_a_dead_hub_is_no_matter_when_the_cache_is_whole(
    model_bytes: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with FakeHub() as hub:
        monkeypatch.setenv("HF_ENDPOINT", hub.endpoint)
        hub.push("owner/tiny", model_bytes)
        online = fetch_model("hf:owner/tiny", cache=tmp_path)
    assert fetch_model("hf:owner/tiny", cache=tmp_path) == online


def test_a_gated_model_says_what_to_do(
    hub: FakeHub, model_bytes: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.push("owner/tiny", model_bytes)
    hub.gate("owner/tiny", token="hf_accepted")
    with pytest.raises(GatedModelError, match=r"HTTP 401.*Accept the licence.*HF_TOKEN") as caught:
        fetch_model("hf:owner/tiny", cache=tmp_path)
    assert f"{hub.endpoint}/owner/tiny" in str(caught.value)
    monkeypatch.setenv("HF_TOKEN", "hf_somebody_else")
    with pytest.raises(GatedModelError, match="HTTP 403"):
        fetch_model("hf:owner/tiny", cache=tmp_path)
    monkeypatch.setenv("HF_TOKEN", "hf_accepted")
    assert fetch_model("hf:owner/tiny", cache=tmp_path).license == "mit"


def test_an_unknown_model_is_not_found(hub: FakeHub, tmp_path: Path) -> None:
    with pytest.raises(ModelNotFoundError, match=r"There is no model owner/nothing at http.*spelling"):
        fetch_model("hf:owner/nothing", cache=tmp_path)


def test_an_unknown_revision_is_named(hub: FakeHub, model_bytes: dict[str, bytes], tmp_path: Path) -> None:
    hub.push("owner/tiny", model_bytes)
    with pytest.raises(ModelNotFoundError, match=r"no revision 'v9'"):
        fetch_model("hf:owner/tiny@v9", cache=tmp_path)


def test_a_network_that_is_down_names_the_endpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        endpoint = f"http://127.0.0.1:{free.getsockname()[1]}"
    monkeypatch.setenv("HF_ENDPOINT", endpoint)
    with pytest.raises(ModelError, match="could not be reached") as caught:
        fetch_model("hf:owner/tiny", cache=tmp_path)
    assert endpoint in caught.value.message
    assert "HF_ENDPOINT" in (caught.value.remedy or "")
    assert not isinstance(caught.value, ModelNotFoundError)


def test_a_hub_in_trouble_is_told_by_its_status(hub: FakeHub, tmp_path: Path) -> None:
    hub.failing_status = 418
    with pytest.raises(ModelError, match=r"answered HTTP 418 when asked for the model owner/tiny"):
        fetch_model("hf:owner/tiny", cache=tmp_path)


def test_a_model_of_pickles_alone_is_refused(hub: FakeHub, tmp_path: Path, model_bytes: dict[str, bytes]) -> None:
    del model_bytes["model.safetensors"]
    hub.push("owner/old", {**model_bytes, "pytorch_model.bin": b"pickle"})
    with pytest.raises(ModelError, match=r"owner/old has no safetensors.*pickled"):
        fetch_model("hf:owner/old", cache=tmp_path)


def test_a_data_set_is_its_tables(hub: FakeHub, tmp_path: Path) -> None:
    files = {
        "README.md": b"---\nlicense: cc-by-4.0\n---\n",
        "data/train.csv": b"text,label\nhello,greeting\n",
        "data/test.jsonl": b'{"text": "bye", "label": "parting"}\n',
        "load.py": b"raise SystemExit",
        "image.png": b"png",
    }
    commit = hub.push("owner/rows", files, kind="datasets")
    folder = fetch_hub_dataset("owner/rows", "main", cache=tmp_path)
    found = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    assert found == {"README.md", "data/train.csv", "data/test.jsonl"}
    assert folder.name == commit
    hub.requests.clear()
    assert fetch_hub_dataset("owner/rows", commit, cache=tmp_path, offline=True) == folder
    assert hub.requests == []


def test_data_set_errors_speak_of_data_sets(hub: FakeHub, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="There is no data set owner/none"):
        fetch_hub_dataset("owner/none", None, cache=tmp_path)
    hub.push("owner/code", {"load.py": b"x"}, kind="datasets")
    with pytest.raises(DataError, match="no parquet"):
        fetch_hub_dataset("owner/code", None, cache=tmp_path)
    hub.push("owner/closed", {"a.csv": b"x\n1\n"}, kind="datasets")
    hub.gate("owner/closed", token="t", kind="datasets")
    with pytest.raises(GatedModelError, match=r"The data set owner/closed is gated.*/datasets/owner/closed"):
        fetch_hub_dataset("owner/closed", None, cache=tmp_path)
