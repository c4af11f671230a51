"""Stage evaluate: how good, how fast, how large, and whether the differences are real.

::

    metrics        right or wrong, row by row
    significance   intervals and paired tests over those rows
    scores         a model's answers on a data set -> Scores
    baselines      what simple means reach on the same rows
    measure        latency, throughput, memory of a model folder in a fresh process (the child is ``probe``)
    limits         a process held to a device's memory and cores
    machine        where it was measured; ``speed``: how fast that is
    estimate       the same on a device that is not here
    parity         how far one step moved the model: tokens, distributions, answers; ``drift``: in which layer
    cost           price of 1,000 requests, and when a student has paid for itself
    bench          all of a model's costs on one machine, as a file that can be sent back
    closest        where nothing passes: what each candidate would have to give up
    gates          floors and budgets -> passed or not, and the verdict in one sentence
    summary        report.json
    report_html    report.html, the same for people

Nothing is imported here: the measured process imports ``slmops.evaluate.probe``, and everything that this file pulled
in would be counted as the model's memory.
"""
