"""Variant and report to a bundle: what is shipped, and how to check it on arrival.

Needs nothing beyond the device size: no torch, no web server, no database.
"""

from slmops.package.bundle import build_bundle
from slmops.package.card import render_card
from slmops.package.resolve import artifact_around, check_digests, resolve_model_folder
from slmops.package.verify import verify_bundle

__all__ = ["artifact_around", "build_bundle", "check_digests", "render_card", "resolve_model_folder", "verify_bundle"]
