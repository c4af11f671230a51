"""Classifiers for closed label sets: a teacher adapted to the task, a linear one beside it, and a student taught by
them.

The first and the last end as a folder in the layout of :mod:`slmops.models.classifier`, with a tokenizer that closes
each text itself.
"""

from slmops.train.classifier.linear import train_linear
from slmops.train.classifier.student import train_classifier_student
from slmops.train.classifier.teacher import adapt_classifier

__all__ = ["adapt_classifier", "train_classifier_student", "train_linear"]
