"""Whether an answer is in the language that it should be in.

Only clear cases count: texts of at least :data:`SHORTEST_CHARACTERS`, and another language at a probability of at least
:data:`SURE`. Names, code and short texts look like any language. The model is inside the package ``py3langid`` (M. Lui,
T. Baldwin, "langid.py: An Off-the-shelf Language Identification Tool", 2012): nothing is fetched.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

from slmops.errors import MissingExtraError, RecipeError

SHORTEST_CHARACTERS = 40
SURE = 0.95


def check_language(language: str) -> None:
    """Refuse a language that cannot be told.

    Raises:
        RecipeError: nobody knows it.
        MissingExtraError: the library is not installed.
    """
    known = {str(code) for code in _identifier().labels}
    if language != "auto" and language not in known:
        raise RecipeError(
            f"teacher.language is {language!r}, which cannot be told from others.",
            remedy=f"Use auto, or one of {', '.join(sorted(known))}.",
        )


def is_other_language(answer: str, wanted: str, prompt: str) -> bool:
    """Whether ``answer`` is surely not in ``wanted`` ("auto": the language of ``prompt``, where that is sure)."""
    if len(answer) < SHORTEST_CHARACTERS:
        return False
    if wanted == "auto":
        told = language_of(prompt) if len(prompt) >= SHORTEST_CHARACTERS else None
        if told is None:
            return False
        wanted = told
    spoken = language_of(answer)
    return spoken is not None and spoken != wanted


def language_of(text: str) -> str | None:
    """ISO 639-1 code, or None where it is not sure."""
    language, probability = _identifier().classify(text)
    return str(language) if float(probability) >= SURE else None


@lru_cache(maxsize=1)
def _identifier() -> Any:
    try:
        from py3langid.langid import MODEL_FILE, LanguageIdentifier
    except ModuleNotFoundError:
        raise MissingExtraError("teacher.language", "train") from None
    return LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)
