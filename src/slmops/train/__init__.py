"""Stage 2: training. Imports torch; ask for it in the verb that trains.

::

    classifier   closed label sets: a teacher adapted, a student taught
    generator    open tasks: the same with text
    loop         transformers' Trainer with our batches, losses, progress and exact resume
    finetune     a model on gold answers alone, by the methods of ``methods``
    adapters     several on one base: listed, merged, combined
    student      what is cut out of a teacher
    sparse       training that leaves zeros where they are
    losses, batching, packing, processes, trackers, forgetting, custom_loss, tokens
"""

from slmops.train.classifier import adapt_classifier, train_classifier_student, train_linear
from slmops.train.finetune import FinetuneJob, finetune
from slmops.train.generator import adapt_generator, train_generator_student
from slmops.train.generator.recover import recover_generator

__all__ = [
    "FinetuneJob",
    "adapt_classifier",
    "adapt_generator",
    "finetune",
    "recover_generator",
    "train_classifier_student",
    "train_generator_student",
    "train_linear",
]
