"""Results as pictures: speed-up, share of the limit and memory by shape, and scaling."""

from pathlib import Path

from bench.cases import Case, parse
from bench.report import RIVALS, heading, threads


def save(results: dict, folder: Path) -> list[Path]:
    """Write the PNGs that the results suffice for; their paths."""
    import matplotlib

    matplotlib.use("Agg")
    shapes = [r for r in results["cases"] if threads(r) == 1 and _is_shape(parse(r["name"]))]
    shapes.sort(key=lambda r: parse(r["name"]).elements)
    figures = {}
    if shapes:
        figures["speedup.png"] = _speedup(shapes)
        figures["limit.png"] = _share_of_limit(shapes)
    with_memory = [r for r in shapes if r["contestants"]["pydistill"]["buffers"] is not None]
    if with_memory:
        figures["memory.png"] = _memory(with_memory)
    if results.get("scaling"):
        figures["scaling.png"] = _scaling(results["scaling"])
    paths = []
    for name, figure in figures.items():
        figure.text(0.01, 0.01, heading(results["machine"]), fontsize=6, va="bottom")
        figure.savefig(folder / name, dpi=150)
        paths.append(folder / name)
    return paths


def _is_shape(case):
    return case == Case(rows=case.rows, classes=case.classes)


def _axes(title, label, columns=1):
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 4.8))
    axes = figure.subplots(1, columns, squeeze=False)[0]
    figure.subplots_adjust(bottom=0.25, top=0.9, left=0.09, right=0.98)
    figure.suptitle(title)
    for a in axes:
        a.set_ylabel(label)
    return figure, axes


def _bars(axes, results, names, value):
    names = [n for n in names if any(n in r["contestants"] for r in results)]
    width = 0.8 / len(names)
    for k, name in enumerate(names):
        at = [i + (k - (len(names) - 1) / 2) * width for i in range(len(results))]
        axes.bar(at, [value(r["contestants"].get(name), r) for r in results], width, label=name)
    axes.set_xticks(range(len(results)), [r["name"] for r in results], rotation=20)
    axes.legend()


def _speedup(results):
    figure, (axes,) = _axes("Forward + backward, T = 4, both terms, float32, one thread", "times pydistill's time")
    _bars(axes, results, RIVALS, lambda c, r: c["over pydistill"][0] if c else 0)
    axes.axhline(1, color="black", linewidth=0.8)
    return figure


def _share_of_limit(results):
    figure, (axes,) = _axes("How near to the limit of memory: its time over pydistill's", "share of the limit")
    for label, name, ratio in (
        ("gradient beside the logits: c = a + b", "limit", "over pydistill"),
        ("in place: a = a + b", "limit in place", "over in place"),
    ):
        share = [r["contestants"][name][ratio][0] if name in r["contestants"] else 0 for r in results]
        axes.plot(range(len(results)), share, "o-", label=label)
    axes.set_xticks(range(len(results)), [r["name"] for r in results], rotation=20)
    axes.set_ylim(0, 1)
    axes.legend()
    return figure


def _memory(results):
    figure, (axes,) = _axes("Peak memory of one step above its inputs", "N x C buffers")
    _bars(axes, results, (*RIVALS, "pydistill", "pydistill in place"), lambda c, r: c["buffers"] if c else 0)
    return figure


def _scaling(sweeps):
    figure, all_axes = _axes("Scaling, float32, forward + backward", "ms", columns=len(sweeps))
    for axes, (factor, sweep) in zip(all_axes, sweeps.items(), strict=True):
        for name, ms in sweep["ms"].items():
            exponent = sweep["exponent"][name]
            axes.loglog(sweep["values"], ms, "o-", label=name if exponent is None else f"{name}: ^{exponent:.2f}")
        axes.set_xlabel(factor)
        axes.legend()
    return figure
