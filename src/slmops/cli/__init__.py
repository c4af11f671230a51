"""The command line: one file a verb; each parses, calls one public function, and renders."""

from slmops.cli.app import main

__all__ = ["main"]
