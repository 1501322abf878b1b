"""Run a function between the graphs of torch.compile. Imported while Dynamo traces: it pulls in torch._dynamo."""

import torch


@torch.compiler.disable(reason="pydistill.linear_distillation_loss runs between graphs; use fullgraph=False")
def run(function, *arguments):
    """Call the function as it is; under torch.compile the graph ends before it."""
    return function(*arguments)
