"""A linear head: its logits, and the gradients of hidden states, weight and bias from the gradient of the logits."""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from pydistill.engine.torch_private import has_native_products
from pydistill.formulas import loss_dtype

_BLOCK_BYTES = 8 << 20  # of a half weight, converted to float32 at a time
HALVES = (torch.bfloat16, torch.float16)


class Head(NamedTuple):
    """``logits = softcap * tanh(scale * (hidden @ weight.T + bias) / softcap)``; softcap None: the scaled product."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    softcap: float | None
    scale: float

    @property
    def tensors(self) -> tuple[Tensor, Tensor, Tensor | None]:
        """Hidden states, weight and bias."""
        return self.hidden, self.weight, self.bias

    def with_tensors(self, tensors: Sequence[Any]) -> "Head":
        """Return this head with other tensors, in the order of :attr:`tensors`."""
        hidden, weight, bias = tensors
        return self._replace(hidden=hidden, weight=weight, bias=bias)

    def logits(self, counts: Tensor | None = None) -> Tensor:
        """Compute the logits of all rows with differentiable torch operations.

        Hidden states of rows that do not count are set to 0: 0 times a NaN would reach the gradient of the weight.
        """
        dtype = torch.promote_types(self.hidden.dtype, self.weight.dtype)  # they differ after autocast
        bias = None if self.bias is None else self.bias.to(dtype)
        hidden = self.hidden if counts is None else torch.where(counts.unsqueeze(-1), self.hidden, 0)
        logits = F.linear(hidden.to(dtype), self.weight.to(dtype), bias)
        if self.softcap is None:
            return logits if self.scale == 1 else logits * self.scale
        logits = logits.to(loss_dtype(logits))
        return self.softcap * torch.tanh(logits * (self.scale / self.softcap))

    def stand_in(self) -> Tensor:
        """Return a tensor with the logits' shape and dtype that takes no memory, for checks of shapes."""
        return self.hidden.new_empty(()).expand(*self.hidden.shape[:-1], self.weight.shape[0])


def product_dtype(head: Head) -> torch.dtype:
    """Return the dtype of a head's products: the weight's or autocast's; float32 if the CPU has no half products.

    Without such instructions a half product is emulated, up to a hundred times slower than converting to float32.
    """
    dtype = head.weight.dtype
    if torch.is_autocast_enabled("cpu") and dtype is not torch.float64:
        dtype = torch.get_autocast_dtype("cpu")
    return torch.float32 if dtype in HALVES and not has_native_products(dtype) else dtype


class Products:
    """The matrix products of a head for chunks of at most ``rows`` rows: logits, and the gradients from theirs."""

    head: Head
    dtype: torch.dtype

    def __init__(self, head: Head, dtype: torch.dtype, rows: int, gradient: bool) -> None:
        self.head, self.dtype = head, dtype
        classes, width = head.weight.shape
        # A half product takes the whole weight in that dtype; float32 ones widen a half weight block by block.
        self._weight = head.weight.to(dtype) if dtype in HALVES else head.weight
        self._bias = None if head.bias is None else head.bias.to(dtype)
        self._block = classes if self._weight.dtype is dtype else max(1, _BLOCK_BYTES // (4 * width))
        self._wide = None if self._weight.dtype is dtype else head.weight.new_empty(self._block, width, dtype=dtype)
        new = head.weight.new_empty
        self._product = new(rows, classes, dtype=dtype)
        wide = torch.float32 if dtype in HALVES and head.softcap is not None else dtype
        self._logits = self._product if wide is dtype else new(rows, classes, dtype=wide)
        self._gradient = self._logits
        if gradient and head.softcap is not None:  # its derivative is made of the logits
            self._gradient = new(rows, classes, dtype=wide)

    def _blocks(self) -> Iterator[tuple[slice, Tensor]]:
        """Yield slices of the classes with their weights in the products' dtype."""
        if self._wide is None:
            yield slice(None), self._weight
            return
        for start in range(0, len(self._weight), self._block):
            part = slice(start, min(start + self._block, len(self._weight)))
            yield part, self._wide[: part.stop - start].copy_(self._weight[part])

    def logits(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """Return ``(logits, buffer for their gradient)``, valid until the next chunk; ``hidden`` is in ``dtype``."""
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

    def before_softcap(self, logits: Tensor, gradient: Tensor) -> Tensor:
        """Return the gradient with respect to the scaled product, in the products' dtype."""
        if self.head.softcap is None:
            return gradient
        gradient.mul_(logits.div_(self.head.softcap).square_().neg_().add_(1))
        return gradient if gradient.dtype is self.dtype else self._product[: len(gradient)].copy_(gradient)

    def of_hidden(self, gradient: Tensor) -> Tensor:
        """Return ``scale * gradient @ weight``, a new tensor."""
        total = gradient.new_empty(len(gradient), self._weight.shape[1])
        for part, weight in self._blocks():
            beta = 0 if part.start in (None, 0) else 1
            torch.addmm(total, gradient[:, part], weight, beta=beta, alpha=self.head.scale, out=total)
        return total

    def add_to_weight(self, total: Tensor, gradient: Tensor, hidden: Tensor, first: bool) -> None:
        """Add ``scale * gradient.T @ hidden`` to ``total``, float32 for half products, which keeps small updates."""
        scale, beta = self.head.scale, 0 if first else 1
        if total.dtype is self.dtype:
            torch.addmm(total, gradient.T, hidden, beta=beta, alpha=scale, out=total)
            return
        rows = max(1, _BLOCK_BYTES // (2 * hidden.shape[1]))
        for out, part in zip(torch.split(total, rows), torch.split(gradient, rows, 1), strict=True):
            product = part.T @ hidden
            out.copy_(product).mul_(scale) if first else out.add_(product, alpha=scale)
