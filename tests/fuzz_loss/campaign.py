"""Many calls: drawn, run on every backend and ISA, judged, made smaller, counted. In a process that may crash.

The worker notes the call it is about to make in a file, so that a crash or a hang of the worker names its call; the
parent reports it and starts another worker behind it.
"""

import itertools
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from pathlib import Path

import torch

from . import judging, refusals
from .case import Case, written
from .definitions import resolve
from .drawing import draw
from .shrinking import shrink

REFUSED_SHARE = 25  # one call in so many must be refused
SECONDS_FOR_SHRINKING = 10.0  # of one finding
LARGEST_NUMBER_OF_EXAMPLES = 20
PATIENCE = 180.0  # with one call, the compilation of a numba kernel and a shrinking among it


def variants(backend=None, isa=None):
    """``(backend, isa)`` for every way in which this machine can run the loss, or for the chosen ones."""
    from pydistill.engine import compiled

    try:
        isas = compiled.load_core().ISAS
    except ImportError:
        isas = ()
    every = [("compiled", name) for name in isas] + [("numba", None), ("torch", None)]
    chosen = [v for v in every if backend in (None, v[0]) and isa in (None, v[1])]
    if not chosen:
        raise SystemExit(f"no backend {backend} with ISA {isa} here; there are {every}")
    return chosen


def name_of(variant) -> str:
    return "-".join(filter(None, variant))


def make(seed, call) -> Case | refusals.Refusal:
    """The call of that number. It does not depend on the backend."""
    text = f"{seed}:{call}"
    return refusals.draw(text) if call % REFUSED_SHARE == REFUSED_SHARE - 1 else draw(text)


def find(made, variant, wanted=None) -> judging.Finding | None:
    if isinstance(made, refusals.Refusal):
        return made.check(*variant)
    return judging.check(made, *variant, wanted)


class Worker:
    """Calls ``first``, ``first + 1``, ... until the time is over."""

    def __init__(self, seed, chosen, folder=None, out=sys.stdout):
        self.seed, self.chosen, self.out = seed, chosen, out
        self.folder = None if folder is None else Path(folder)
        self.progress = None if folder is None else os.open(self.folder / "progress", os.O_CREAT | os.O_WRONLY)
        self.calls, self.findings, self.examples = Counter(), Counter(), {}
        self.compiled, self.compiling, self.spent = set(), 0.0, 0.0
        warnings.simplefilter("ignore")
        torch.set_num_threads(1)

    def run(self, seconds, first=0, calls=None):
        started, noted = time.monotonic(), 0.0
        end = started + seconds
        for call in itertools.count(first) if calls is None else calls:
            now = time.monotonic()
            if now >= end:
                break
            end += self.one(call, now - started)
            self.spent = time.monotonic() - end + seconds  # without the time for shrinking
            if self.folder is not None and now - noted > 1:
                self.note()
                noted = now
        self.note()
        return self

    def one(self, call, elapsed=0.0) -> float:
        """One call on the chosen backends; the seconds that went into making a failure smaller."""
        try:
            made = make(self.seed, call)
        except Exception:
            self.findings["error in the fuzzer"] += 1
            print(f"\n=== call {call} of seed {self.seed}\n{traceback.format_exc()}", file=self.out, flush=True)
            return 0.0
        chosen = self.chosen
        if getattr(made, "path", None) == "functorch" or isinstance(made, refusals.Refusal):
            chosen = [chosen[call % len(chosen)]]  # does not depend on the backend
        wanted = None
        if isinstance(made, Case) and made.function != "loss_items":
            wanted = judging.Readings(made)
        shrinking, reported = 0.0, set()
        for variant in chosen:
            if variant[0] == "numba" and self.too_much_compiling(made, elapsed):
                continue
            if self.progress is not None:
                os.pwrite(self.progress, f"{call} {name_of(variant)}".ljust(64).encode(), 0)
            started = time.monotonic()
            finding = self.find(made, variant, wanted)
            took = time.monotonic() - started
            if variant[0] == "numba" and took > 0.5:
                self.compiling += took
            self.calls[name_of(variant)] += 1
            if finding is not None:
                shrinking += self.report(call, made, variant, finding, variant[0] not in reported)
                reported.add(variant[0])
        return shrinking

    def find(self, made, variant, wanted):
        try:
            return find(made, variant, wanted)
        except Exception:
            return judging.Finding("error in the fuzzer", traceback.format_exc())

    def too_much_compiling(self, made, elapsed):
        """numba compiles for seconds per kind of row; among other backends it gets a quarter of the time for that."""
        if isinstance(made, refusals.Refusal) or made.function == "loss_items" or len(self.chosen) == 1:
            return False
        top_k = made.teacher is not None and made.teacher.form in ("from_topk", "top_k")
        divergence, _ = resolve(made.option("divergence"), made.option("beta"))
        if made.option("alpha") == 0:
            divergence = None
        kind = made.dtype == torch.float64, divergence, top_k
        if kind not in self.compiled and self.compiling > elapsed / 4:
            return True
        self.compiled.add(kind)
        return False

    def report(self, call, made, variant, finding, new) -> float:
        started = time.monotonic()
        path = getattr(made, "path", "")
        kind = f"{finding.kind}, {variant[0]}" + (f", {path}" if path else "")
        self.findings[kind] += 1
        if not new or self.findings[kind] > 10 or len(self.examples) >= LARGEST_NUMBER_OF_EXAMPLES:
            return 0.0
        if isinstance(made, refusals.Refusal):
            text, form = finding.text, (kind, made.name)
            code = made.code
        else:
            made, finding = smaller(made, variant, finding)
            form = (kind, made.function, made.option("divergence"), *sorted(made.options))
            code = written(made, *variant)
            text = finding.text
        if form not in self.examples:
            self.examples[form] = code
            replay = f"python -m tests.fuzz_loss --seed {self.seed} --call {call} --backend {variant[0]}"
            replay += f" --isa {variant[1]}" if variant[1] else ""
            print(f"\n=== {kind} (call {call}; {replay})\n{code}\n# {comment(text)}", file=self.out, flush=True)
        return time.monotonic() - started

    def note(self):
        if self.folder is None:
            return
        counts = {"calls": self.calls, "findings": self.findings, "spent": self.spent}
        fresh = self.folder / "counts.new"
        fresh.write_text(json.dumps(counts))
        fresh.replace(self.folder / "counts")


def comment(text):
    return text.replace("\n", "\n# ")


def smaller(case, variant, finding, find=find, seconds=None):
    """``(the smallest case, its finding)``, of the same kind."""

    def fails(candidate):
        other = find(candidate, variant)
        return other is not None and other.kind == finding.kind

    small = shrink(case, fails, SECONDS_FOR_SHRINKING if seconds is None else seconds)
    return small, find(small, variant) or finding


# --- The parent -----------------------------------------------------------------------------------------------


def campaign(seed, seconds, backend=None, isa=None) -> int:
    """Run workers for that long; print the summary. The number of findings."""
    calls, findings, first, left = Counter(), Counter(), 0, seconds
    while left > 0:
        with tempfile.TemporaryDirectory() as folder:
            command = [sys.executable, "-m", __package__, "--seed", str(seed), "--seconds", str(left)]
            command += ["--first", str(first), "--progress", folder]
            command += ["--backend", backend] if backend else []
            command += ["--isa", isa] if isa else []
            code = _watch(command, Path(folder) / "progress")
            counts = _read(Path(folder) / "counts")
            calls.update(counts.get("calls", {}))
            findings.update(counts.get("findings", {}))
            left -= counts.get("spent", 0.0) + 1.0
            if code == 0:
                break
            at = (Path(folder) / "progress").read_text().split() if (Path(folder) / "progress").exists() else []
        if not at:
            raise SystemExit(f"the fuzzer did not start: exit status {code}")
        call, variant = int(at[0]), at[1]
        what = "hang" if code is None else f"crash, {_signal(code)}"
        findings[f"{what}, {variant.split('-')[0]}"] += 1
        print(f"\n=== {what}: --seed {seed} --call {call} on {variant}", flush=True)
        if code is not None:
            subprocess.run([*command[:3], "--seed", str(seed), "--crash", str(call), variant], check=False)
        first = call + 1
    _summary(seed, calls, findings)
    idle = [name for name in map(name_of, variants(backend, isa)) if not calls.get(name)]
    if idle:
        raise SystemExit(f"no call was made on {', '.join(idle)}: give it more --seconds")
    return sum(findings.values())


def _watch(command, progress):
    """The exit status, or None of a worker that was killed since it hung."""
    worker = subprocess.Popen(command)
    while True:
        try:
            return worker.wait(1.0)
        except subprocess.TimeoutExpired:
            if progress.exists() and time.time() - progress.stat().st_mtime > PATIENCE:
                worker.kill()
                worker.wait()
                return None
        except BaseException:
            worker.kill()
            raise


def _read(path):
    return json.loads(path.read_text()) if path.exists() else {}


def _signal(code):
    return signal.Signals(-code).name if code < 0 else f"exit status {code}"


def _summary(seed, calls, findings):
    print(f"\nseed {seed}: {sum(calls.values())} calls; " + ", ".join(f"{n} {k}" for k, n in sorted(calls.items())))
    if not findings:
        print("no findings")
    for kind, count in findings.most_common():
        print(f"{count:6d} findings: {kind}")


def crash(seed, call, variant, seconds=60.0):
    """Make a crashing call smaller, each try in a forked child."""
    backend, _, isa = variant.partition("-")
    variant = (backend, isa or None)
    torch.set_num_threads(1)

    def find(case, variant):
        child = os.fork()
        if child == 0:
            try:
                judging.run(case, *variant)
            finally:
                os._exit(0)
        _, status = os.waitpid(child, 0)
        return judging.Finding("crash", _signal(-os.WTERMSIG(status))) if os.WIFSIGNALED(status) else None

    made = make(seed, call)
    if isinstance(made, refusals.Refusal):
        print(made.code)
        return
    finding = find(made, variant)
    if finding is None:
        print("# not again in a fresh process: memory that an earlier call had damaged?")
        print(written(made, *variant))
        return
    small, finding = smaller(made, variant, finding, find, seconds)
    print(f"{written(small, *variant)}\n# {finding.text}", flush=True)
