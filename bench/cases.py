"""The benchmark cases: a base case, and cases that differ from it in one factor.

A case has a name, which is also how it is written on the command line: ``1024x32000,bfloat16,T=2.5,soft,threads=2``.
"""

import itertools
import os
from dataclasses import dataclass, fields

import torch

from pydistill.formulas import DIVERGENCES


@dataclass(frozen=True)
class Case:
    """One value of every factor.

    ``hidden`` > 0 puts a linear head with that many inputs before the logits, so that losses of other libraries that
    take hidden states can be compared.
    """

    rows: int = 1024
    classes: int = 32000
    dtype: str = "float32"
    temperature: float = 4.0
    alpha: float = 0.7
    backward: bool = True
    threads: int = 1
    huge_pages: bool = False  # torch allocates huge pages (THP_MEM_ALLOC_ENABLE=1); measured in a separate process
    hidden: int = 0
    divergence: str = "forward_kl"
    k: int = 0  # number of classes of a top-k teacher with tail="bucket"; 0: the teacher has all classes

    @property
    def name(self) -> str:
        words = [f"{self.rows}x{self.classes}"]
        if self.hidden:
            words.append(f"hidden={self.hidden}")
        if self.divergence != "forward_kl":
            words.append(self.divergence)
        if self.k:
            words.append(f"k={self.k}")
        if self.dtype != "float32":
            words.append(self.dtype)
        if self.temperature != 4:
            words.append(f"T={self.temperature:g}")
        if self.alpha != 0.7:
            words.append({0: "hard", 1: "soft"}.get(self.alpha, f"alpha={self.alpha:g}"))
        if not self.backward:
            words.append("forward")
        if self.threads != 1:
            words.append(f"threads={self.threads}")
        if self.huge_pages:
            words.append("huge-pages")
        return ",".join(words)

    @property
    def elements(self) -> int:
        return self.rows * self.classes

    @property
    def torch_dtype(self) -> torch.dtype:
        return getattr(torch, self.dtype)


def parse(text: str) -> Case:
    """Return the case with this name.

    Raises:
        ValueError: the name is wrong; the message says which word.
    """
    shape, *words = text.split(",")
    rows, _, classes = shape.partition("x")
    if not (rows.isdigit() and classes.isdigit() and int(rows) and int(classes)):
        raise ValueError(f"a case must begin with ROWSxCLASSES, such as 1024x32000; got {shape!r}")
    values = {"rows": int(rows), "classes": int(classes)}
    for word in words:
        name, _, value = word.partition("=")
        if word in ("float32", "bfloat16", "float16"):
            values["dtype"] = word
        elif word in DIVERGENCES:
            values["divergence"] = word
        elif word in ("soft", "hard"):
            values["alpha"] = float(word == "soft")
        elif word == "forward":
            values["backward"] = False
        elif word == "huge-pages":
            values["huge_pages"] = True
        elif name in ("T", "alpha"):
            values["temperature" if name == "T" else name] = float(value)
        elif name in ("threads", "hidden", "k"):
            values[name] = int(value)
        else:
            raise ValueError(
                f"a word of a case must be float32, bfloat16, float16, T=, alpha=, soft, hard, forward, threads=, "
                f"hidden=, k=, huge-pages or the name of a divergence; got {word!r}"
            )
    case = Case(**values)
    if not case.backward and (case.hidden or case.k or case.divergence != "forward_kl"):
        raise ValueError(f"a case with forward cannot have hidden=, k= or a divergence; got {text!r}")
    return case


SHAPES = [(32, 10), (64, 10), (256, 100), (1024, 1000), (8192, 128), (8192, 1000), (256, 128256), (64, 262144)]
README_SHAPES = ("32x10", "1024x1000", "1024x32000", "256x128256")
THREADS = os.cpu_count() or 1
FACTORS = [
    {"dtype": "bfloat16"},
    {"dtype": "float16"},
    {"temperature": 1.0},
    {"temperature": 2.0},
    {"temperature": 2.5},
    {"alpha": 1.0},
    {"alpha": 0.0},
    {"backward": False},
    {"threads": THREADS},
]
LIKE_THE_BASE = ({"dtype": "float16"}, {"temperature": 1.0}, {"temperature": 2.0}, {"alpha": 1.0})
IN_CACHE = {"rows": 1024, "classes": 1000}  # the second base: it fits into the cache, so the arithmetic shows


def default_cases() -> list[Case]:
    """Shapes, factors around both bases, huge pages, a few cases on all threads, divergences, and linear heads."""
    settings = [{}]
    settings += [{"rows": n, "classes": c} for n, c in SHAPES]
    settings += FACTORS
    settings += [IN_CACHE | factor for factor in FACTORS if factor not in LIKE_THE_BASE]
    settings += [{"huge_pages": True}]
    settings += [{"rows": n, "classes": c, "threads": THREADS} for n, c in ((32, 10), (8192, 1000), (256, 128256))]
    settings += [factor | {"threads": THREADS} for factor in ({"dtype": "bfloat16"}, {"backward": False})]
    settings += [{"divergence": name} for name in DIVERGENCES]
    settings += [{"k": 64}]
    head = {"rows": 256, "classes": 32000, "hidden": 256}
    settings += [head, head | {"alpha": 0.0}]
    return _unique(settings)


def quick_cases() -> list[Case]:
    return _unique([{}, IN_CACHE, {"rows": 32, "classes": 10}])


def full_cases() -> list[Case]:
    """Every shape with every value of every factor; takes hours."""
    shapes = [{}] + [{"rows": n, "classes": c} for n, c in SHAPES]
    values = {f.name: [f.default] for f in fields(Case)}
    for factor in FACTORS:
        for name, value in factor.items():
            values[name].append(value)
    varied = {name: v for name, v in values.items() if len(v) > 1}
    crossed = [dict(zip(varied, choice, strict=True)) for choice in itertools.product(*varied.values())]
    return _unique([shape | choice for shape in shapes for choice in crossed])


def _unique(settings):
    return list(dict.fromkeys(Case(**values) for values in settings))
