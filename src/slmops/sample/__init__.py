"""The sample data: customer support requests to Fernwood, an online home and garden shop that does not exist.

``support.csv`` holds 1,404 requests in English, 54 for each of 26 intents, under the header ``text,intent``. They are
hand-written for this project, row by row: no templates, no generator script, nothing taken from another data set.
The people, orders, products and shops in them are made up. The data is part of slmops and dedicated under its
licence, Apache-2.0. ``README.md`` beside this file defines the intents.
"""

from __future__ import annotations

from pathlib import Path

__all__ = ["path"]


def path() -> Path:
    """Where ``support.csv`` lies in this installation."""
    return Path(__file__).resolve().with_name("support.csv")
