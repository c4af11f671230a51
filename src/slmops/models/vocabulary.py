"""Trim a tokenizer to what a task's texts need.

Guarantee: every text that was given encodes to the same tokens as before (under new ids) and decodes to the same
text. That follows from keeping every merge that was applied: byte-pair encoding always applies the available merge of
the lowest rank, and with fewer merges in the same order the one applied before is still the lowest available.
:func:`trim_vocabulary` does not rest on the argument: it encodes every text both ways and compares.

Unseen text loses nothing either: all single characters of the alphabet (256 bytes for a byte-level tokenizer) stay, so
it falls back to shorter pieces. How often that happens is for the caller to measure, with :func:`agreement`.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tokenizers import Encoding, Tokenizer

from slmops.errors import ModelError


@dataclass(frozen=True)
class TrimmedVocabulary:
    """``tokenizer``: the smaller one. ``kept_ids``: the old id of each new id; ``embedding[kept_ids]`` goes with it."""

    tokenizer: Tokenizer
    kept_ids: tuple[int, ...]


KEEP = "Set student.vocabulary: keep."


def trim_vocabulary(
    tokenizer: Tokenizer, texts: Iterable[str], *, common_merges: int = 0, remedy: str = KEEP
) -> TrimmedVocabulary:
    """Keep special tokens, the alphabet, and the merges that ``texts`` apply; drop the rest.

    ``common_merges`` of the lowest rank stay besides: merges are ranked by how common they were where the tokenizer was
    trained, so these cover words that few texts have not shown yet. ``remedy``: what an error tells to do.

    Raises:
        ModelError: the tokenizer is not byte-pair encoding, or a text would encode or decode differently.
    """
    unique_texts = sorted(set(texts))
    spec: dict[str, Any] = json.loads(tokenizer.to_str())
    model = spec["model"]
    if model["type"] != "BPE":
        raise ModelError(
            f"The vocabulary of a {model['type']} tokenizer cannot be trimmed.",
            remedy=remedy,
        )
    old_ids: dict[str, int] = model["vocab"]
    special = {token["content"]: token["id"] for token in spec["added_tokens"]}
    before = tokenizer.encode_batch(unique_texts)
    used = {token for encoding in before for token in encoding.tokens} & old_ids.keys() - special.keys()
    merges = [_pair(merge) for merge in model["merges"]]
    rank = {pair: number for number, pair in enumerate(merges)}
    applied = {pair for token in used if not _in_alphabet(token) for pair in _merges_of(token, rank)}
    applied |= set(merges[:common_merges])
    kept = used | {token for token in old_ids if _in_alphabet(token)}
    kept |= {"".join(pair) for pair in applied} | {piece for pair in applied for piece in pair}
    kept |= special.keys() | {token for token in (model.get("unk_token"),) if token}
    tokens = sorted(kept & old_ids.keys(), key=old_ids.__getitem__)
    model["vocab"] = {token: index for index, token in enumerate(tokens)}
    model["merges"] = [list(pair) for pair in merges if pair in applied]
    outside = [token for token in special if token not in model["vocab"]]
    new_ids = model["vocab"] | {token: len(tokens) + index for index, token in enumerate(outside)}
    for token in spec["added_tokens"]:
        token["id"] = new_ids[token["content"]]
    _renumber_post_processor(spec.get("post_processor"), new_ids)
    trimmed = Tokenizer.from_str(json.dumps(spec))
    kept_ids = (*(old_ids[token] for token in tokens), *(special[token] for token in outside))
    _prove_same(tokenizer, trimmed, kept_ids, unique_texts, before, remedy)
    return TrimmedVocabulary(trimmed, kept_ids)


def agreement(full: Tokenizer, trimmed: TrimmedVocabulary, texts: Sequence[str]) -> float:
    """Share of ``texts`` that both tokenizers cut the same way; 1.0 for no texts."""
    if not texts:
        return 1.0
    same = sum(
        old.ids == [trimmed.kept_ids[i] for i in new.ids]
        for old, new in zip(full.encode_batch(texts), trimmed.tokenizer.encode_batch(texts), strict=True)
    )
    return same / len(texts)


def kept_between(full: Tokenizer, trimmed: Tokenizer) -> tuple[int, ...]:
    """The id in ``full`` of each id of ``trimmed``, which was trimmed from it: by the tokens' own text.

    Raises:
        ModelError: a token of ``trimmed`` is not in ``full``, so it comes from another tokenizer.
    """
    vocabulary = trimmed.get_vocab()
    found = [full.token_to_id(token) for token in sorted(vocabulary, key=vocabulary.__getitem__)]
    known = tuple(token for token in found if token is not None)
    if len(known) < len(found):
        raise ModelError(
            "One model has tokens that the other does not know, so it was not made from it.",
            remedy="Name the model that it was made from.",
        )
    return known


def renumber_added_tokens(tokenizer_config: Mapping[str, Any], kept_ids: Sequence[int]) -> dict[str, Any]:
    """A ``tokenizer_config.json`` with the new ids in the table of added tokens that some have."""
    table = tokenizer_config.get("added_tokens_decoder")
    if not isinstance(table, dict):
        return dict(tokenizer_config)
    new_ids = {str(old): str(new) for new, old in enumerate(kept_ids)}
    kept = {new_ids[old]: token for old, token in table.items() if old in new_ids}
    return {**tokenizer_config, "added_tokens_decoder": kept}


def _pair(merge: Any) -> tuple[str, str]:
    left, right = merge.split(" ") if isinstance(merge, str) else merge
    return left, right


def _in_alphabet(token: str) -> bool:
    """Single characters, and the byte tokens ``<0x00>`` … ``<0xFF>`` of tokenizers with byte fallback."""
    return len(token) == 1 or (len(token) == 6 and token.startswith("<0x") and token.endswith(">"))


def _merges_of(word: str, rank: dict[tuple[str, str], int]) -> set[tuple[str, str]]:
    """The merges that byte-pair encoding applies to ``word``, lowest rank first.

    A token alone is merged as it was inside its text: no merge crossed its ends there, so the order within was
    the same.
    """
    pieces, applied = list(word), set()
    while len(pieces) > 1:
        best = min(itertools.pairwise(pieces), key=lambda pair: rank.get(pair, len(rank)))
        if best not in rank:
            break
        applied.add(best)
        merged: list[str] = []
        index = 0
        while index < len(pieces):
            if tuple(pieces[index : index + 2]) == best:
                merged.append(pieces[index] + pieces[index + 1])
                index += 2
            else:
                merged.append(pieces[index])
                index += 1
        pieces = merged
    return applied


def _renumber_post_processor(processor: dict[str, Any] | None, new_ids: dict[str, int]) -> None:
    if processor is None:
        return
    for part in processor.get("processors", [processor]):
        for token in part.get("special_tokens", {}).values() if isinstance(part.get("special_tokens"), dict) else ():
            token["ids"] = [new_ids[name] for name in token["tokens"]]
        for name in ("sep", "cls"):
            if isinstance(part.get(name), list):
                part[name][1] = new_ids[part[name][0]]


def _prove_same(
    full: Tokenizer,
    trimmed: Tokenizer,
    kept_ids: Sequence[int],
    texts: Sequence[str],
    before: Sequence[Encoding],
    remedy: str,
) -> None:
    for text, old, new in zip(texts, before, trimmed.encode_batch(texts), strict=True):
        if old.ids != [kept_ids[i] for i in new.ids] or full.decode(old.ids) != trimmed.decode(new.ids):
            raise ModelError(
                f"The trimmed vocabulary would read {text[:80]!r} differently.",
                remedy=remedy,
            )
