"""Lineage both ways, checked against a plain walk over random graphs."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from slmops.artifacts import Artifact, Bundle, Checkpoint, Dataset, Draft, Report, Variant, open_artifact
from slmops.store import Store
from slmops.store.lineage import trace_lineage
from slmops.store.records import Entry, Input

TRAIN, TEACHER = "a" * 64, "b" * 64


def write(text: str) -> Callable[[Draft], None]:
    def build(draft: Draft) -> None:
        (draft.path / "x").write_text(text)
        draft.metrics["accuracy"] = 0.9

    return build


def stage(store: Store, name: str, kind: type[Artifact], text: str | None = None, **inputs: Artifact | str) -> Artifact:
    build = write(text or name)
    return store.stage(name, kind, inputs=inputs, config={}, code_version="1", build=build).artifact


@pytest.fixture
def life(store: Store) -> dict[str, Artifact]:
    data = stage(store, "data", Dataset, train=TRAIN)
    teacher = stage(store, "teacher", Checkpoint, data=data, base=TEACHER)
    student = stage(store, "train", Checkpoint, data=data, teacher=teacher)
    variants = [stage(store, f"compress-{bits}", Variant, student=student) for bits in (8, 4)]
    report = stage(store, "evaluate", Report, variant=variants[0], data=data)
    bundle = stage(store, "package", Bundle, variant=variants[0], report=report)
    everything = [data, teacher, student, *variants, report, bundle]
    return {str(artifact.manifest.extra["name"]): artifact for artifact in everything}


def test_both_ways_from_the_middle(store: Store, life: dict[str, Artifact]) -> None:
    lineage = store.trace(life["train"])
    assert {node.name for node in lineage.ancestors} == {"data", "teacher", "train", "base"}
    assert {(node.name, node.digest) for node in lineage.sources} == {("train", TRAIN), ("base", TEACHER)}
    assert {node.name for node in lineage.descendants} == {"compress-8", "compress-4", "evaluate", "package"}
    roles = {(lineage.nodes[e.maker].name, e.role, lineage.nodes[e.made].name) for e in lineage.edges}
    assert ("data", "data", "train") in roles
    assert ("teacher", "teacher", "train") in roles
    assert ("evaluate", "report", "package") in roles
    root = lineage.nodes[lineage.root]
    assert (root.kind, root.metrics, root.path) == (
        "checkpoint",
        {"accuracy": 0.9},
        life["train"].path.relative_to(store.root).as_posix(),
    )
    assert json.loads(json.dumps(lineage.to_json()))["artifact"] == life["train"].manifest.key


def test_the_ends_have_one_direction(store: Store, life: dict[str, Artifact]) -> None:
    bundle = store.trace(life["package"])
    assert bundle.descendants == []
    assert {node.name for node in bundle.sources} == {"train", "base"}
    assert len(bundle.ancestors) == 7  # two sources, data, teacher, student, one variant, the report
    data = store.trace(life["data"])
    assert [node.kind for node in data.ancestors] == ["source"]
    assert len(data.descendants) == 6


def test_what_one_can_reach_reaches_back(store: Store, life: dict[str, Artifact]) -> None:
    for artifact in life.values():
        for node in store.trace(artifact).descendants:
            made = open_artifact(store.root / str(node.path))
            assert artifact.manifest.key in {above.id for above in store.trace(made).ancestors}


def test_the_maker_that_was_used_is_told_not_another_with_the_same_bytes(store: Store) -> None:
    one = stage(store, "one", Dataset, "same", train=TRAIN)
    two = stage(store, "two", Dataset, "same", train=TEACHER)
    made = stage(store, "next", Dataset, data=two)
    assert [node.name for node in store.trace(made).ancestors] == ["two", "train"]
    assert [node.name for node in store.trace(one).descendants] == ["next"]  # it would have served as well
    shutil.rmtree(two.path)
    with Store.open(store.root) as later:
        assert [node.name for node in later.trace(made).ancestors] == ["one", "train"]


def test_an_artifact_that_is_gone_is_a_missing_leaf(store: Store, life: dict[str, Artifact]) -> None:
    shutil.rmtree(life["teacher"].path)
    with Store.open(store.root) as later:
        nodes = {node.name: node.kind for node in later.trace(life["train"]).ancestors}
    assert nodes == {"data": "dataset", "teacher": "missing", "train": "source"}


def test_a_stage_that_changed_nothing_is_no_circle(store: Store) -> None:
    first = stage(store, "first", Dataset, "same", train=TRAIN)
    second = stage(store, "second", Dataset, "same", data=first)
    third = stage(store, "third", Dataset, "same", data=second)
    assert [n.name for n in store.trace(third).ancestors] == ["second", "first", "train"]
    assert store.trace(third).descendants == []
    assert {n.name for n in store.trace(first).descendants} == {"second", "third"}
    assert third.digest == first.digest


def test_a_copy_outside_the_store_tells_the_same(store: Store, life: dict[str, Artifact], tmp_path: Path) -> None:
    shutil.copytree(life["package"].path, tmp_path / "shipped")
    copy = open_artifact(tmp_path / "shipped")
    inside, outside = store.trace(life["package"]), store.trace(copy)
    assert [n.id for n in outside.ancestors] == [n.id for n in inside.ancestors]
    with Store.open(tmp_path / "nowhere", read_only=True) as none:
        assert {(n.kind, n.name) for n in none.trace(copy).ancestors} == {("missing", "variant"), ("missing", "report")}


@given(st.lists(st.sets(st.integers(0, 9), max_size=3), min_size=1, max_size=10), st.integers(0, 9))
def test_against_a_plain_walk(parents: list[set[int]], start: int) -> None:
    """Node i reads those of ``parents[i]`` that come before it."""
    reads = [{parent for parent in wanted if parent < node} for node, wanted in enumerate(parents)]
    start %= len(reads)
    entries = [
        Entry(
            f"p{i}", "dataset", f"n{i}", f"digest{i}", f"key{i}", "", 0.0, 0,
            tuple(Input(f"r{parent}", f"digest{parent}", f"key{parent}") for parent in sorted(reads[i])),
        )
        for i in range(len(reads))
    ]  # fmt: skip
    lineage = trace_lineage(
        entries[start],
        with_digest=lambda digest: [entry for entry in entries if entry.digest == digest],
        made_from=lambda digest: [entry for entry in entries if any(i.digest == digest for i in entry.inputs)],
        metrics_of=lambda entry: {},
    )

    def reach(step: Callable[[int], set[int]]) -> set[str]:
        seen: set[int] = set()
        queue = [start]
        while queue:
            for node in step(queue.pop()) - seen:
                seen.add(node)
                queue.append(node)
        return {f"key{node}" for node in seen}

    assert {node.id for node in lineage.ancestors} == reach(lambda node: reads[node])
    assert {node.id for node in lineage.descendants} == reach(
        lambda node: {i for i, r in enumerate(reads) if node in r}
    )
