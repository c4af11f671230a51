"""Classifiers for closed label sets: a teacher adapted to the task, and a student taught by it.

Both end as a folder in the layout of :mod:`slmops.models.classifier`, with a tokenizer that closes each text itself.
"""

from slmops.train.classifier.student import train_classifier_student
from slmops.train.classifier.teacher import adapt_classifier

__all__ = ["adapt_classifier", "train_classifier_student"]
