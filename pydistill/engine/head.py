"""The loss behind a linear head, in chunks of rows: a chunk's logits exist, and the gradient is written over them.

The loss is the engine's; what is here are the matrix products around it.
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from pydistill.engine.autograd import raises_memory_error, split_inference
from pydistill.engine.batch import Batch, Outcome
from pydistill.engine.checks import is_batched
from pydistill.engine.counting import counted_rows, denominators, rows_with_a_term
from pydistill.engine.loss_formula import loss_formula
from pydistill.formulas import loss_dtype

SCRATCH_BYTES = 64 << 20
_BLOCK_BYTES = 8 << 20  # of a half weight that is widened for a product
_HALVES = (torch.bfloat16, torch.float16)


class Head(NamedTuple):
    """``logits = softcap * tanh(scale * (hidden @ weight.T + bias) / softcap)``; softcap None: the scaled product."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    softcap: float | None
    scale: float

    def logits(self, counts=None):
        """All of them, by differentiable torch operations.

        Rows that do not count have hidden states of 0: 0 times a NaN there would reach the gradient of the weight.
        """
        dtype = torch.promote_types(self.hidden.dtype, self.weight.dtype)  # they differ after autocast
        bias = None if self.bias is None else self.bias.to(dtype)
        hidden = self.hidden if counts is None else torch.where(counts.unsqueeze(-1), self.hidden, 0)
        logits = F.linear(hidden.to(dtype), self.weight.to(dtype), bias)
        if self.softcap is None:
            return logits if self.scale == 1 else logits * self.scale
        logits = logits.to(loss_dtype(logits))
        return self.softcap * torch.tanh(logits * (self.scale / self.softcap))

    def stand_in(self):
        """A tensor with the logits' shape and dtype and no memory, for checks of shapes."""
        return self.hidden.new_empty(()).expand(*self.hidden.shape[:-1], self.weight.shape[0])


def product_dtype(head) -> torch.dtype:
    """What a head's products are computed in: the weight's dtype, or autocast's; float32 where halves are not native.

    Without such instructions a half product is emulated, up to a hundred times slower than converting to float32.
    """
    dtype = head.weight.dtype
    if torch.is_autocast_enabled("cpu") and dtype is not torch.float64:
        dtype = torch.get_autocast_dtype("cpu")
    return torch.float32 if dtype in _HALVES and not _native(dtype) else dtype


def _native(dtype) -> bool:
    name = "bf16" if dtype is torch.bfloat16 else "fp16"
    supported = getattr(torch.ops.mkldnn, f"_is_mkldnn_{name}_supported", None)
    return supported is not None and supported()


class _Products:
    """A head's logits, and the gradients that follow from theirs, for chunks of at most ``rows`` rows."""

    def __init__(self, head, dtype, rows, gradient: bool):
        self.head, self.dtype = head, dtype
        classes, width = head.weight.shape
        # A half product takes the whole weight in that dtype; float32 ones widen a half weight block by block.
        self._weight = head.weight.to(dtype) if dtype in _HALVES else head.weight
        self._bias = None if head.bias is None else head.bias.to(dtype)
        self._block = classes if self._weight.dtype is dtype else max(1, _BLOCK_BYTES // (4 * width))
        self._wide = None if self._weight.dtype is dtype else head.weight.new_empty(self._block, width, dtype=dtype)
        new = head.weight.new_empty
        self._product = new(rows, classes, dtype=dtype)
        wide = torch.float32 if dtype in _HALVES and head.softcap is not None else dtype
        self._logits = self._product if wide is dtype else new(rows, classes, dtype=wide)
        self._gradient = self._logits
        if gradient and head.softcap is not None:  # its derivative is made of the logits
            self._gradient = new(rows, classes, dtype=wide)

    def _blocks(self):
        """Slices of the classes with their weights in the products' dtype."""
        if self._wide is None:
            yield slice(None), self._weight
            return
        for start in range(0, len(self._weight), self._block):
            part = slice(start, min(start + self._block, len(self._weight)))
            yield part, self._wide[: part.stop - start].copy_(self._weight[part])

    def logits(self, hidden):
        """``(logits, where to write their gradient)``, valid until the next chunk; ``hidden`` in our dtype."""
        head, rows, scale = self.head, len(hidden), self.head.scale
        for part, weight in self._blocks():
            out = self._product[:rows, part]
            if self._bias is None:
                torch.addmm(out, hidden, weight.T, beta=0, alpha=scale, out=out)
            else:
                torch.addmm(self._bias[part], hidden, weight.T, beta=scale, alpha=scale, out=out)
        logits = self._logits[:rows]
        if logits.dtype is not self.dtype:
            logits.copy_(self._product[:rows])
        if head.softcap is not None:
            logits.div_(head.softcap).tanh_().mul_(head.softcap)
        return logits, self._gradient[:rows]

    def before_softcap(self, logits, gradient):
        """The gradient with respect to the scaled product, in the products' dtype."""
        if self.head.softcap is None:
            return gradient
        gradient.mul_(logits.div_(self.head.softcap).square_().neg_().add_(1))
        return gradient if gradient.dtype is self.dtype else self._product[: len(gradient)].copy_(gradient)

    def of_hidden(self, gradient):
        """``scale * gradient @ weight``, a new chunk."""
        total = gradient.new_empty(len(gradient), self._weight.shape[1])
        for part, weight in self._blocks():
            beta = 0 if part.start in (None, 0) else 1
            torch.addmm(total, gradient[:, part], weight, beta=beta, alpha=self.head.scale, out=total)
        return total

    def add_to_weight(self, total, gradient, hidden, first):
        """``total += scale * gradient.T @ hidden``. ``total`` is float32 for half products: small updates stay."""
        scale, beta = self.head.scale, 0 if first else 1
        if total.dtype is self.dtype:
            torch.addmm(total, gradient.T, hidden, beta=beta, alpha=scale, out=total)
            return
        rows = max(1, _BLOCK_BYTES // (2 * hidden.shape[1]))
        for out, part in zip(total.split(rows), gradient.split(rows, 1), strict=True):
            product = part.T @ hidden
            out.copy_(product).mul_(scale) if first else out.add_(product, alpha=scale)


class Pass(NamedTuple):
    """What one run over the rows found: an Outcome, and the gradients of hidden, weight and bias, None if not wanted.

    They are in the inputs' dtypes, but float32 for float16: those wait for grad_output before they are rounded.
    """

    outcome: Outcome
    gradients: tuple


def run(student, teacher, batch, engine, chunk_rows, dtypes, wanted=(False,) * 3, grad_output=1.0, metrics=False):
    """Loss of checked rows, and the wanted gradients of the student's head.

    ``batch.student`` is a stand-in ``(N, C)``; ``teacher`` is a Head, or None where the batch has the teacher's
    logits or none. ``dtypes`` are those of the two heads' products.
    """
    options = batch.options
    soft_rows, labelled_rows, weight, labels = counted_rows(batch)
    items = denominators(batch, soft_rows, labelled_rows, weight, labels)
    items = [
        float(counted) if given is None else given
        for counted, given in zip(items, (options.soft_items, options.hard_items), strict=True)
    ]
    if options.reduction == "mean":  # a count of 0 is left to the chunks, where rows of class weight 0 make it NaN
        soft_items, hard_items = (
            (counted or None) if given is None else given
            for counted, given in zip(items, (options.soft_items, options.hard_items), strict=True)
        )
        options = options._replace(soft_items=soft_items, hard_items=hard_items)
    counts = rows_with_a_term(batch, soft_rows, labelled_rows)
    kept = None if bool(counts.all()) else counts.nonzero().squeeze(1)
    rows = len(counts) if kept is None else len(kept)
    want_gradient = True in wanted
    size = _chunk_size(
        chunk_rows, rows, batch.student.shape[1], student, teacher, dtypes, want_gradient, engine.threads
    )
    ours = _Products(student, dtypes[0], size, want_gradient)
    theirs = None if teacher is None else _Products(teacher, dtypes[1], size, False)
    unit = _unit(batch, items, weight) if dtypes[0] is torch.float16 and options.reduction != "none" else 1.0
    gradients = _new_gradients(student, dtypes[0], wanted, kept is not None)
    totals = _Totals(batch, soft_rows, labelled_rows & counts, metrics)
    for start in range(0, rows, size):
        part = slice(start, min(start + size, rows))
        part = part if kept is None else kept[part]
        hidden = student.hidden[part].to(dtypes[0])
        logits, gradient = ours.logits(hidden)
        theirs_logits = batch.teacher[part] if batch.teacher is not None else None
        if theirs is not None:
            theirs_logits, _ = theirs.logits(teacher.hidden[part].to(dtypes[1]))
        chunk = Batch(logits, theirs_logits, *(None if x is None else x[part] for x in batch[2:4]), batch.class_weight,
                      *(None if x is None else x[part] for x in batch[5:7]), options)  # fmt: skip
        scale = grad_output[part].contiguous() if isinstance(grad_output, Tensor) else grad_output * unit
        totals.add(part, engine.evaluate(chunk, gradient if want_gradient else None, scale, metrics))
        if want_gradient:
            gradient = ours.before_softcap(logits, gradient)
            _add_gradients(gradients, ours, gradient, hidden, part, first=start == 0)
    if rows == 0:
        gradients = [None if x is None else x.zero_() for x in gradients]
    return Pass(totals.outcome(items), tuple(_finished(gradients, student, unit)))


def _unit(batch, items, weight) -> float:
    """Factor of a float16 gradient in the products, and divided out after them, where sums are wider.

    Divided by N the gradient would underflow, and times a large weight overflow: with it the row of the largest weight
    has the gradient of its own loss.
    """
    largest = float(weight.max()) if weight.numel() else 1.0
    if batch.class_weight is not None:
        largest *= max(1.0, float(batch.class_weight.max()))
    if not 0 < largest < math.inf:
        return 1.0
    return min((n for n in items if n > 0), default=1.0) / largest if batch.options.reduction == "mean" else 1 / largest


def _chunk_size(chunk_rows, rows, classes, student, teacher, dtypes, want_gradient, threads) -> int:
    """Rows per chunk, all but the last alike: as given, or as many as the scratch holds."""
    if chunk_rows is None:
        of_engine = threads * 3 * classes * max(4, dtypes[0].itemsize)  # each thread's rows of exponentials
        scratch = SCRATCH_BYTES - min(of_engine, SCRATCH_BYTES // 4)
        wide = 0
        if student.softcap is not None:
            wide = (4 if dtypes[0] in _HALVES else 0) + (max(4, dtypes[0].itemsize) if want_gradient else 0)
        per_row = dtypes[0].itemsize + wide
        if teacher is not None:
            per_row += dtypes[1].itemsize + (4 if teacher.softcap is not None and dtypes[1] in _HALVES else 0)
        chunk_rows = max(1, scratch // (classes * per_row))
    chunks = max(1, -(-rows // chunk_rows))
    return max(1, -(-rows // chunks))


def _new_gradients(student, dtype, wanted, has_gaps):
    """Of hidden, in its dtype; of weight and bias, in float32 or wider."""
    wide = torch.float32 if dtype in _HALVES else dtype
    hidden_dtype = wide if student.hidden.dtype is torch.float16 else student.hidden.dtype
    new_hidden = student.hidden.new_zeros if has_gaps else student.hidden.new_empty
    return (
        new_hidden(student.hidden.shape, dtype=hidden_dtype) if wanted[0] else None,
        student.weight.new_empty(student.weight.shape, dtype=wide) if wanted[1] else None,
        student.bias.new_zeros(student.bias.shape, dtype=wide) if wanted[2] else None,
    )


def _add_gradients(gradients, products, gradient, hidden, part, first):
    of_hidden, of_weight, of_bias = gradients
    if of_hidden is not None:
        of_hidden[part] = products.of_hidden(gradient).to(of_hidden.dtype)
    if of_weight is not None:
        products.add_to_weight(of_weight, gradient, hidden, first)
    if of_bias is not None:
        of_bias.add_(gradient.sum(0, dtype=of_bias.dtype), alpha=products.head.scale)


def _finished(gradients, student, unit):
    for gradient, value in zip(gradients, student[:3], strict=True):
        if gradient is not None and unit != 1:
            gradient = gradient.div_(unit)
        if gradient is not None and value.dtype is not torch.float16:
            gradient = gradient.to(value.dtype)
        yield gradient


class _Totals:
    """Adds the chunks' outcomes up. Shares are weighted with the rows that they are shares of."""

    def __init__(self, batch, soft_rows, labelled_rows, metrics):
        self._dtype, self._metrics = loss_dtype(batch.student), metrics
        self._soft_rows, self._labelled_rows = soft_rows, labelled_rows
        self._soft = batch.options.alpha > 0
        rows = len(soft_rows) if batch.options.reduction == "none" else None
        self._sums = [0.0] * 3 if rows is None else [batch.student.new_zeros(rows, dtype=self._dtype) for _ in range(3)]
        for k, on in ((1, batch.options.alpha > 0), (2, batch.options.alpha < 1)):
            if metrics and not on:
                self._sums[k] = self._sums[k] + float("nan")
        self._agreeing = self._right = 0.0
        self._per_row = rows is not None
        self._looks_like_probs = None

    def add(self, part, outcome):
        """The rows of one chunk."""
        if self._looks_like_probs is None:
            self._looks_like_probs = outcome.teacher_sums_to_one
        for k, value in enumerate(outcome[:3]):
            if self._per_row:
                self._sums[k][part] = torch.as_tensor(value, dtype=self._dtype)
            elif k == 0 or self._metrics:
                self._sums[k] += float(value)
        if self._metrics:
            for name, share, counts in (
                ("_agreeing", outcome.agreement, self._soft_rows),
                ("_right", outcome.accuracy, self._labelled_rows),
            ):
                number = int(counts[part].sum())
                if number:
                    setattr(self, name, getattr(self, name) + float(share) * number)

    def outcome(self, items) -> Outcome:
        """Of all chunks."""
        loss, soft, hard = self._sums
        if not self._per_row:
            loss = torch.tensor(loss, dtype=self._dtype)  # scalar_tensor would refuse a sum beyond float32
        agreement, accuracy = (
            total / number if self._metrics and number else float("nan")
            for total, number in (
                (self._agreeing, int(self._soft_rows.sum())),
                (self._right, int(self._labelled_rows.sum())),
            )
        )
        agreement = agreement if self._soft else float("nan")  # also where no chunk was left to say so
        return Outcome(loss, soft, hard, agreement, accuracy, *items, bool(self._looks_like_probs))


class Call:
    """One call on its way through autograd, which takes tensors and opaque objects only."""

    def __init__(self, student, teacher, batch, engine, chunk_rows, metrics):
        self.student, self.teacher, self.batch, self.engine = student, teacher, batch, engine
        self.chunk_rows, self.metrics, self.outcome = chunk_rows, metrics, None
        self.dtypes = [None if head is None else product_dtype(head) for head in (student, teacher)]

    @raises_memory_error
    def run(self, wanted=(False,) * 3, grad_output=1.0, metrics=False) -> Pass:
        """See :func:`run`. Without autocast, whose dtype is settled."""
        with torch.no_grad(), torch.autocast("cpu", enabled=False):
            where = (self.engine, self.chunk_rows, self.dtypes)
            return run(self.student, self.teacher, self.batch, *where, wanted, grad_output, metrics)

    def take_constants(self):
        """Teacher and options' tensors, which autograd keeps between forward and backward; the call forgets them."""
        of_teacher = [None] * 3 if self.teacher is None else self.teacher[:3]
        tensors = [*of_teacher, *self.batch[1:7]]
        self.student = self.student._replace(hidden=None, weight=None, bias=None)
        self.teacher = None if self.teacher is None else self.teacher._replace(hidden=None, weight=None, bias=None)
        self.batch = Batch(None, *(None,) * 6, self.batch.options)
        return tensors

    def with_tensors(self, of_student, constants):
        """The call again, whole."""
        call = object.__new__(Call)
        call.__dict__.update(self.__dict__)
        call.student = Head(*of_student, *self.student[3:])
        call.teacher = None if self.teacher is None else Head(*constants[:3], *self.teacher[3:])
        call.batch = Batch(call.student.stand_in(), *constants[3:], self.batch.options)
        return call


class FusedHead(torch.autograd.Function):
    """Loss and gradients in one run over the chunks, in forward; reduction="none" runs them again in backward."""

    @staticmethod
    def forward(ctx, hidden, weight, bias, call):
        """The loss; the gradients are ready for backward."""
        ctx.deferred = call.batch.options.reduction == "none"
        found = call.run((False,) * 3 if ctx.deferred else ctx.needs_input_grad[:3], metrics=call.metrics)
        call.outcome = found.outcome
        call.inference, constants = split_inference(call.take_constants())
        ctx.call = call
        ctx.save_for_backward(hidden, weight, bias, *found.gradients, *constants)
        return found.outcome.loss

    @staticmethod
    @raises_memory_error
    def backward(ctx, grad_output):
        """What forward found, times grad_output."""
        saved = ctx.saved_tensors
        inputs, gradients, constants = saved[:3], saved[3:6], saved[6:]
        call, wanted = ctx.call, ctx.needs_input_grad[:3]
        constants = [x if kept is None else kept for x, kept in zip(constants, call.inference, strict=True)]
        if torch.is_grad_enabled() or is_batched(grad_output):
            return *_differentiable(call.with_tensors(inputs, constants), inputs, wanted, grad_output), None
        if ctx.deferred:
            whole = call.with_tensors(inputs, constants)
            gradients = whole.run(wanted, grad_output.contiguous()).gradients
        elif grad_output.item() != 1:
            gradients = [None if x is None else x * grad_output for x in gradients]
        return *(None if x is None else x.to(like.dtype) for x, like in zip(gradients, inputs, strict=True)), None


def _differentiable(call, inputs, wanted, grad_output):
    """The gradients as differentiable operations, for a second derivative; all logits exist then."""
    soft_rows, labelled_rows, _, _ = counted_rows(call.batch)
    with torch.enable_grad():
        student = call.student.logits(rows_with_a_term(call.batch, soft_rows, labelled_rows))
        teacher = call.batch.teacher
        if call.teacher is not None:
            with torch.no_grad():
                teacher = call.teacher.logits()
        batch = call.batch._replace(student=student, teacher=teacher)
        loss, _, _ = loss_formula(batch)
        chosen = [x for x, want in zip(inputs, wanted, strict=True) if want]
        found = iter(torch.autograd.grad(loss, chosen, grad_output, create_graph=True))
        return [next(found) if want else None for want in wanted]
