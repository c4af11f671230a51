"""The files of a model folder that say how text becomes tokens.

Everything is optional but ``tokenizer.json``. Tokens that only ``tokenizer_config.json`` names are added in the order
in which transformers adds them, so that their ids agree.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from slmops.errors import ModelError, ModelNotFoundError
from slmops.trust import digest_json

if TYPE_CHECKING:
    from tokenizers import Tokenizer

NAMED_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
_REFETCH = "Fetch the model again."


def open_tokenizer(path: Path) -> Tokenizer:
    from tokenizers import Tokenizer

    try:
        source = path.read_text("utf-8")
    except (FileNotFoundError, NotADirectoryError):
        raise ModelNotFoundError(
            f"{path.parent} has no {path.name}.", remedy="Name the folder of a model with a fast tokenizer."
        ) from None
    except UnicodeDecodeError as error:
        raise ModelError(f"{path} cannot be read: {error}.", remedy=_REFETCH) from None
    try:
        tokenizer = Tokenizer.from_str(_with_whole_offsets(source))
    except Exception as error:  # the library raises bare Exception
        raise ModelError(f"{path} is not a tokenizer: {error}.", remedy=_REFETCH) from error
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return tokenizer


def tokenizer_digest(folder: Path) -> str:
    """Digest of what turns text into ids at ``folder``: equal digests, equal ids. How long texts may be and what they
    are padded with does not count.

    Raises:
        ModelNotFoundError, ModelError: there is no tokenizer, or it is damaged.
    """
    open_tokenizer(folder / "tokenizer.json")
    spec = json.loads((folder / "tokenizer.json").read_text("utf-8"))
    return digest_json({name: value for name, value in spec.items() if name not in ("padding", "truncation")})


def _with_whole_offsets(source: str) -> str:
    """The tokenizer with ``trim_offsets`` off: a token's offsets then cover its leading space, which the mask has to
    know. Ids stay the same. The quotation marks cannot be those of a vocabulary entry: there they are escaped."""
    for spelling in ('"trim_offsets": true', '"trim_offsets":true'):
        source = source.replace(spelling, '"trim_offsets": false')
    return source


def read_object(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        raw = json.loads(path.read_text("utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ModelError(f"{path} cannot be read: {error}.", remedy=_REFETCH) from None
    if not isinstance(raw, dict):
        raise ModelError(f"{path} holds {type(raw).__name__}, not an object.", remedy=_REFETCH)
    return raw


def token_text(raw: Any) -> str | None:
    """A token as a configuration writes it: a text, or an object with the text as ``content``."""
    if isinstance(raw, Mapping):
        raw = raw.get("content")
    return raw if isinstance(raw, str) and raw else None


def add_missing_tokens(tokenizer: Tokenizer, config: Mapping[str, Any], special: Mapping[str, str]) -> None:
    """Tokens that only ``tokenizer_config.json`` names, in the order in which transformers adds them."""
    from tokenizers import AddedToken

    known = {token.content for token in tokenizer.get_added_tokens_decoder().values()}
    listed = config.get("added_tokens_decoder") or {}
    named = set(special.values())
    tokens = []
    for _, raw in sorted(listed.items(), key=lambda item: int(item[0])):
        text = token_text(raw)
        if text is None or text in known:
            continue
        flags = {k: raw[k] for k in ("single_word", "lstrip", "rstrip", "normalized", "special") if k in raw}
        tokens.append(AddedToken(text, **{**flags, "special": bool(flags.get("special")) or text in named}))
        known.add(text)
    extra = config.get("extra_special_tokens") or config.get("additional_special_tokens") or ()
    texts = [*special.values(), *map(token_text, extra.values() if isinstance(extra, Mapping) else extra)]
    for text in texts:
        if text is not None and text not in known:
            tokens.append(AddedToken(text, special=True))
            known.add(text)
    if tokens:
        tokenizer.add_tokens(tokens)


def template_source(folder: Path, config: Mapping[str, Any]) -> str | None:
    """The template: its own file first, then the configuration's (where there are several: the default)."""
    path = folder / "chat_template.jinja"
    if path.is_file():
        try:
            return path.read_text("utf-8")
        except UnicodeDecodeError as error:
            raise ModelError(f"{path} cannot be read: {error}.", remedy=_REFETCH) from None
    raw = config.get("chat_template")
    if isinstance(raw, list):
        raw = next((entry.get("template") for entry in raw if entry.get("name") == "default"), None)
    return raw if isinstance(raw, str) else None


def eos_ids(raw: Any, path: Path) -> list[int]:
    """``eos_token_id`` of a generation configuration: absent, one id, or several."""
    ids = [] if raw is None else raw if isinstance(raw, list) else [raw]
    if not all(isinstance(token_id, int) and token_id >= 0 for token_id in ids):
        raise ModelError(f"{path}: eos_token_id is {raw!r}, not token ids.", remedy=_REFETCH)
    return ids
