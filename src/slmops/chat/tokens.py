"""Conversations and plain text to token ids, and which of them are learnt.

Guarantees
    Ids equal those of transformers' ``apply_chat_template(tokenize=True)`` for the text that
    :class:`~slmops.chat.template.ChatTemplate` renders: special tokens are those that the template writes, and the
    tokenizer's post-processor adds none to them, so there is never a second BOS.
    The loss mask covers what the model has to write itself after the prompt: the answer as the template writes it,
    whatever the template puts between prompt and answer (Llama 2: a space), and the token that ends the turn.
    Nothing behind that token counts (ChatML: the line break), for at run time the model is not asked any more.
    A token that holds both prompt and answer counts as answer.

Not guaranteed
    Text of a user that spells a control token, such as ``<|im_end|>``, becomes that token, exactly as in
    transformers. :meth:`ChatTokenizer.contains_control_text` tells; refusing such text is the caller's decision.
"""

from __future__ import annotations

import datetime
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from slmops.artifacts import Message
from slmops.chat.files import (
    NAMED_TOKENS,
    add_missing_tokens,
    eos_ids,
    open_tokenizer,
    read_object,
    template_source,
    token_text,
)
from slmops.chat.streaming import StreamDecoder
from slmops.chat.template import TEMPLATE_DATE, ChatTemplate
from slmops.chat.token_bytes import token_bytes
from slmops.chat.tools import ToolFormat, Tools, format_of
from slmops.errors import DataError, ModelError, SlmopsError

if TYPE_CHECKING:
    from tokenizers import Encoding, Tokenizer

log = logging.getLogger(__name__)

_ANSWER_PROBE = "\ue000answer\ue001"


@dataclass(frozen=True)
class EncodedChat:
    """A conversation to learn from.

    ``input_ids``      the whole conversation, the answer included
    ``loss_mask``      as long as ``input_ids``; True where the token is the model's to write
    ``prompt_tokens``  tokens before the first True
    """

    input_ids: list[int]
    loss_mask: list[bool]
    prompt_tokens: int


class ChatTokenizer:
    """Tokenizer and chat template of a model folder. Reading and encoding are safe from several threads."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        *,
        special_tokens: Mapping[str, str],
        eos_token_ids: Sequence[int],
        template: ChatTemplate | None,
        name: str = "the model",
    ) -> None:
        self._tokenizer = tokenizer
        self._special_tokens = dict(special_tokens)
        self._named_eos_ids = tuple(eos_token_ids)
        self._template = template
        self._name = name
        self._warned = False

    @classmethod
    def load(
        cls,
        folder: Path | str,
        *,
        template_options: Mapping[str, Any] | None = None,
        date: datetime.date = TEMPLATE_DATE,
    ) -> ChatTokenizer:
        """Read ``tokenizer.json``, ``tokenizer_config.json``, ``generation_config.json`` and ``chat_template.jinja``;
        only the first must be there.

        ``template_options``: variables for the template, instead of
        :data:`~slmops.chat.template.DEFAULT_OPTIONS`; ``date``: the day that it is told.

        Raises:
            ModelNotFoundError: the folder has no ``tokenizer.json``.
            ModelError: a file cannot be read.
        """
        folder = Path(folder)
        config = read_object(folder / "tokenizer_config.json")
        generation = read_object(folder / "generation_config.json")
        tokenizer = open_tokenizer(folder / "tokenizer.json")
        special = {name: text for name in NAMED_TOKENS if (text := token_text(config.get(name))) is not None}
        add_missing_tokens(tokenizer, config, special)
        source = template_source(folder, config)
        return cls(
            tokenizer,
            special_tokens=special,
            eos_token_ids=eos_ids(generation.get("eos_token_id"), folder / "generation_config.json"),
            template=None
            if source is None
            else ChatTemplate(source, special_tokens=special, options=template_options, date=date),
            name=str(folder),
        )

    # Conversations

    @property
    def has_template(self) -> bool:
        return self._template is not None

    @property
    def tool_format(self) -> ToolFormat:
        """How the model writes calls of functions."""
        return self._template.tool_format if self._template else format_of("")

    def render(self, messages: Sequence[Message], *, add_generation_prompt: bool, tools: Tools = ()) -> str:
        """The conversation as the text that is encoded; ``tools``: functions that the assistant may call.

        Raises:
            ModelError: the model has no chat template, or the template refuses the conversation.
            DataError: no messages.
        """
        if self._template is None:
            raise ModelError(
                f"{self._name} has no chat template: it was not made to be talked to.",
                remedy="Choose an instruction-tuned model, or put its chat_template.jinja into the folder.",
            )
        return _encodable(self._template.render(messages, add_generation_prompt=add_generation_prompt, tools=tools))

    def encode_prompt(self, messages: Sequence[Message], tools: Tools = ()) -> list[int]:
        """Ids of the conversation with the assistant's turn opened; errors as :meth:`render`."""
        ids: list[int] = self._tokenizer.encode(
            self.render(messages, add_generation_prompt=True, tools=tools), add_special_tokens=False
        ).ids
        return ids

    def encode_training(self, messages: Sequence[Message], target: str) -> EncodedChat:
        """Ids of the conversation with ``target`` as the assistant's answer, and the mask of what is learnt.

        Where the template trims an answer, the trimmed answer is learnt.

        Raises:
            ModelError, DataError: as :meth:`render`.
            DataError: the template changes the answer in more than the white space around it.
        """
        text = self.render((*messages, Message("assistant", target)), add_generation_prompt=False)
        start, end = self._answer_span(messages, _encodable(target), text)
        encoding = self._tokenizer.encode(text, add_special_tokens=False)
        mask = self._mask(encoding, start, end)
        return EncodedChat(encoding.ids, mask, mask.index(True) if any(mask) else len(mask))

    def contains_control_text(self, messages: Sequence[Message]) -> bool:
        """Whether a message spells a control token (and would be encoded as one): a special token of the tokenizer,
        or another added token that the template itself writes."""
        return any(self.control_text(message.content) for message in messages)

    def control_text(self, text: str, *, of_the_model: bool = False) -> str | None:
        """The first control token that ``text`` spells, or None. ``of_the_model``: it is the model's own writing, which
        may hold added tokens that open and close its thoughts and calls, but no special ones."""
        tokens = self._special_texts if of_the_model else self._control_texts
        return next((token for token in tokens if token in text), None)

    def _answer_span(self, messages: Sequence[Message], target: str, text: str) -> tuple[int, int]:
        """Characters of ``text`` that the model has to write, without what follows the answer."""
        prompt = self.render(messages, add_generation_prompt=True)
        probed = self.render((*messages, Message("assistant", _ANSWER_PROBE)), add_generation_prompt=False)
        head, found, tail = probed.rpartition(_ANSWER_PROBE)
        end = len(text) - len(tail)
        if not found or not text.endswith(tail):
            raise DataError("The model's chat template leaves out or rewrites the answer.", remedy=_ANSWER_REMEDY)
        if text.startswith(prompt) and len(prompt) <= end:
            return len(prompt), end
        # The full text does not begin with the prompt (a template that writes the past in another way): the answer
        # is still known by what stands around it.
        if not text.startswith(head) or text[len(head) : end].strip() != target.strip():
            raise DataError(
                f"The model's chat template rewrites the answer that begins {target[:40]!r}.", remedy=_ANSWER_REMEDY
            )
        if not self._warned:
            self._warned = True
            log.warning("The chat template of %s writes a prompt otherwise in training than in use.", self._name)
        return len(head), end

    def _mask(self, encoding: Encoding, start: int, end: int) -> list[bool]:
        """True from the first token that reaches beyond ``start`` up to the token that ends the turn (up to the end of
        the text, where none does). Offsets are characters of the rendered text."""
        mask = [False] * len(encoding.ids)
        enders, controls = self._turn_enders, self._control_ids
        for index, (token_id, (token_start, token_end)) in enumerate(zip(encoding.ids, encoding.offsets, strict=True)):
            if token_end <= start or (token_start < start and token_id in controls):
                continue  # A control token may swallow white space of the answer (Phi 3), and is still the prompt's.
            mask[index] = True
            if token_start >= end and token_id in enders:
                break
        return mask

    # Plain text

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Ids of plain text, for a classifier; with the tokens that the tokenizer's post-processor adds."""
        ids: list[int] = self._tokenizer.encode(_encodable(text), add_special_tokens=add_special_tokens).ids
        return ids

    def encode_batch(
        self, texts: Sequence[str], *, add_special_tokens: bool = True, max_tokens: int | None = None
    ) -> list[list[int]]:
        """:meth:`encode` of many texts at once, each cut to ``max_tokens`` with its special tokens kept."""
        plain = [_encodable(text) for text in texts]
        if max_tokens is None:
            return [e.ids for e in self._tokenizer.encode_batch_fast(plain, add_special_tokens=add_special_tokens)]
        room = max_tokens - (self._tokenizer.num_special_tokens_to_add(False) if add_special_tokens else 0)
        encodings = self._tokenizer.encode_batch_fast(plain, add_special_tokens=False)
        for encoding in encodings:
            encoding.truncate(max(room, 0))
        if not add_special_tokens:
            return [encoding.ids for encoding in encodings]
        return [self._tokenizer.post_process(encoding, None, True).ids for encoding in encodings]

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        text: str = self._tokenizer.decode(list(ids), skip_special_tokens=skip_special_tokens)
        return text

    def stream_decoder(self) -> StreamDecoder:
        """A new decoder for one answer."""
        return StreamDecoder(self.decode)

    # Tokens

    @cached_property
    def eos_token_ids(self) -> tuple[int, ...]:
        """All tokens that end the model's turn, without repetition: those of ``generation_config.json``, the
        tokenizer's EOS, and the special token that the template writes behind an answer."""
        ids = [*self._named_eos_ids, self._id_of("eos_token"), self._template_turn_end]
        return tuple(dict.fromkeys(token_id for token_id in ids if token_id is not None))

    @property
    def end_token_id(self) -> int | None:
        """The tokenizer's EOS, else the first token that ends a turn: what closes a document."""
        own = self._id_of("eos_token")
        return own if own is not None else next(iter(self.eos_token_ids), None)

    @property
    def bos_token_id(self) -> int | None:
        return self._id_of("bos_token")

    @property
    def pad_token_id(self) -> int:
        """What fills the shorter rows of a batch: the tokenizer's own, else EOS, else 0. Always masked out."""
        own = self._id_of("pad_token")
        return own if own is not None else self.eos_token_ids[0] if self.eos_token_ids else 0

    @property
    def vocab_size(self) -> int:
        """Tokens, added ones included. A model's embedding may have more rows (padding)."""
        size: int = self._tokenizer.get_vocab_size(with_added_tokens=True)
        return size

    def _id_of(self, name: str) -> int | None:
        text = self._special_tokens.get(name)
        token_id: int | None = None if text is None else self._tokenizer.token_to_id(text)
        return token_id

    @cached_property
    def _turn_enders(self) -> frozenset[int]:
        return frozenset(self.eos_token_ids)

    @cached_property
    def _template_turn_end(self) -> int | None:
        """The first special token behind an answer; known even where no configuration names it as EOS."""
        if self._template is None:
            return None
        try:
            text = self.render((Message("user", "x"), Message("assistant", _ANSWER_PROBE)), add_generation_prompt=False)
        except SlmopsError:
            return None  # Asked again when a conversation is rendered, where the template's words reach the user.
        tail = text.rpartition(_ANSWER_PROBE)[2]
        ids = self._tokenizer.encode(tail, add_special_tokens=False).ids
        return next((token_id for token_id in ids if token_id in self._control_ids), None)

    @cached_property
    def _control_ids(self) -> frozenset[int]:
        added = self._tokenizer.get_added_tokens_decoder()
        return frozenset(token_id for token_id, token in added.items() if token.special)

    @cached_property
    def _special_texts(self) -> tuple[str, ...]:
        return tuple(t.content for t in self._tokenizer.get_added_tokens_decoder().values() if t.special)

    @cached_property
    def _control_texts(self) -> tuple[str, ...]:
        source = self._template.source if self._template else ""
        added = self._tokenizer.get_added_tokens_decoder().values()
        return tuple(t.content for t in added if t.special or (t.content.strip() and t.content in source))

    @cached_property
    def _token_bytes(self) -> Callable[[int], bytes]:
        return token_bytes(self._tokenizer)

    def token_id(self, text: str) -> int | None:
        """The id of the one token that is spelled ``text``, or None."""
        found: int | None = self._tokenizer.token_to_id(text)
        return found

    def bytes_of(self, token_id: int) -> bytes:
        """What a token stands for; several together may make a character."""
        return self._token_bytes(token_id)

    def to_json(self) -> str:
        """The tokenizer as ``tokenizer.json`` would hold it, with all tokens that the folder adds."""
        source: str = self._tokenizer.to_str()
        return source


_ANSWER_REMEDY = (
    "An answer with a <think> part needs template_options={'enable_thinking': True}; otherwise take that part out."
)


def _encodable(text: str) -> str:
    """Lone surrogates (half of an emoji, out of broken JSON) cannot be UTF-8: each becomes a question mark."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-8", "replace").decode()
    return text
