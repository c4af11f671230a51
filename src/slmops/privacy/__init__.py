"""What is personal in a text, and how it is kept from being written: one set of rules for every stage.

::

    redact      personal data found by form, and put out of a text
    checksums   the check digits that tell a card or an account from any other number
    names       people's names by the words before them, or by a recognizer of one's own
    subjects    whose request it was, as a keyed hash
"""

from slmops.privacy.redact import Found, Recognizer, find, redact
from slmops.privacy.subjects import SubjectKey

__all__ = ["Found", "Recognizer", "SubjectKey", "find", "redact"]
