"""Real processes: the true runtime on real model files, and processes that die in every way."""

from __future__ import annotations

import json
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from fakes.tiny_models import write_tiny_classifier, write_tiny_generator, write_tiny_llama
from slmops.artifacts import Message
from slmops.errors import MemoryBudgetError, ModelError
from slmops.evaluate.measure import Measurement, latency_ratio, measure, measure_interleaved
from slmops.progress import Progress
from slmops.runtime import GenerationRequest

MIB = 1 << 20
TEXTS = [f"my card number {n} is lost, where is my refund?" for n in range(40)]

SLEEPER = """
import sys, time
import numpy as np
from slmops.evaluate import probe
from slmops.runtime import Delta, Generation

class Sleeper:
    labels = ("a",)

    def __init__(self, path):
        self.seconds = float(path.rpartition("/")[2])
        self.held = bytearray(40 << 20)
        self.held[:: 4096] = b"x" * len(self.held[:: 4096])
        print("loud libraries print here")

    def probabilities(self, texts):
        time.sleep(self.seconds * len(texts) ** 0.5)
        return np.ones((len(texts), 1), dtype=np.float32)

    def stream(self, request):
        time.sleep(self.seconds)
        yield Delta("one")
        time.sleep(self.seconds)
        yield Delta(" two", None)
        yield Delta("", "stop", 3, request.max_tokens)

    def generate(self, requests):
        time.sleep(2 * self.seconds)
        return [Generation("one two", "stop", 3, request.max_tokens) for request in requests]

    def close(self): pass

def opener(job):
    model = Sleeper(job["path"])
    if job["form"] == "classifier":
        return probe.ClassifierTurns(model, job["requests"])
    return probe.GeneratorTurns(model, [probe.read_request(raw) for raw in job["requests"]])

probe.main(sys.argv[1:], opener)
"""


def command(folder: Path, code: str) -> list[str]:
    script = folder / "probe.py"
    script.write_text(textwrap.dedent(code), "utf-8")
    return [sys.executable, str(script)]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("measured") / "model"
    write_tiny_classifier(folder)
    return folder


def test_a_real_classifier_is_measured_in_its_own_process(tiny: Path) -> None:
    events: list[Progress] = []
    found = measure(tiny, form="classifier", requests=TEXTS, threads=1, rounds=4, progress=events.append)
    assert 0 < found.latency_ms["p50"] <= found.latency_ms["p95"] < 1000
    assert found.throughput_per_s > 1
    assert found.requests == 40
    assert len(found.rounds_p50_ms) == 4
    assert found.load_s > 0
    assert found.threads == 1
    assert found.batch == 32
    assert found.tokens_per_s is found.ttft_ms is found.batch_tokens_per_s is None
    assert 5 * MIB < found.memory_bytes_loaded < found.memory_bytes_peak_single <= found.memory_bytes_peak
    # Python, numpy, tokenizers and onnxruntime. sklearn, torch or transformers would not fit in.
    assert found.memory_bytes_peak < 130 * MIB
    assert (events[-1].done, events[-1].total) == (6, 6)
    assert Measurement.from_json(json.loads(json.dumps(found.to_json()))) == found


def test_the_measured_process_imports_what_the_runtime_needs_alone() -> None:
    code = (
        "import sys, slmops.evaluate.probe; "
        "print(*sorted({name.partition('.')[0] for name in sys.modules} | set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = set(done.stdout.split())
    heavy = {
        "sklearn",
        "scipy",
        "pandas",
        "torch",
        "transformers",
        "matplotlib",
        "pydantic",
        "sacrebleu",
        "rouge_score",
    }
    assert not heavy & loaded
    assert not {"slmops.recipe", "slmops.evaluate.metrics", "slmops.evaluate.measure"} & loaded


def test_one_model_against_itself_has_a_ratio_about_one(tiny: Path) -> None:
    both = measure_interleaved({"a": tiny, "b": tiny}, form="classifier", requests=TEXTS, threads=1, rounds=5)
    ratio, low, high = latency_ratio(both["a"], both["b"])
    assert low <= ratio <= high
    assert 0.2 < ratio < 5  # about 1 on a quiet machine


def test_times_and_counts_are_right(tmp_path: Path) -> None:
    probe = command(tmp_path, SLEEPER)
    paths = {"slow": Path("/0.02"), "fast": Path("/0.005")}
    found = measure_interleaved(paths, form="classifier", requests=TEXTS[:15], rounds=3, warmup=2, probe=probe)
    slow, fast = found["slow"], found["fast"]
    # Sleeping is never shorter than asked; how much longer depends on who else uses the machine.
    assert 20 <= slow.latency_ms["p50"] <= slow.latency_ms["p95"] < 200
    assert 5 <= fast.latency_ms["p50"] < 100
    assert 0.3 < slow.throughput_per_s / (32 / (0.02 * 32**0.5)) <= 1
    assert slow.memory_bytes_loaded > 40 * MIB
    assert slow.requests == fast.requests == 15
    ratio, low, high = latency_ratio(slow, fast)
    assert low <= ratio <= high
    assert 1 < ratio < 6  # 4 on a quiet machine
    back, back_low, back_high = latency_ratio(fast, slow)
    assert (back_low, back, back_high) == pytest.approx((1 / high, 1 / ratio, 1 / low))


def test_a_generator_tells_its_tokens_and_its_first_text(tmp_path: Path) -> None:
    requests = [GenerationRequest((Message("user", "ü 😀"),), max_tokens=7, stop=("\n",))] * 6
    found = measure(
        Path("/0.01"), form="generator", requests=requests, rounds=2, warmup=1, probe=command(tmp_path, SLEEPER)
    )
    assert found.ttft_ms is not None
    assert 10 <= found.ttft_ms["p50"] < found.latency_ms["p50"] - 9
    assert found.tokens_per_s is not None
    assert 30 < found.tokens_per_s <= 7 / 0.02
    assert found.batch == 4
    assert found.batch_tokens_per_s == pytest.approx(7 * found.throughput_per_s)


@pytest.mark.slow
def test_a_real_generator_is_measured_in_its_own_process(tmp_path: Path) -> None:
    write_tiny_llama(tmp_path / "checkpoint")
    write_tiny_generator(tmp_path / "model", tmp_path / "checkpoint")
    requests = [GenerationRequest((Message("user", f"where is card {n}?"),), max_tokens=8) for n in range(6)]
    found = measure(tmp_path / "model", form="generator", requests=requests, threads=1, rounds=3, warmup=2)
    assert found.ttft_ms is not None
    assert 0 < found.ttft_ms["p50"] <= found.latency_ms["p50"]
    assert found.tokens_per_s is not None
    assert found.tokens_per_s > 1
    assert found.memory_bytes_peak < 300 * MIB


def test_a_time_limit_cuts_requests_but_leaves_a_median(tmp_path: Path) -> None:
    found = measure(
        Path("/0.03"),
        form="classifier",
        requests=TEXTS,
        rounds=2,
        warmup=0,
        limit_s=0.01,
        probe=command(tmp_path, SLEEPER),
    )
    assert found.requests == 6  # three a round at least
    assert len(found.rounds_p50_ms) == 2


def test_one_request_is_enough(tmp_path: Path) -> None:
    found = measure(Path("/0.001"), form="classifier", requests=["x"], probe=command(tmp_path, SLEEPER))
    assert found.requests == 1
    assert found.latency_ms["p50"] == found.latency_ms["p95"] == found.rounds_p50_ms[0]


def test_nothing_to_measure_is_a_programming_error(tiny: Path) -> None:
    with pytest.raises(ValueError, match="0 requests"):
        measure(tiny, form="classifier", requests=[])
    with pytest.raises(ValueError, match="0 rounds"):
        measure(tiny, form="classifier", requests=TEXTS, rounds=0)


def test_rounds_that_do_not_match_have_no_ratio(tmp_path: Path) -> None:
    probe = command(tmp_path, SLEEPER)
    one, two = (
        measure(Path("/0.001"), form="classifier", requests=TEXTS[:4], rounds=n, warmup=0, probe=probe) for n in (1, 2)
    )
    with pytest.raises(ValueError, match="zip"):
        latency_ratio(one, two)


def test_a_folder_without_a_model_is_named(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"nowhere could not be measured: .*not a model folder"):
        measure(tmp_path / "nowhere", form="classifier", requests=TEXTS)


def test_a_model_of_the_other_form_is_named(tiny: Path) -> None:
    request = GenerationRequest((Message("user", "hello"),))
    with pytest.raises(ModelError, match="holds a classifier, not a generator"):
        measure(tiny, form="generator", requests=[request])


@pytest.mark.parametrize(
    ("code", "error", "words"),
    [
        ("import sys\nprint('disk on fire', file=sys.stderr)\nsys.exit(3)", ModelError, "exit code 3.*disk on fire"),
        ("raise RuntimeError('bad weights')", ModelError, "exit code 1.*RuntimeError: bad weights"),
        ("import os\nos.kill(os.getpid(), 9)", MemoryBudgetError, r"killed \(SIGKILL\).*memory.*said nothing"),
        ("import os\nos.kill(os.getpid(), 11)", ModelError, "died of SIGSEGV"),
        ("print('{\"half\": ', end='')", ModelError, "exit code 0"),
    ],
)
def test_a_process_that_dies_tells_how(tmp_path: Path, code: str, error: type[ModelError], words: str) -> None:
    with pytest.raises(error, match=words) as caught:
        measure(tmp_path, form="classifier", requests=TEXTS, probe=command(tmp_path, code))
    assert str(tmp_path) in caught.value.message


def test_a_process_that_dies_in_the_middle_takes_the_others_along(tmp_path: Path) -> None:
    code = SLEEPER.replace("def probabilities(self, texts):", "def probabilities(self, texts):\n        self.die()")
    code = code.replace(
        "    def close(self): pass",
        """
    calls = 0
    def die(self):
        self.calls += 1
        if self.seconds == 0.002 and self.calls == 8:
            raise MemoryError("no more")
    def close(self): pass
""",
    )
    paths = {"well": Path("/0.001"), "ill": Path("/0.002")}
    with pytest.raises(ModelError, match=r"measured /0.002 ended with exit code 1.*MemoryError: no more"):
        measure_interleaved(paths, form="classifier", requests=TEXTS, warmup=2, probe=command(tmp_path, code))
    time.sleep(0.2)
    left = subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True, check=True).stdout
    assert str(tmp_path / "probe.py") not in left


def test_a_silent_process_is_given_up(tmp_path: Path) -> None:
    started = time.monotonic()
    with pytest.raises(ModelError, match=r"no answer for 0\.5 s"):
        measure(
            tmp_path,
            form="classifier",
            requests=TEXTS,
            timeout_s=0.5,
            probe=command(tmp_path, "import time\ntime.sleep(60)"),
        )
    assert time.monotonic() - started < 20


def test_the_working_directory_cannot_slip_in_code(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "numpy.py").write_text("raise SystemExit('not numpy')", "utf-8")
    monkeypatch.chdir(tmp_path)
    assert measure(tiny, form="classifier", requests=TEXTS[:3], rounds=1).requests == 3


def test_text_of_any_kind_reaches_the_model(tiny: Path) -> None:
    strange = ["", "\0", "😀\nü", "a\ud83d", '{"do": "quit"}', "x" * 100_000]
    assert measure(tiny, form="classifier", requests=strange, rounds=2).requests == 6
