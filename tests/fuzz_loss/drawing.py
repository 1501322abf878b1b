"""Random calls. Everything comes from one random.Random and a numpy generator seeded by it: a seed is a call."""

import math
import random

import numpy as np
import torch

from pydistill.formulas import DIVERGENCES

from .case import LAYOUTS, Case, Head, Placed, Teacher
from .definitions import DEFINITIONS, resolve

DTYPES = (torch.float32, torch.float32, torch.float32, torch.float64, torch.bfloat16, torch.float16)
FUNCTIONS = ("distillation_loss",) * 14 + ("DistillationLoss",) + ("linear_distillation_loss",) * 3
FUNCTIONS += ("LinearDistillationLoss", "loss_items")
SMALL = (1, 2, 3, 4, 5, 7, 8, 9)
WIDTHS = (15, 16, 17, 31, 32, 33, 63, 64, 65)
BLOCKS = (255, 256, 257, 511, 512, 513, 1023, 1024, 1025, 2047, 2049)


def draw(seed: str) -> Case:
    """The call of a seed."""
    return _Drawing(seed).case()


class _Drawing:
    def __init__(self, seed):
        self.random = random.Random(seed)
        self.numbers = np.random.default_rng(self.random.getrandbits(64))

    def chance(self, probability):
        return self.random.random() < probability

    def of(self, *choices):
        return self.random.choice(choices)

    def log_uniform(self, least, most):
        return math.exp(self.random.uniform(math.log(least), math.log(most)))

    # --- The call -------------------------------------------------------------------------------------------

    def case(self):
        function = self.random.choice(FUNCTIONS)
        rows, classes = self.shape()
        dtype = self.random.choice(DTYPES)
        if function == "loss_items":
            return self.items(rows, classes)
        options = self.options(dtype)
        linear = "inear" in function
        path = self.random.choices(("engine", "functorch", "create_graph", "no gradient"), (78, 10, 5, 7))[0]
        student, teacher_values = self.logits(rows, classes)
        head, placed = None, None
        if linear or path == "create_graph":  # what is overwritten has no second derivative
            options.pop("inplace", None)
        if linear:
            head = self.head(rows, classes, dtype)
            if self.chance(0.3):
                options["chunk_rows"] = self.of(1, 2, 3, 100)
            if self.chance(0.15):
                options["softcap"] = self.of(5.0, 30.0, 2.5)
            if self.chance(0.15):
                options["logit_scale"] = self.of(0.0625, 0.7, 2.0)
        else:
            placed = self.place(student.to(dtype), overlap=not options.get("inplace"))
        teacher = None
        alpha = float(options.get("alpha", 0.5))
        if alpha > 0 or self.chance(0.5):
            teacher = self.teacher(teacher_values, dtype, linear, options)
        of_label = DEFINITIONS[options.get("divergence", "forward_kl")].of_label
        labels = self.labels(rows, classes, options, needed=alpha < 1 or of_label)
        if labels is None or alpha == 0:
            options.pop("unlabeled", None) if of_label else None
        case = Case(
            function,
            path,
            placed,
            head,
            teacher,
            labels,
            self.sample_weight(rows),
            self.class_weight(classes),
            options,
            # Through a graph the gradients of elements that share memory would add up.
            leaf=not options.get("inplace") and (self.chance(0.7) or (placed is not None and placed.overlaps)),
        )
        return self.with_grad_output(case)

    def with_grad_output(self, case):
        dtype = torch.float64 if case.dtype == torch.float64 else torch.float32
        grad_output = self.of(1.0, 1.0, 1.0, -2.5, 1024.0, 0.3)
        if case.option("reduction") == "none" and self.chance(0.7):
            grad_output = torch.from_numpy(self.numbers.normal(size=case.rows)).to(dtype)
        return type(case)(**(vars(case) | {"grad_output": grad_output}))

    def items(self, rows, classes):
        options = {}
        if self.chance(0.3):
            options["ignore_index"] = self.of(0, -1, classes - 1)
        if self.chance(0.4):
            options["unlabeled"] = "distill"
        sample_weight = self.sample_weight(rows)
        labels = self.labels(rows, classes, options, needed=sample_weight is None)
        return Case(
            "loss_items",
            labels=labels,
            sample_weight=sample_weight,
            class_weight=self.class_weight(classes),
            options=options,
        )

    def shape(self):
        """(rows' shape, classes)."""
        kind = self.random.random()
        if kind < 0.02:  # large enough for two threads
            return (self.of(40, 33),), self.of(2048, 2049)
        if kind < 0.55:
            classes, n = self.random.choice(SMALL), self.of(1, 1, 2, 3, 4, 6, 9)
        elif kind < 0.85:
            classes, n = self.random.choice(WIDTHS), self.of(1, 2, 3, 4, 6)
        else:
            classes, n = self.random.choice(BLOCKS), self.of(1, 1, 2, 3)
        if self.chance(0.03):
            return self.of((0,), (2, 0), (0, 3)), classes
        if n == 1 and self.chance(0.3):
            return (), classes
        if n in (4, 6, 9) and self.chance(0.6):
            return {4: (2, 2), 6: self.of((2, 3), (3, 1, 2)), 9: (3, 3)}[n], classes
        return (n,), classes

    def options(self, dtype):
        options = {}
        divergence = self.random.choice(tuple(DIVERGENCES))
        if divergence != "forward_kl":
            options["divergence"] = divergence
        if DIVERGENCES[divergence].beta is not None and self.chance(0.75):
            options["beta"] = self.beta(divergence)
        temperature = self.of(1.0, 1.0, 2.0, 4.0, 2.5, self.log_uniform(0.05, 1000), self.log_uniform(0.3, 20), 3)
        if temperature != 1.0:
            options["temperature"] = temperature
        if self.chance(0.6):
            options["alpha"] = self.of(0.0, 1.0, 1.0, 0.7, self.random.random(), 1e-3, 1)
        for name in ("temperature", "alpha"):
            if name in options and self.chance(0.08):
                options[name] = torch.tensor(options[name], dtype=self.of(torch.float32, torch.float64))
        if self.chance(0.15):
            options["t_squared"] = False
        if self.chance(0.2):
            options["ignore_index"] = self.of(0, -1, 1, 255, 2**40)
        if self.chance(0.25) and (not DEFINITIONS[divergence].of_label or float(options.get("alpha", 0.5)) == 0):
            options["unlabeled"] = "distill"
        if self.chance(0.25):
            options["label_smoothing"] = self.of(0.1, 1.0, 0.01, self.random.random())
        if self.chance(0.5):
            options["reduction"] = self.of("none", "sum", "mean", "none")
        if options.get("reduction", "mean") == "mean" and self.chance(0.2):
            options["num_items"] = self.num_items()
        if self.chance(0.12):
            options["inplace"] = True
        if self.chance(0.5):
            options["return_metrics"] = True
        return options

    def beta(self, divergence):
        if DIVERGENCES[divergence].largest_beta > 1:
            return self.of(0.0, 0, 1.0, 0.25, 8, self.log_uniform(1e-12, 1e3))
        small = self.log_uniform(1e-12, 0.5)
        return self.of(0.0, 1.0, 0.5, self.random.random(), small, 1 - small, 1e-12, 1 - 1e-12, 1)

    def num_items(self):
        number = self.of(0, 1, 7, 0.25, 1e6, 3.5)
        kind = self.random.random()
        if kind < 0.5:
            return number
        if kind < 0.65:
            return torch.tensor(number)
        other = self.of(0, 2, 11.5)
        return self.of((number, other), (other, number), (torch.tensor(number), other))

    # --- Logits ---------------------------------------------------------------------------------------------

    def logits(self, rows, classes):
        """(student, teacher) in float64."""
        n = math.prod(rows)
        student, teacher = self.pair(n, classes)
        for logits, other in ((student, teacher), (teacher, student)):
            if self.chance(0.12) and n:
                self.spoil(logits, other)
        shape = (*rows, classes)
        return torch.from_numpy(student).reshape(shape), torch.from_numpy(teacher).reshape(shape)

    def pair(self, n, classes):
        normal = self.numbers.normal
        scale = self.of(0.01, 1.0, 3.0, 3.0, 10.0, 100.0)
        size = (n, classes)
        kind = self.random.randrange(17)
        teacher = scale * normal(size=size)
        if kind < 4:
            return scale * normal(size=size), teacher
        if kind == 4:
            return teacher + 10.0 ** self.random.randint(-8, -1) * normal(size=size), teacher
        if kind == 5:
            return teacher.copy(), teacher
        if kind == 6:  # peaked
            student = normal(size=size)
            height = self.of(20.0, 40.0, 90.0, 300.0)
            at = self.numbers.integers(classes, size=(2, n))
            student[np.arange(n), at[0]] = height
            teacher[np.arange(n), at[self.of(0, 1)]] = height
            return student, teacher
        if kind == 7:  # flat
            return np.full(size, self.of(0.0, -3.0, 1e4)), teacher if self.chance(0.5) else np.full(size, 5.0)
        if kind == 8:  # tied
            return tuple(self.numbers.integers(-2, 3, size=size).astype(float) for _ in range(2))
        if kind == 9:  # far from 0
            return normal(size=size) + self.of(1e4, -1e4), teacher + self.of(1e4, -1e4, 300.0)
        if kind == 10:  # huge
            return 1e4 * normal(size=size), 1e4 * normal(size=size)
        if kind == 11:  # a maximum that moves
            ramp = np.linspace(-30, 30, classes)
            return ramp + 0.1 * normal(size=size), (ramp if self.chance(0.5) else ramp[::-1]) + 0.1 * normal(size=size)
        if kind == 12:  # denormals of float32 or float64, and of float16
            tiny = self.of(1e-40, 1e-310, 1e-6)
            return tiny * normal(size=size), tiny * normal(size=size)
        if kind == 13:  # masked in both
            student = scale * normal(size=size)
            masked = self.numbers.random(classes) < self.of(0.2, 0.9)
            masked[self.random.randrange(classes)] = False
            fill = self.of(-math.inf, -1e4, -1e30)
            student[:, masked] = teacher[:, masked] = fill
            return student, teacher
        if kind == 14:  # far apart on two classes
            student = scale * normal(size=size)
            at = self.numbers.integers(classes, size=2)
            student[:, at[0]], teacher[:, at[1]] = self.of((1e4, 1e4), (1e4, -1e4), (-1e4, 1e4), (30, 30))
            return student, teacher
        if kind == 15:  # both about one peak: a rest that must not be lost
            student = normal(size=size)
            at = self.random.randrange(classes)
            student[:, at], teacher[:, at] = self.of((25, 20), (40, 45), (90, 90), (18, 1))
            return student, teacher
        student = scale * normal(size=size)  # differences that cancel
        shift = self.of(0.5, 7.0, 1e3)
        return student + shift, student if self.chance(0.5) else teacher

    def spoil(self, logits, other):
        """Special values in some places of some rows."""
        n, classes = logits.shape
        value = self.of("nan", "inf", "-inf", "-inf", "-inf", "max", "min", "-inf row", "min row", "zero")
        number = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf, "max": 1e300, "min": -1e300, "zero": 0.0}
        rows = [r for r in range(n) if self.chance(0.5)] or [self.random.randrange(n)]
        for row in rows[:8]:
            if value.endswith("row"):
                logits[row] = -math.inf if value == "-inf row" else -1e300
                continue
            for _ in range(self.of(1, 1, 2, max(1, classes // 2))):
                logits[row, self.random.randrange(classes)] = number[value]

    def cast(self, values, dtype):
        """To a dtype; 1e300 stands for the largest number of any."""
        info = torch.finfo(dtype)
        finite = values.isfinite()
        return torch.where(finite, values.clamp(info.min, info.max), values).to(dtype)

    def place(self, values, overlap=True, classes_differ=False):
        if self.chance(0.55):
            return Placed(values)
        names = [n for n, (_, dims, overlaps) in LAYOUTS.items() if values.dim() >= dims and (overlap or not overlaps)]
        layout = self.random.choice(names)
        if classes_differ and layout in ("windows", "one class for all"):
            return Placed(values)
        if LAYOUTS[layout][2] and values.numel():
            if not Placed(values, layout).holds():
                return Placed(values)
            values = Placed(values, layout).tensor().contiguous().clone()
        placed = Placed(values, layout)
        return placed if placed.fits() else Placed(values)

    # --- Other tensors --------------------------------------------------------------------------------------

    def teacher(self, values, dtype, linear, options):
        dtype = self.of(dtype, dtype, *DTYPES)
        divergence = options.get("divergence", "forward_kl")
        beta = options.get("beta")
        rows, classes = values.shape[:-1], values.shape[-1]
        forms = ["logits"] * 8 + ["from_logits"]
        if DIVERGENCES[divergence].zeros:
            forms += ["from_probs", "from_log_probs"]
        tails = DIVERGENCES[resolve(divergence, beta)[0]].top_k
        if tails:
            forms += ["from_topk", "top_k"] * 2
        if linear:
            forms += ["LinearTeacher"] * 6
        form = self.random.choice(forms)
        temperature = float(options.get("temperature", 1.0))
        if form == "LinearTeacher":
            head = self.head(rows, classes, dtype)
            cap, scale = (self.of(None, None, 20.0), self.of(1.0, 1.0, 0.5))
            return Teacher(form, head.hidden, weight=head.weight, bias=head.bias, softcap=cap, logit_scale=scale)
        cast = self.cast(values, dtype)
        if form in ("from_probs", "from_log_probs"):
            log_probs = values.nan_to_num(0.0, 0.0, -math.inf).clamp(max=1e30)
            log_probs[..., 0] = log_probs[..., 0].clamp(min=-1e30)  # no row without mass
            log_probs = log_probs.log_softmax(-1)
            if form == "from_log_probs":
                return Teacher(form, self.place(self.cast(log_probs, dtype)))
            probs = log_probs.exp()
            half = probs.to(dtype)
            if not ((half.double().sum(-1) - 1).abs() < 5e-4).all():
                probs = torch.zeros_like(probs)
                probs[..., self.random.randrange(classes)] = 1
            return Teacher(form, self.place(probs.to(dtype), classes_differ=True))
        if form in ("from_topk", "top_k"):
            k = self.of(1, classes, min(classes, 2), min(classes, 5), self.random.randint(1, classes))
            tail = self.random.choice(tails)
            if form == "top_k":
                times = (temperature, 7.5) if self.chance(0.5) else (temperature,)
                return Teacher(form, self.place(cast), k=k, temperatures=times, tail=tail)
            return self.from_topk(cast, k, tail, temperature)
        return Teacher(form, self.place(cast))

    def from_topk(self, logits, k, tail, temperature):
        """k classes in any order, not always the largest."""
        classes = logits.shape[-1]
        order = logits.nan_to_num(0.0).argsort(-1, descending=True)[..., :k]
        other = torch.from_numpy(np.argsort(self.numbers.random(logits.shape), -1))[..., :k]
        if self.chance(0.3) and bool(logits.gather(-1, other).isfinite().any(-1).all()):
            order = other
        order = order[..., self.numbers.permutation(k)]
        values = self.place(logits.gather(-1, order))
        if values.overlaps:  # its numbers were changed
            logits = logits.scatter(-1, order, values.values)
        partition = (logits.double() / temperature).logsumexp(-1)
        partitions = {temperature: partition} if tail == "bucket" or self.chance(0.3) else {}
        indices = order.to(self.of(torch.int64, torch.int32)).contiguous()
        return Teacher(
            "from_topk",
            values,
            indices=self.place(indices, classes_differ=True),
            num_classes=classes,
            partitions=partitions,
            tail=tail,
        )

    def head(self, rows, classes, dtype):
        """Mostly of numbers with few digits, whose products are exact; then the logits are known to the bit."""
        size = self.of(1, 2, 3, 8)
        exact = self.chance(0.75)

        def numbers(*shape):
            if exact:
                return torch.from_numpy(self.numbers.integers(-24, 25, size=shape) / self.of(8.0, 4.0)).to(dtype)
            return torch.from_numpy(self.numbers.normal(size=shape)).to(dtype)

        hidden = numbers(*rows, size)
        if self.chance(0.04) and hidden.numel():
            hidden.view(-1)[self.random.randrange(hidden.numel())] = math.nan
        bias = self.place(numbers(classes)) if self.chance(0.4) else None
        return Head(self.place(hidden), self.place(numbers(classes, size)), bias)

    def labels(self, rows, classes, options, needed):
        if not needed and self.chance(0.4):
            return None
        ignore = options.get("ignore_index", -100)
        labels = self.numbers.integers(classes, size=rows)
        dtype = self.of(torch.int64, torch.int64, torch.int32)
        if self.chance(0.4) and abs(ignore) < 2**31:
            share = self.of(0.2, 0.3, 0.7, 1.0)
            labels = np.where(self.numbers.random(rows) < share, ignore, labels)
        return self.place(torch.from_numpy(np.asarray(labels)).to(dtype))

    def sample_weight(self, rows):
        if self.chance(0.7):
            return None
        weight = self.numbers.random(rows) * self.of(1.0, 3.0, 1e-3, 1e4)
        weight = np.where(self.numbers.random(rows) < self.of(0.0, 0.0, 0.3, 0.3, 1.0), 0.0, weight)
        dtype = self.of(torch.float32, torch.float32, torch.float64, torch.float16, torch.bfloat16)
        return self.place(torch.from_numpy(np.asarray(weight)).to(dtype))

    def class_weight(self, classes):
        if self.chance(0.75):
            return None
        weight = self.numbers.random(classes) * self.of(1.0, 2.0, 100.0)
        weight = np.where(self.numbers.random(classes) < self.of(0.0, 0.0, 0.3), 0.0, weight)
        return self.place(torch.from_numpy(weight).to(self.of(torch.float32, torch.float32, torch.float64)))
