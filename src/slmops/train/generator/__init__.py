"""Language models for open tasks: a teacher adapted by LoRA, and a student trained on the teacher's answers.

Both read chats through :mod:`slmops.chat`, learn from the answer's tokens alone, and compute logits at no other
position. Both end as a folder in the layout of transformers, adapters merged.
"""

from slmops.train.generator.student import train_generator_student
from slmops.train.generator.teacher import adapt_generator

__all__ = ["adapt_generator", "train_generator_student"]
