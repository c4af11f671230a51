"""Changes of the index's tables over time, applied by :mod:`slmops.store.index` when a store is opened."""
