"""Graphs of language models and classifiers in few bits, by several algorithms.

::

    rounding     scales without calibration: nearest, k-quant, HQQ
    gptq         rounding errors made up for by the weights that are still to be rounded
    awq          channels scaled by what goes through them, before they are rounded
    statistics   what goes into each matrix, on the task's own rows
    sensitivity  what each matrix in few bits costs, and which get more bits under a size limit
    activations  8 bits for what is multiplied, too
    graph        the matrices' codes in place of the matrices
    export       all of it, on a folder
"""
