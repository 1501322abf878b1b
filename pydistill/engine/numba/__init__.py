"""The numba backend: the fallback where there is no compiled core."""

from pydistill.engine.numba.backend import NumbaBackend

__all__ = ["NumbaBackend"]
