"""The compiled core; see csrc/bindings.cpp. Tensors are passed as addresses, numbers of type int."""

from typing import NotRequired, TypedDict

DIVERGENCES: tuple[str, ...]
DTYPES: tuple[str, ...]
ISAS: tuple[str, ...]
SOURCE_HASH: str

class Results(TypedDict):
    loss: float
    soft: float
    hard: float
    soft_items: float
    hard_items: float
    teacher_sums_to_one: bool
    metrics: NotRequired[dict[str, float]]  # if they are wanted

class Problem(TypedDict):
    problem: str
    row: int

class Isa:
    @property
    def name(self) -> str: ...

class Options:
    def __init__(self, **options: str | float | bool) -> None: ...

class GradientMemory:
    def __init__(self, bytes: int) -> None: ...
    def __buffer__(self, flags: int, /) -> memoryview: ...
    @staticmethod
    def release() -> None: ...

def isa(name: str) -> Isa: ...
def usable_threads(threads: int) -> int: ...
def run(
    isa: Isa,
    threads: int,
    options: Options,
    *,
    shape: tuple[int, int],  # rows, classes
    student: tuple[int, int, int],  # address, dtype as an index of DTYPES, stride of the rows
    teacher: tuple[int, int, int] | None,
    top_k: tuple[int, int, int] | None,  # address of the indices, k, address of the log-partitions or 0
    labels: tuple[int, bool] | None,  # address, whether they are int32
    weights: tuple[int, int] | None,  # addresses of sample_weight and class_weight, or 0
    grad_output: tuple[float, int] | None,  # a factor of all rows, and the address of one factor per row, or 0
    gradient: tuple[int, int, int] | None,
    row_outputs: tuple[int, int, int] | None,  # addresses of the rows' losses, soft and hard terms
    metrics: bool,
) -> Results | Problem: ...  # every keyword argument must be given
