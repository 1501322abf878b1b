"""The compiled core; see csrc/bindings.cpp. Addresses and numbers in, numbers out."""

from typing import Any

DIVERGENCES: tuple[str, ...]
ISAS: tuple[str, ...]
SOURCE_HASH: str

class Isa:
    @property
    def name(self) -> str: ...

class Options:
    def __init__(
        self,
        *,
        divergence: str,
        beta: float,
        temperature: float,
        alpha: float,
        t_squared: bool,
        ignore_index: int,
        distill_unlabeled: bool,
        label_smoothing: float,
    ) -> None: ...

class GradientMemory:
    def __init__(self, bytes: int) -> None: ...
    @staticmethod
    def release() -> None: ...

def isa(name: str) -> Isa: ...
def usable_threads(threads: int) -> int: ...
def run(*args: Any) -> tuple[int, int, float, float, float, float, float, float, float, bool]: ...
