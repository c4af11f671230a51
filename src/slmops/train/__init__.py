"""Stage 2: training. Imports torch; ask for it in the verb that trains.

::

    classifier   closed label sets: a teacher adapted, a student taught
    generator    open tasks: the same with text
    loop         transformers' Trainer with our batches, losses, progress and exact resume
    student      what is cut out of a teacher
    vocabulary   a tokenizer trimmed to the task
    losses, batching, tokens
"""

from slmops.train.classifier import adapt_classifier, train_classifier_student
from slmops.train.generator import adapt_generator, train_generator_student

__all__ = ["adapt_classifier", "adapt_generator", "train_classifier_student", "train_generator_student"]
