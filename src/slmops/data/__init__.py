"""Files to a data set: read, check, clean, de-duplicate, split.

:func:`prepare` fills a draft of a :class:`~slmops.artifacts.Dataset`; :func:`source_digests` and :func:`stage_config`
are what its key depends on.
"""

from slmops.data.prepare import prepare, source_digests, stage_config
from slmops.data.sources import FetchHub, Source
from slmops.data.unlabelled import check_unlabelled, read_unlabelled, unlabelled_source
from slmops.data.values import read_values, values_source

__all__ = [
    "FetchHub",
    "Source",
    "check_unlabelled",
    "prepare",
    "read_unlabelled",
    "read_values",
    "source_digests",
    "stage_config",
    "unlabelled_source",
    "values_source",
]
