"""Parts of a model that a task does not need, found by measuring, and taken out.

::

    calibration  rows of the task as token batches      depth     which layers
    subject      the model: loaded, checked, cut        width     which heads, channels, dimensions
    stream       the model layer by layer               sparsity  which weights become zero
    plan         how much goes where                    shape     all of it together
    checkpoint   a checkpoint in, a checkpoint out

What is written is an ordinary checkpoint of the same family. Training it again is the business of the stage train.
"""
