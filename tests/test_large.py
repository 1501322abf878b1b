"""More than 2^31 elements: offsets need 64 bits."""

import pytest
import torch
from reference import loss_and_gradient

import pydistill


@pytest.mark.slow
@pytest.mark.timeout(280)
def test_beyond_two_to_the_31():
    rows, classes = 16500, 131072
    assert rows * classes > 2**31
    first, last = torch.randn(2, classes).bfloat16()
    logits = torch.zeros(rows, classes, dtype=torch.bfloat16)
    logits[0], logits[-1] = first, last
    logits.add_(torch.zeros(1, dtype=torch.bfloat16, requires_grad=True))  # not a leaf any more, without a copy
    teacher = torch.randn(classes).bfloat16().expand(rows, classes)
    labels = torch.full((rows,), -100)
    labels[0], labels[-1] = 5, classes - 1
    loss = pydistill.distillation_loss(logits, teacher, labels, temperature=2.0, inplace=True)
    (gradient,) = torch.autograd.grad(loss, logits)
    assert gradient.data_ptr() == logits.data_ptr()
    want, exact = loss_and_gradient(torch.stack([first, last]), teacher[:2], labels[[0, -1]], temperature=2.0)
    assert loss.item() == pytest.approx(want.item(), rel=1e-6)
    assert (gradient[[0, -1]].double() - exact).norm() <= 2**-8 * exact.norm()
    assert all(not rows_.any() for rows_ in gradient[1:-1].split(1000))
