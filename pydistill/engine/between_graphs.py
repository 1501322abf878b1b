"""Run a function between the graphs of torch.compile. Imported only while Dynamo traces: it imports torch._dynamo."""

from collections.abc import Callable
from typing import Any, TypeVar

import torch

_R = TypeVar("_R")


@torch.compiler.disable(  # type: ignore[untyped-decorator]  # no types
    reason="pydistill.linear_distillation_loss runs between graphs; use fullgraph=False"
)
def run(function: Callable[[Any], _R], argument: Any) -> _R:
    """Call the function as it is; under torch.compile the graph ends before it."""
    return function(argument)
