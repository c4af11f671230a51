"""Digests of files and trees: one set of rules for the machine that publishes and the device that checks."""

from slmops.trust.digests import FileDigest, digest_bytes, digest_file, digest_json, digest_tree, tree_digest

__all__ = ["FileDigest", "digest_bytes", "digest_file", "digest_json", "digest_tree", "tree_digest"]
