"""The numba backend: the fallback where there is no compiled core."""

from pydistill.engine.numba.rows import NumbaBackend

__all__ = ["NumbaBackend"]
