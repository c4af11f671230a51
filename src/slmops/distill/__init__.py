"""Stage 1 of distillation: a teacher answers the training prompts; good answers become the student's data set.

The client library of a remote teacher is imported when the first request is sent, not before.
"""

from slmops.distill.ask import ask_teacher, redacted
from slmops.distill.budget import Limits
from slmops.distill.checks import Verdict, check_answer
from slmops.distill.distribution import keep_distribution
from slmops.distill.engine import OpenAITeacher
from slmops.distill.estimate import Estimate, estimate
from slmops.distill.judge import judge_config, judge_request, read_score
from slmops.distill.language import language_of
from slmops.distill.privacy import check_remote_allowed, leaves_machine
from slmops.distill.prompts import student_messages, teacher_messages, teacher_request
from slmops.distill.teachers import LocalTeacher, TeacherFailure, TextTeacher
from slmops.distill.token_signals import keep_token_signals, plan_token_signals
from slmops.distill.transfer import vary_texts

__all__ = [
    "Estimate",
    "Limits",
    "LocalTeacher",
    "OpenAITeacher",
    "TeacherFailure",
    "TextTeacher",
    "Verdict",
    "ask_teacher",
    "check_answer",
    "check_remote_allowed",
    "estimate",
    "judge_config",
    "judge_request",
    "keep_distribution",
    "keep_token_signals",
    "language_of",
    "leaves_machine",
    "plan_token_signals",
    "read_score",
    "redacted",
    "student_messages",
    "teacher_messages",
    "teacher_request",
    "vary_texts",
]
