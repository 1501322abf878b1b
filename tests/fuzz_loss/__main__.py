"""Command line of the fuzzer; exit status 1 where something was found."""

import argparse
import signal
import sys

from . import campaign


def main(arguments=None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz_loss", description=campaign.__doc__)
    parser.add_argument("--seed", default="1", help="of the calls; any text")
    parser.add_argument("--seconds", type=float, default=60.0, help="how long to make calls")
    parser.add_argument("--call", type=int, help="only the call of this number, on every backend")
    parser.add_argument("--backend", choices=("compiled", "numba", "torch"))
    parser.add_argument("--isa", help="of the compiled backend, such as avx2")
    parser.add_argument("--first", type=int, default=0, help=argparse.SUPPRESS)
    parser.add_argument("--progress", help=argparse.SUPPRESS)
    parser.add_argument("--crash", nargs=2, metavar=("CALL", "VARIANT"), help=argparse.SUPPRESS)
    given = parser.parse_args(arguments)
    if not 0 < given.seconds < float("inf"):
        parser.error(f"--seconds must be positive and finite, got {given.seconds:g}")
    if given.crash is not None:
        campaign.crash(given.seed, int(given.crash[0]), given.crash[1])
        return 0
    if given.call is None and given.progress is None:
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # an exception, so that the worker ends too
        return 1 if campaign.campaign(given.seed, given.seconds, given.backend, given.isa) else 0
    worker = campaign.Worker(given.seed, campaign.variants(given.backend, given.isa), given.progress)
    worker.run(given.seconds, given.first, None if given.call is None else [given.call])
    if given.call is None:
        return 0
    print(f"call {given.call}: {sum(worker.findings.values())} findings on {', '.join(worker.calls)}")
    return 1 if worker.findings else 0


if __name__ == "__main__":
    sys.exit(main())
