"""A vocabulary trimmed to a task, beside the whole one: what is saved, what is proved, what unseen text loses.

A language model adapted to banking77 is trimmed to the training texts, with none to many of the tokenizer's commonest
merges kept besides, and not trained again. On the texts that it was trimmed to, tokens and probabilities are compared
one by one with the whole model's. On the test texts, which were not looked at: how many are cut into the same tokens,
and how many are still answered right. The same for the model as it was published: the loss on the test texts, by
character.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.common import check, classified_right, log, mean, rows_to_compress, say, spread
from slmops.artifacts import Checkpoint, Dataset
from slmops.chat.files import open_tokenizer
from slmops.evaluate.significance import paired_bootstrap
from slmops.models.vocabulary import TrimmedVocabulary, agreement, kept_between, trim_vocabulary
from slmops.pipeline.context import Context
from slmops.pipeline.prune import make_pruned
from slmops.pipeline.teach import make_teacher, prepare_data
from slmops.recipe import parse_recipe
from slmops.store import Store

MERGES, QUICK_MERGES = (0, 2000, 8000, 16000, 32000), (0, 8000)
JUDGED = 0
"""The setting that the target is about: what a recipe gets that does not say."""
QUICK_ROWS, QUICK_TEXTS = 300, 20
PROVED_TEXTS, LOSS_TEXTS = 500, 300
LARGEST_DIFFERENCE = 1e-4
"""Of probabilities: sums over tensors of other sizes are rounded elsewhere."""


def run(options: argparse.Namespace) -> dict[str, Any]:
    quick = options.quick
    rows = rows_to_compress(options, QUICK_ROWS)
    table: dict[str, Any] = {}
    right: dict[int, list[float]] = {}
    with Store.open(options.store) as store:
        base = _context(rows, store, 0, quick=quick)
        data = prepare_data(base)
        teacher = make_teacher(base, data)
        assert teacher is not None
        test = base.test_rows(data)
        seen = [row.text for split in ("train", "validation") for row in data.rows(split)]
        whole = classified_right(teacher.path, test)
        say(f"whole: {mean(whole):.4f}")
        for merges in QUICK_MERGES if quick else MERGES:
            # Nothing is trained after, so no answers are asked for.
            small = make_pruned(_context(rows, store, merges, quick=quick), data, data, teacher)
            right[merges] = classified_right(small.path, test)
            lost = paired_bootstrap(whole, right[merges])
            texts = seen[: QUICK_TEXTS if quick else PROVED_TEXTS]
            table[str(merges)] = {
                **_saved(small),
                **_proved(teacher, small, seen, texts),
                "unseen_alike": _alike(teacher, small, [row.text for row in test]),
                "accuracy": mean(right[merges]),
                "points": 100 * lost.difference,
                "ci95": [100 * end for end in lost.ci95],
            }
            say(f"{merges} merges: {table[str(merges)]}")
        losses = _losses(base, data, seen, quick=quick)
    judged = table[str(JUDGED)]
    checks = [
        check(
            "probabilities alike on kept texts",
            [1 - max(one["largest_difference"] for one in table.values())],
            1 - LARGEST_DIFFERENCE,
        ),
        check("kept texts read alike", [min(one["seen_alike"] for one in table.values())], 1.0),
        # Lost beyond noise means that the whole interval lies below nothing.
        {**check("upper end of the points on unseen text", [judged["ci95"][1]], 0.0), "points": judged["points"]},
    ]
    return {
        "ours": table,
        "peer": {"whole": mean(whole), "parameters": teacher.manifest.metrics["parameters"]},
        "rows": len(test),
        "loss_by_character": losses,
        "ratio": judged["accuracy"] / max(1e-9, mean(whole)),
        "spread": spread([one["accuracy"] / max(1e-9, mean(whole)) for one in table.values()]),
        "target": "nothing lost beyond noise on unseen text; kept text read and answered alike",
        "passed": quick or all(one["passed"] for one in checks),
        "checks": checks,
    }


def _context(rows: dict[str, Any], store: Store, merges: int, *, quick: bool) -> Context:
    raw: dict[str, Any] = {
        "name": "vocabulary",
        "task": "classification",
        "data": rows,
        "teacher": {"adapt_epochs": 0.1, "frozen_share": 0.95} if quick else {},
        "compress": {
            "prune": {"of": "teacher", "vocabulary": "trim", "common_merges": merges, "recover": None, "rows": 16}
        },
    }
    return Context(parse_recipe(raw), store, offline=False, progress=log())


def _saved(small: Checkpoint) -> dict[str, Any]:
    metrics = small.manifest.metrics
    return {"tokens": metrics["tokens"], "parameters": metrics["parameters"], "saved": metrics["removed"]}


def _proved(whole: Checkpoint, small: Checkpoint, seen: Sequence[str], texts: Sequence[str]) -> dict[str, Any]:
    """Of all ``seen`` texts the share that reads alike; of ``texts`` the largest difference of a probability."""
    from slmops.runtime import open_classifier

    opened = [open_classifier(one.path) for one in (whole, small)]
    before, after = (classifier.probabilities(texts) for classifier in opened)
    for classifier in opened:
        classifier.close()
    return {"seen_alike": _alike(whole, small, seen), "largest_difference": float(abs(before - after).max())}


def _alike(whole: Checkpoint, small: Checkpoint, texts: Sequence[str]) -> float:
    full, trimmed = (open_tokenizer(one.path / "tokenizer.json") for one in (whole, small))
    for text in texts:
        assert trimmed.decode(trimmed.encode(text).ids) == full.decode(full.encode(text).ids), text
    return agreement(full, TrimmedVocabulary(trimmed, kept_between(full, trimmed)), texts)


def _losses(context: Context, data: Dataset, seen: Sequence[str], *, quick: bool) -> Mapping[str, Any]:
    """Nats by character of the published model on test texts, as it is and with each vocabulary."""
    import torch
    from transformers import AutoModelForCausalLM

    folder: Path = context.base.path
    full = open_tokenizer(folder / "tokenizer.json")
    texts = [row.text for row in data.rows("test")][: QUICK_TEXTS if quick else LOSS_TEXTS]
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    found = {"whole": _loss(model, [full.encode(text).ids for text in texts], texts, None)}
    for merges in QUICK_MERGES if quick else MERGES:
        trimmed = trim_vocabulary(full, seen, common_merges=merges)
        kept = list(trimmed.kept_ids)
        rows = [[kept[i] for i in trimmed.tokenizer.encode(text).ids] for text in texts]
        found[str(merges)] = _loss(model, rows, texts, kept)
        say(f"loss with {merges} merges: {found[str(merges)]:.4f} nats a character, whole {found['whole']:.4f}")
    return found


def _loss(model: Any, rows: Sequence[Sequence[int]], texts: Sequence[str], kept: Sequence[int] | None) -> float:
    """``rows`` in the whole vocabulary's numbers; ``kept``: the tokens that the softmax is over."""
    import torch

    nats, start = 0.0, model.config.bos_token_id or 0
    for row in rows:
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([[start, *row]])).logits[0, :-1]
        gold = torch.tensor(list(row))
        over = logits if kept is None else logits[:, torch.tensor(kept)]
        nats += float((over.logsumexp(dim=-1) - logits.gather(1, gold[:, None])[:, 0]).sum())
    return nats / max(1, sum(map(len, texts))) if math.isfinite(nats) else float("nan")
