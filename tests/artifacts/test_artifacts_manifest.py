"""Manifests: read back as written, old ones read, unknown fields kept, damage named."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from slmops.artifacts import MANIFEST_NAME, Manifest
from slmops.errors import ArtifactError, CorruptArtifactError
from slmops.trust import FileDigest

EMPTY = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"

texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=10)
names = st.from_regex(r"[a-z0-9_]{1,8}(/[a-z0-9_]{1,8}){0,2}", fullmatch=True)
plain = st.dictionaries(texts, st.none() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | texts)
manifests = st.builds(
    Manifest,
    kind=texts,
    digest=texts,
    key=texts,
    files=st.dictionaries(names, st.builds(FileDigest, texts, st.integers(0, 1 << 50)), max_size=4),
    inputs=st.dictionaries(texts, texts, max_size=3),
    config=plain,
    metrics=plain,
    code_version=texts,
    environment=plain,
    created_at=texts,
    schema=st.integers(0, 9),
    extra=st.dictionaries(texts.map(lambda text: f"x_{text}"), texts, max_size=3),
)


@given(manifests)
def test_a_manifest_reads_back_as_it_was_written(manifest: Manifest) -> None:
    assert Manifest.from_json(json.loads(json.dumps(manifest.to_json()))) == manifest


def _write(directory: Path, raw: Any) -> Path:
    text = raw if isinstance(raw, str) else json.dumps(raw)
    (directory / MANIFEST_NAME).write_text(text, "utf-8")
    return directory


def test_an_old_manifest_is_read_and_what_it_lacks_is_filled(tmp_path: Path) -> None:
    raw = {"kind": "dataset", "digest": "d", "files": {"a": {"sha256": EMPTY, "size_bytes": 0}}}
    manifest = Manifest.read(_write(tmp_path, raw))
    assert (manifest.key, manifest.inputs, manifest.metrics, manifest.schema, manifest.extra) == ("", {}, {}, 1, {})


def test_unknown_fields_of_a_newer_schema_are_kept(tmp_path: Path) -> None:
    raw = {"kind": "k", "digest": "d", "files": {}, "schema": 7, "signature": {"by": "someone"}, "zeta": [1]}
    manifest = Manifest.read(_write(tmp_path, raw))
    again = manifest.to_json()
    assert again["schema"] == 7
    assert again["signature"] == {"by": "someone"}
    assert again["zeta"] == [1]
    assert Manifest.read(_write(tmp_path, again)) == manifest


def test_an_unknown_field_cannot_shadow_a_known_one() -> None:
    manifest = Manifest("dataset", "d", "k", {}, extra={"kind": "bundle", "note": "n"})
    assert manifest.to_json()["kind"] == "dataset"


def test_any_changed_value_breaks_the_seal(tmp_path: Path) -> None:
    manifest = Manifest("report", "d", "k", {}, {"a": "1"}, {"c": 1}, {"accuracy": 0.91}, "v", {"python": "3"}, "now")
    raw = manifest.to_json()
    assert Manifest.read(_write(tmp_path, raw)) == manifest
    for field in raw:
        changed = {**raw, field: {"accuracy": 0.99} if isinstance(raw[field], dict) else "other"}
        with pytest.raises(CorruptArtifactError, match=r"manifest\.json"):
            Manifest.read(_write(tmp_path, changed))


def test_one_flipped_bit_anywhere_is_found_or_harmless(tmp_path: Path) -> None:
    manifest = Manifest(
        "report", "d", "k", {"a": FileDigest(EMPTY, 0)}, metrics={"accuracy": 0.91}, extra={"name": "n"}
    )
    whole = json.dumps(manifest.to_json(), indent=1).encode()
    messages: set[str] = set()
    harmless = 0
    for position in range(len(whole)):
        (tmp_path / MANIFEST_NAME).write_bytes(whole[:position] + bytes([whole[position] ^ 4]) + whole[position + 1 :])
        try:
            read = Manifest.read(tmp_path)
        except CorruptArtifactError as error:
            messages.add(error.message.split(":")[0])
        else:  # the seal's own name was hit: the manifest is then an unsealed one, with an unknown field
            assert {**vars(read), "extra": {}} == {**vars(manifest), "extra": {}}
            harmless += 1
    assert all("manifest.json" in message for message in messages)
    assert harmless <= len("seal")


def test_no_manifest_is_no_artifact(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="not an artifact") as caught:
        Manifest.read(tmp_path)
    assert caught.value.remedy is not None


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        "null",
        '"text"',
        "{}",
        '{"kind": "k", "digest": "d"}',
        '{"kind": "k", "digest": "d", "files": []}',
        '{"kind": "k", "digest": "d", "files": {"a": {}}}',
        '{"kind": "k", "digest": "d", "files": {"a": {"sha256": "x", "size_bytes": "many"}}}',
        "[" * 100_000,
    ],
)
def test_what_is_not_a_manifest_is_named(tmp_path: Path, text: str) -> None:
    with pytest.raises(CorruptArtifactError, match=r"manifest\.json"):
        Manifest.read(_write(tmp_path, text))


def test_bytes_that_are_not_utf8_are_named(tmp_path: Path) -> None:
    (tmp_path / MANIFEST_NAME).write_bytes(b'{"kind": "\xff"}')
    with pytest.raises(CorruptArtifactError, match="is damaged"):
        Manifest.read(tmp_path)


@pytest.mark.parametrize("name", ["../x", "/etc/passwd", "a/../../b", "..\\x", "C:/x", "", "a//b"])
def test_a_file_name_that_leads_out_is_refused(tmp_path: Path, name: str) -> None:
    raw = {"kind": "k", "digest": "d", "files": {name: {"sha256": EMPTY, "size_bytes": 0}}}
    with pytest.raises(CorruptArtifactError, match="leads out"):
        Manifest.read(_write(tmp_path, raw))


def test_nan_in_a_foreign_manifest_reads_as_null(tmp_path: Path) -> None:
    text = '{"kind": "k", "digest": "d", "files": {}, "metrics": {"loss": NaN, "f1": -Infinity}}'
    assert Manifest.read(_write(tmp_path, text)).metrics == {"loss": None, "f1": None}
