"""What a served model does from day to day, kept on this machine, and what that says of it.

::

    policy       what may be kept of a request
    prepare      an answer to the row that is kept of it: redacted, hashed, sketched
    writer       rows to the database, beside the requests
    log          events, feedback and judgements: written, read, forgotten, pruned, exported
    sketch       a text as a few numbers that cannot be read
    reference    how the model's own test rows look, packed with it
    permutation  tests of two samples whose false alarms are what they are set to
    drift        traffic against the reference
    quality      figures of a window, whole and by group
    alerts       rules on these figures, and a webhook
    ledger       what it cost, against the teacher
    curate       feedback to rows that can be learnt from
    page         the report for people

Nothing leaves the machine unless it is exported or a webhook is named. Nothing heavy is imported here.
"""
