"""What the trainer, the teachers and the report ask of a torch module."""

from contextlib import contextmanager


@contextmanager
def mode(module, *, training):
    """Train or eval mode for a while; every submodule gets its own mode back, also one that was frozen."""
    before = [(m, m.training) for m in module.modules()]
    module.train(training)
    try:
        yield
    finally:
        for m, of_module in before:
            m.training = of_module


def float_dtype(module, default):
    """Of the module's first floating-point parameter, in which it wants its inputs."""
    return next((p.dtype for p in module.parameters() if p.is_floating_point()), default)
