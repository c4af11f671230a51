"""Migrations of the tables in :mod:`slmops.monitor.schema`."""
