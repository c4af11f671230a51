"""A run on Azure ML: the recipe as a pipeline job of the official client, watched from here, its artifacts fetched.

::

    job      what is asked for: one step a stage, each step the verb that runs here. Pure, but for staging files
    client   the official client: credentials, submitting, watching, downloading
    fetch    what a finished job made, into this store
"""

from slmops.pipeline.azureml.client import RemoteRun, run_on_azureml

__all__ = ["RemoteRun", "run_on_azureml"]
