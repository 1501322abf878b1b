"""The autograd function of the loss of a linear head's outputs."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from pydistill.engine.autograd import join_inference, raises_memory_error, split_inference
from pydistill.engine.backend import Backend
from pydistill.engine.batch import CONSTANTS, Batch, Outcome, batch_of
from pydistill.engine.chunks import HeadSetup, Pass, run
from pydistill.engine.counting import counted_rows
from pydistill.engine.head import Head, product_dtype
from pydistill.engine.loss_formula import loss_formula
from pydistill.engine.torch_private import is_batched


class HeadCall:
    """One call of the loss, passed to the autograd function, whose other arguments must be tensors."""

    setup: HeadSetup
    batch: Batch
    outcome: Outcome | None = None
    inference: list[Tensor | None]

    def __init__(
        self,
        student: Head,
        teacher: Head | None,
        batch: Batch,
        engine: Backend,
        chunk_rows: int | None,
        metrics: bool,
    ) -> None:
        dtypes = (product_dtype(student), None if teacher is None else product_dtype(teacher))
        self.setup = HeadSetup(student, teacher, engine, chunk_rows, dtypes, metrics=metrics)
        self.batch = batch

    @raises_memory_error
    def run(
        self,
        wanted: tuple[bool, ...] = (False, False, False),
        grad_output: float | Tensor = 1.0,
        metrics: bool = False,
    ) -> Pass:
        """Like :func:`pydistill.engine.chunks.run`, without autocast, whose dtype was chosen already."""
        with torch.no_grad(), torch.autocast("cpu", enabled=False):
            return run(self.batch, dataclasses.replace(self.setup, wanted=wanted, metrics=metrics), grad_output)

    def take_outcome(self) -> Outcome:
        """Return the outcome and delete it here: its loss refers to the graph, and the graph to this call."""
        outcome, self.outcome = self.outcome, None
        assert outcome is not None
        return outcome

    def take_constants(self) -> list[Tensor | None]:
        """Return the tensors that autograd keeps between forward and backward, and delete them here."""
        setup, nothing = self.setup, (None, None, None)
        tensors = [*(nothing if setup.teacher is None else setup.teacher.tensors), *self.batch.constants]
        teacher = None if setup.teacher is None else setup.teacher.with_tensors(nothing)
        self.setup = dataclasses.replace(setup, student=setup.student.with_tensors(nothing), teacher=teacher)
        self.batch = batch_of(self.batch.student[:0], [None] * len(CONSTANTS), self.batch.options)
        return tensors

    def with_tensors(self, of_student: Sequence[Tensor | None], constants: Sequence[Tensor | None]) -> "HeadCall":
        """Return a call with the given tensors."""
        call, setup = object.__new__(HeadCall), self.setup
        student = setup.student.with_tensors(of_student)
        teacher = None if setup.teacher is None else setup.teacher.with_tensors(constants[:3])
        call.setup = dataclasses.replace(setup, student=student, teacher=teacher)
        call.batch = batch_of(student.stand_in(), constants[3:], self.batch.options)
        return call


class FusedHead(torch.autograd.Function):
    """Loss and gradients in one run over the chunks, in forward. reduction="none" runs them again in backward."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, call: HeadCall) -> Tensor:
        """Compute the loss, and the gradients for backward."""
        ctx.deferred = call.batch.options.reduction == "none"
        wanted = (False, False, False) if ctx.deferred else ctx.needs_input_grad[:3]
        found = call.run(wanted, metrics=call.setup.metrics)
        call.outcome = found.outcome
        call.inference, constants = split_inference(call.take_constants())
        ctx.call = call
        ctx.save_for_backward(hidden, weight, bias, *found.gradients, *constants)
        return found.outcome.loss

    @staticmethod
    @raises_memory_error
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        """Multiply the gradients from forward by grad_output."""
        saved, call, wanted = ctx.saved_tensors, ctx.call, ctx.needs_input_grad[:3]
        inputs, gradients = saved[:3], saved[3:6]
        constants = join_inference(saved[6:], call.inference)
        if torch.is_grad_enabled() or is_batched(grad_output):
            return *_differentiable(call.with_tensors(inputs, constants), inputs, wanted, grad_output), None
        if ctx.deferred:
            whole = call.with_tensors(inputs, constants)
            gradients = whole.run(wanted, grad_output.contiguous()).gradients
        elif grad_output.item() != 1:
            gradients = [None if x is None else x * grad_output for x in gradients]
        return *(None if x is None else x.to(like.dtype) for x, like in zip(gradients, inputs, strict=True)), None


def _differentiable(
    call: HeadCall, inputs: Sequence[Tensor | None], wanted: Sequence[bool], grad_output: Tensor
) -> list[Tensor | None]:
    """Compute the gradients with differentiable operations, for a second derivative; needs the logits of all rows."""
    counted = counted_rows(call.batch)
    with torch.enable_grad():
        batch = dataclasses.replace(call.batch, student=call.setup.student.logits(counted.with_a_term))
        if call.setup.teacher is not None:
            with torch.no_grad():
                batch.teacher = call.setup.teacher.logits()
        chosen = [x for x, want in zip(inputs, wanted, strict=True) if want and x is not None]
        found = iter(torch.autograd.grad(loss_formula(batch).loss, chosen, grad_output, create_graph=True))
        return [next(found) if want else None for want in wanted]
