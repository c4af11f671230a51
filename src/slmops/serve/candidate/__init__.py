"""A candidate beside the version in use, in one server: shadow, growing shares, a decision, and what it was based on.

::

    book     state and journal on disk: what a killed server picks up, and what a person asks why
    rollout  counts, decides by slmops.rollout, remembers answers until feedback comes
    reading  what an exchange over HTTP says: subject, id, answer, feedback
    pair     the two applications behind one address

Guarantees: a caller never waits for a shadow and never gets an answer of a candidate that failed: the version in use
answers in its place. A switch drops no request. Not covered: several servers that share one rollout.
"""
