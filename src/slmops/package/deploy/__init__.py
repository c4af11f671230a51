"""A bundle in somebody else's runtime: registered, listed, asked, measured.

A :class:`Target` is such a runtime with the bundle in it: :mod:`foundry <slmops.runtime.foundry>`,
:mod:`llamacpp <slmops.package.deploy.llamacpp>`, :mod:`ollama <slmops.package.deploy.ollama>`. All speak OpenAI's API
over HTTP on this machine; :func:`try_out` asks and measures them alike. Needs the standard library alone.
"""

from slmops.package.deploy.target import Deployed, Target, try_out

__all__ = ["Deployed", "Target", "try_out"]
