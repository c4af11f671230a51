"""Messages to token ids and loss mask: the only place where a chat template is rendered.

Training, scoring and every engine that generates read their ids from here, so that a model is asked in exactly the
form in which it was taught. Needs jinja2 and tokenizers, nothing heavier.
"""

from slmops.chat.files import tokenizer_digest
from slmops.chat.streaming import StreamDecoder
from slmops.chat.template import DEFAULT_OPTIONS, TEMPLATE_DATE, ChatTemplate
from slmops.chat.tokens import ChatTokenizer, EncodedChat
from slmops.chat.tools import ToolFormat, Tools, read_calls

__all__ = [
    "DEFAULT_OPTIONS",
    "TEMPLATE_DATE",
    "ChatTemplate",
    "ChatTokenizer",
    "EncodedChat",
    "StreamDecoder",
    "ToolFormat",
    "Tools",
    "read_calls",
    "tokenizer_digest",
]
