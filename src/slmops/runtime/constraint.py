"""Answers that keep to a JSON schema or a grammar: before each token, those that would break it are taken away.

Guarantees: whatever is written under a :class:`TokenMask` is a beginning of something the constraint allows, and is
whole where the model ended it by itself; an answer that was cut by ``max_tokens`` is such a beginning and no more.
JSON is written with at most one blank or line break between its parts, so that a model cannot wander in white space.
Work is bounded: a constraint that would cost too much is an error.
Stands on llguidance, which reads the schema (or says by name what it does not know of it) and the vocabulary.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from slmops.errors import MissingExtraError, ModelError
from slmops.runtime.base import Constraint

if TYPE_CHECKING:
    from llguidance import LLTokenizer

    from slmops.chat import ChatTokenizer

WHITESPACE = r"[ \n]?"
FORBIDDEN = -1e30
"""A logit that no temperature makes likely; finite, because engines subtract from it."""


class ConstraintError(ModelError):
    """A constraint that cannot be kept to."""


def check_constraint(constraint: Constraint) -> None:
    """Whether ``constraint`` can be kept to by any model.

    Raises:
        ConstraintError: it cannot; with what llguidance says of it.
        MissingExtraError: llguidance is not installed.
    """
    matcher = _llguidance().LLMatcher
    try:
        said = matcher.validate_grammar(_grammar(constraint, frozenset()), limits=_limits())
    except ValueError as error:  # not read as JSON or Lark at all
        said = str(error)
    if said:
        raise ConstraintError(_first_line(said), remedy=_REMEDY)


class Masks:
    """The vocabulary of one model, ready for constraints. Making it takes a moment; do it once.

    ``vocabulary``  logits of one position
    ``end_ids``     tokens that end an answer

    Raises:
        ConstraintError: a tokenizer whose tokens cannot be told as bytes.
        MissingExtraError: llguidance is not installed.
    """

    def __init__(self, chat: ChatTokenizer, vocabulary: int, end_ids: frozenset[int]) -> None:
        library = _llguidance()
        self.vocabulary = vocabulary
        self._chat = chat
        try:
            self._tokenizer: LLTokenizer = library.LLTokenizer(
                chat.to_json(), n_vocab=vocabulary, eos_token=sorted(end_ids)
            )
        except Exception as error:  # the library's own, without a base
            raise ConstraintError(
                f"Constrained answers are not possible with this model's tokenizer: {_first_line(str(error))}",
                remedy="Ask without response_format, and without a tool_choice that forces a call.",
            ) from error

    def start(self, constraint: Constraint) -> TokenMask:
        """A mask at the beginning of an answer.

        Raises:
            ConstraintError: the constraint cannot be kept to.
        """
        special = frozenset(tag for tag in constraint.tags if self._is_special(tag))
        return TokenMask(self._tokenizer, _grammar(constraint, special), self.vocabulary)

    def _is_special(self, text: str) -> bool:
        token_id = self._chat.token_id(text)
        return token_id is not None and self._tokenizer.is_special_token(token_id)


class TokenMask:
    """One answer's constraint on its way; see :meth:`Masks.start`."""

    def __init__(self, tokenizer: LLTokenizer, grammar: str, vocabulary: int) -> None:
        try:
            self._matcher = _llguidance().LLMatcher(tokenizer, grammar, log_level=0, limits=_limits())
        except ValueError as error:
            raise ConstraintError(_first_line(str(error)), remedy=_REMEDY) from None
        self._vocabulary = vocabulary
        self._check()

    @property
    def finished(self) -> bool:
        """Nothing more may follow."""
        return bool(self._matcher.is_stopped())

    def allowed(self) -> NDArray[np.bool_]:
        """Which tokens may come next, ``[vocabulary]``; those that end the answer are among them where it is whole."""
        bits = np.frombuffer(self._matcher.compute_bitmask(), dtype=np.uint8)
        self._check()
        known = np.unpackbits(bits, bitorder="little")[: self._vocabulary].astype(bool)
        return np.pad(known, (0, self._vocabulary - known.size))

    def push(self, token: int) -> None:
        """Take the next token, one of :meth:`allowed`."""
        self._matcher.consume_token(token)
        self._check()

    def _check(self) -> None:
        if self._matcher.is_error():
            raise ConstraintError(_first_line(self._matcher.get_error()), remedy=_REMEDY)


_REMEDY = "Simplify the schema."


def _grammar(constraint: Constraint, special: frozenset[str]) -> str:
    matcher = _llguidance().LLMatcher
    if constraint.kind == "json_schema":
        return str(matcher.grammar_from_json_schema(constraint.source, overrides={"whitespace_pattern": WHITESPACE}))
    rules = [constraint.source, "TEXT: /(.|\\n)*/"]
    for index, tag in enumerate(constraint.tags):
        written = tag if tag in special else json.dumps(tag, ensure_ascii=False)
        lazy = "" if tag in special else "[lazy]"
        rules += [f"tag{index}: {written}", f"until{index}{lazy}: TEXT {written}"]
    return str(matcher.grammar_from_lark("\n".join(rules)))


def _limits() -> Any:
    return _llguidance().LLParserLimits(verbose_errors=False)


def _first_line(text: str) -> str:
    line = next((line.strip() for line in text.splitlines() if line.strip()), "the constraint cannot be read")
    return line if line.endswith(".") else f"{line}."


def _llguidance() -> Any:
    try:
        import llguidance
    except ImportError:
        raise MissingExtraError("An answer that keeps to a schema", "serve") from None
    return llguidance
