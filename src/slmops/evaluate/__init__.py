"""Stage evaluate: how good, how fast, how large, and whether the differences are real.

::

    metrics        right or wrong, row by row
    significance   intervals and paired tests over those rows
    scores         a model's answers on a data set -> Scores
    baselines      what simple means reach on the same rows
    measure        latency, throughput, memory of a model folder in a fresh process (the child is ``probe``)
    machine        where it was measured
    cost           price of 1,000 requests, and when a student has paid for itself
    gates          floors and budgets -> passed or not, and the verdict in one sentence
    summary        report.json
    report_html    report.html, the same for people

Nothing is imported here: the measured process imports ``slmops.evaluate.probe``, and everything that this file pulled
in would be counted as the model's memory.
"""
