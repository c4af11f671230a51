"""An OpenAI-compatible HTTP service over one model folder.

Import :mod:`slmops.serve.app` for the application and :mod:`slmops.serve.server` to run it; both need the extra
``serve``. Nothing heavy is imported here.
"""
