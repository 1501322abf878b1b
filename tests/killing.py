"""Processes that are killed at random moments, for the kill tests of the Trainer and the store.

A kill costs a fork of a process that has imported torch already. ``PYDISTILL_KILLS`` says how many there are.
"""

import os
import random
import shutil
import signal
import time
from multiprocessing import get_context

KILLS = int(os.environ.get("PYDISTILL_KILLS", "50"))
SEED = 5
TIMEOUT = 60 + 2 * KILLS  # seconds for all of them: several times what they take
_HANGS = 30  # seconds for one process that nobody kills


def run_child(work, kill_after=None):
    """Whether a forked process that does the work was killed, by itself or after some seconds.

    An error in it is one here, and so is a process that hangs.
    """
    process = get_context("fork").Process(target=work, daemon=True)
    process.start()
    process.join(_HANGS if kill_after is None else kill_after)
    hangs = kill_after is None and process.is_alive()
    process.kill()
    process.join()
    assert not hangs, f"the process did not end within {_HANGS} seconds"
    assert process.exitcode in (0, -signal.SIGKILL), f"the process ended with {process.exitcode}"
    return process.exitcode != 0


def kill_at_random_moments(work, result, folder, progress):
    """Do ``work(folder)`` again and again, killed or not, until there were enough kills.

    Each round has a folder of its own, and goes on until one process has come to the end; its ``result(folder)`` must
    be that of a process that was not killed. ``progress(folder)``, after each kill, must never go back.

    """
    start = time.perf_counter()
    assert not run_child(lambda: work(folder / "whole"))
    seconds = time.perf_counter() - start
    want, moments = result(folder / "whole"), random.Random(SEED)
    kills, rounds, seen = 0, 0, set()
    while kills < KILLS:
        path, before = folder / f"round {rounds}", 0
        where = f"round {rounds}, with seed {SEED}, after {{}} kills"
        while kills < KILLS and run_child(lambda path=path: work(path), moments.uniform(0, 0.7 * seconds)):
            kills += 1
            now = progress(path)
            assert now >= before, f"fewer steps than before in {where.format(kills)}"
            before = now
            seen.add(now)
        assert not run_child(lambda path=path: work(path)), where.format(kills)
        assert result(path) == want, f"another result in {where.format(kills)}"
        shutil.rmtree(path)
        rounds += 1
    print(f"{kills} kills in {rounds} rounds, {time.perf_counter() - start:.1f} s, {len(seen)} different states")
    assert len(seen) > min(5, KILLS // 5), f"the kills with seed {SEED} met only these states: {sorted(seen)}"
