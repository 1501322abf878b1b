"""python -m bench: validate every contestant, then time forward + backward on one thread, pairs in one process."""

import argparse
import platform
import statistics

import torch

import pydistill
from bench.contestants import CONTESTANTS, forward_backward
from bench.measure import fresh_logits, gradient_error, make_inputs, paired_times, peak_buffers, ratio

CASES = {  # rows, classes, pairs
    "1024x32000": (1024, 32000, 7),
    "1024x1000": (1024, 1000, 60),
    "32x10": (32, 10, 2000),
}
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 2e-2}


def run_case(name, dtype, pairs=None):
    rows, classes, default_pairs = CASES[name]
    inputs = make_inputs(rows, classes, dtype)
    errors, memory = {}, {}
    for label, contestant in CONTESTANTS.items():
        student, teacher, labels = inputs
        gradient = forward_backward(contestant, fresh_logits(student), teacher, labels)
        errors[label] = gradient_error(gradient, *inputs)
        del gradient
        assert errors[label] < TOLERANCE[dtype], f"{label}: gradient off by {errors[label]:.2g}, not timed"
        if rows * classes > 1 << 22:
            memory[label] = peak_buffers(contestant, *inputs)
    times = paired_times(CONTESTANTS, inputs, pairs or default_pairs)
    print(f"\n{name} {str(dtype).removeprefix('torch.')}, T = 4, alpha = 0.7, forward + backward, one thread")
    print(f"{'':40}{'ms':>10}{'pydistill is':>14}{'quartiles':>16}{'in place':>10}{'N x C':>8}{'error':>10}")
    for label in CONTESTANTS:
        middle, low, high = ratio(times, label, "pydistill")
        inplace = ratio(times, label, "pydistill, inplace=True")[0]
        buffers = f"{memory[label]:.2f}" if memory else ""
        print(
            f"{label:40}{statistics.median(times[label]) * 1e3:10.3f}{middle:12.2f} x"
            f"{f'{low:.2f} - {high:.2f}':>16}{inplace:8.2f} x{buffers:>8}{errors[label]:10.1e}"
        )


def main():
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    parser.add_argument("cases", nargs="*", metavar="CASE", help=f"of {', '.join(CASES)}; default: all")
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], default="float32")
    parser.add_argument("--pairs", type=int, help="rounds to time; the default depends on the case")
    arguments = parser.parse_args()
    for name in arguments.cases:
        if name not in CASES:
            parser.error(f"CASE must be one of {', '.join(CASES)}; got {name!r}")
    torch.set_num_threads(1)
    with open("/sys/kernel/mm/transparent_hugepage/enabled") as setting:
        huge_pages = setting.read().strip()
    info = pydistill.backend_info()
    print(f"{platform.processor() or platform.machine()}, torch {torch.__version__}, huge pages: {huge_pages}")
    print(f"backend {info.name}, ISA {info.isa}: {info.reason}")
    for name in arguments.cases or CASES:
        run_case(name, getattr(torch, arguments.dtype), arguments.pairs)


if __name__ == "__main__":
    main()
