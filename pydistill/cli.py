"""The console command ``pydistill`` with its subcommands ``info`` and ``demo``."""

import argparse
import platform
import sys
from collections.abc import Sequence
from pathlib import Path

import pydistill
from pydistill import demo


def main(argv: Sequence[str] | None = None) -> int:
    """Run the console command.

    Args:
        argv: the arguments after ``pydistill``; by default those of the process.

    Returns:
        int: the exit status: 0, or 1 if a package that the command needs is missing.

    Raises:
        SystemExit: with status 2, for unknown arguments and for options outside their range.

    Example:
        >>> from pydistill.cli import main
        >>> main(["info"])  # doctest: +ELLIPSIS
        pydistill ...
        0
    """
    parser = _parser()
    arguments = parser.parse_args(argv)
    if arguments.command == "info":
        print(info())
        return 0
    try:
        pydistill.DistillationLoss(temperature=arguments.temperature, alpha=arguments.alpha)
    except ValueError as error:
        parser.error(str(error))
    return _demo(arguments)


def info() -> str:
    """Return the backend that computes the loss, the reason for its choice, threads and versions, one per line."""
    backend = pydistill.backend_info()
    lines = {
        "pydistill": pydistill.__version__,
        "backend": backend.name + (f", {backend.isa}" if backend.isa else ""),
        "reason": backend.reason,
        "threads": str(backend.threads),
        "Python": platform.python_version(),
    }
    lines |= demo.versions("torch", "numpy", "numba")
    width = max(map(len, lines))
    return "\n".join(f"{name:{width}}  {value}" for name, value in lines.items())


def _demo(arguments: argparse.Namespace) -> int:
    try:
        demo.require_extra()
    except ImportError as error:
        print(f"pydistill: {error}", file=sys.stderr)
        return 1
    options = demo.Options(arguments.temperature, arguments.alpha, arguments.seeds, arguments.epochs)
    results = demo.run(options)
    print(demo.text(results))
    print()
    print(demo.save(results, arguments.output))
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="pydistill", description="Knowledge distillation on the CPU.")
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("info", help="show which backend computes the loss, why, and the installed versions")
    command = commands.add_parser(
        "demo",
        help="distil a random forest into a small network on scikit-learn's digits, and measure the result",
        description="Distil a random forest into a small network on scikit-learn's digits, and compare it with the "
        "same network trained on the labels alone. Requires: pip install 'pydistill-kd[demo]'",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    command.add_argument(
        "--temperature", type=float, default=1.0, help="temperature of the softmax of teacher and student"
    )
    command.add_argument("--alpha", type=float, default=0.5, help="weight of the soft term, in [0, 1]")
    command.add_argument("--seeds", type=_positive, default=5, help="number of runs, each with its own split")
    command.add_argument("--epochs", type=_positive, default=40, help="passes over the training rows")
    command.add_argument(
        "--output",
        type=Path,
        default=Path("distillation-demo"),
        help="folder for the student, the figures and the plot",
    )
    return parser


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be an integer of at least 1, got {text!r}")
    return int(text)
