"""Version of the installed distribution."""

from importlib import metadata

try:
    __version__: str = metadata.version("pydistill-kd")
except metadata.PackageNotFoundError:  # a checkout that was never installed
    __version__ = "0.1.0"
