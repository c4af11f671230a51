"""Laws of digests."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from slmops.errors import ArtifactError
from slmops.trust import FileDigest, digest_bytes, digest_file, digest_json, digest_tree, tree_digest

texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | texts,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(texts, inner, max_size=4),
    max_leaves=12,
)
sha256s = st.binary(min_size=32, max_size=32).map(bytes.hex)
trees = st.dictionaries(texts.filter(bool), st.builds(FileDigest, sha256s, st.integers(0, 1 << 40)), max_size=6)


@given(json_values)
def test_a_value_keeps_its_digest_when_written_and_read_again(value: Any) -> None:
    assert digest_json(json.loads(json.dumps(value))) == digest_json(value)


@given(st.dictionaries(st.integers(-200, 200), st.integers(), max_size=8))
def test_numbers_as_keys_keep_their_digest_too(value: dict[int, int]) -> None:
    assert digest_json(json.loads(json.dumps(value))) == digest_json(value)


@given(st.dictionaries(texts, json_values, max_size=6), st.randoms())
def test_the_order_of_keys_does_not_count(value: dict[str, Any], random: Any) -> None:
    items = list(value.items())
    random.shuffle(items)
    assert digest_json(dict(items)) == digest_json(value)


@given(json_values, json_values)
def test_equal_digests_mean_equal_json(one: Any, other: Any) -> None:
    same_text = json.dumps(one, sort_keys=True) == json.dumps(other, sort_keys=True)
    assert (digest_json(one) == digest_json(other)) == same_text


def test_digest_json_against_a_hand_written_canonical_form() -> None:
    expected = hashlib.sha256('{"a":[1,2.5,null,true],"ä":"€"}'.encode()).hexdigest()
    assert digest_json({"ä": "€", "a": (1, 2.5, None, True)}) == expected


@pytest.mark.parametrize("value", [float("nan"), float("inf"), {"a": [-float("inf")]}])
def test_what_json_cannot_carry_is_refused(value: Any) -> None:
    with pytest.raises(ValueError, match="JSON compliant"):
        digest_json(value)


@given(st.binary(max_size=4096))
def test_digest_bytes_is_sha256(data: bytes) -> None:
    assert digest_bytes(data) == hashlib.sha256(data).hexdigest()


@pytest.mark.parametrize("size_bytes", [0, 1, (1 << 20) - 1, 1 << 20, (1 << 20) + 1, 3 << 20])
def test_a_file_is_read_in_pieces_without_losing_any(tmp_path: Path, size_bytes: int) -> None:
    data = os.urandom(size_bytes)
    (tmp_path / "f").write_bytes(data)
    assert digest_file(tmp_path / "f") == FileDigest(hashlib.sha256(data).hexdigest(), size_bytes)


@given(trees, st.randoms())
def test_a_tree_digest_ignores_the_order_of_a_listing(files: dict[str, FileDigest], random: Any) -> None:
    items = list(files.items())
    random.shuffle(items)
    assert tree_digest(dict(items)) == tree_digest(files)


@given(trees, texts.filter(bool), sha256s)
def test_a_tree_digest_changes_with_any_file(files: dict[str, FileDigest], name: str, sha256: str) -> None:
    changed = {**files, name: FileDigest(sha256, 1)}
    same = name in files and files[name].sha256 == sha256
    assert (tree_digest(changed) == tree_digest(files)) == same
    assert tree_digest({f"{n}x": f for n, f in files.items()}) != tree_digest(files) or not files


def _write(root: Path, files: dict[str, bytes]) -> Path:
    for name, data in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(data)
    return root


def test_a_tree_is_its_paths_and_contents_alone(tmp_path: Path) -> None:
    files = {"a.txt": b"1", "b/c.txt": b"2", "b-c": b"3", "ü/日本": b"4"}
    one = _write(tmp_path / "one", files)
    other = _write(tmp_path / "other", dict(reversed(files.items())))
    (other / "empty").mkdir()
    os.utime(other / "a.txt", (0, 0))
    (other / "b-c").chmod(0o600)
    assert digest_tree(one) == digest_tree(other)
    assert set(digest_tree(one)) == set(files)
    assert set(digest_tree(one, exclude=frozenset({"a.txt"}))) == set(files) - {"a.txt"}


@pytest.mark.parametrize("target", ["/etc/hostname", "a.txt", "nowhere", "."])
def test_a_symbolic_link_is_refused_by_name(tmp_path: Path, target: str) -> None:
    _write(tmp_path, {"a.txt": b"1"})
    (tmp_path / "link").symlink_to(target)
    with pytest.raises(ArtifactError, match="link is a symbolic link"):
        digest_tree(tmp_path)


def test_a_pipe_is_refused_by_name(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ArtifactError, match="pipe is neither a file nor a directory"):
        digest_tree(tmp_path)


def test_a_name_that_is_not_utf8_is_refused(tmp_path: Path) -> None:
    (tmp_path / os.fsdecode(b"caf\xe9")).write_bytes(b"")
    with pytest.raises(ArtifactError, match="not UTF-8"):
        digest_tree(tmp_path)
