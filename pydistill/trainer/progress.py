"""The progress bar of a training run."""

import importlib.util
import math
from contextlib import nullcontext


def shown(record):
    """The numbers beside the progress bar, without those that there are none of."""
    train = record.train
    shown = {"epoch": record.epoch, "loss": train.loss, "soft": train.soft_loss, "hard": train.hard_loss}
    best = record.val or train
    shown |= {"accuracy": best.accuracy, "agreement": best.agreement}
    return {name: value for name, value in shown.items() if not math.isnan(value)}


def progress_bar(wanted, steps):
    """tqdm's bar over the batches, or a context without one."""
    if not wanted or importlib.util.find_spec("tqdm") is None:
        return nullcontext()
    from tqdm import tqdm

    return tqdm(total=steps, desc="fit", unit="step")
