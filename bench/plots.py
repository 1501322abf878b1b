"""Plots of the results: speed-up, distance from the memory limit and peak memory by shape, and scaling."""

from pathlib import Path

from bench.cases import Case, parse
from bench.contestants import LEGEND
from bench.report import ALTERNATIVES, threads

# The Okabe-Ito colours, which colour-blind readers can tell apart; compiled formulas are hatched as well.
_STYLE = {
    "tutorial": {"color": "#0072B2"},
    "best eager": {"color": "#56B4E9"},
    "compiled tutorial": {"color": "#D55E00", "hatch": "///"},
    "compiled best eager": {"color": "#E69F00", "hatch": "///"},
    "pydistill": {"color": "#009E73"},
    "pydistill in place": {"color": "#000000"},
}
_SETTING = "float32, forward and backward, T = 4, alpha = 0.7, one thread"


def save(results: dict, folder: Path) -> list[Path]:
    """Write a PNG for each plot for which there are results, and return their paths."""
    import matplotlib

    matplotlib.use("Agg")
    shapes = [r for r in results["cases"] if threads(r) == 1 and _is_shape(parse(r["name"]))]
    shapes.sort(key=lambda r: parse(r["name"]).elements)
    figures = {}
    if shapes:
        figures["speedup.png"] = _speedup(shapes)
    with_limit = [r for r in shapes if "limit" in r["contestants"]]
    if with_limit:
        figures["limit.png"] = _memory_limit(with_limit)
    with_memory = [r for r in shapes if r["contestants"]["pydistill"]["buffers"] is not None]
    if with_memory:
        figures["memory.png"] = _memory(with_memory)
    if results.get("scaling"):
        figures["scaling.png"] = _scaling(results["scaling"])
    paths = []
    for name, figure in figures.items():
        figure.text(0.99, 0.01, _machine(results["machine"]), fontsize=7.5, ha="right", va="bottom", color="0.35")
        figure.savefig(folder / name, dpi=200)
        paths.append(folder / name)
    return paths


def _is_shape(case):
    return case == Case(rows=case.rows, classes=case.classes)


def _machine(machine):
    versions = f"torch {machine['torch']}, pydistill {machine['pydistill']} ({machine['backend']}, {machine['isa']})"
    return f"{machine['cpu']}, {machine['cores']} cores; {versions}; {machine['date'][:10]}"


def _figure(title, setting, columns=1, **options):
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5.2))
    axes = figure.subplots(1, columns, squeeze=False, **options)[0]
    figure.subplots_adjust(bottom=0.19, top=0.74, left=0.1, right=0.98, wspace=0.08)
    figure.text(0.02, 0.965, title, fontsize=13, weight="bold", va="top")
    figure.text(0.02, 0.91, setting, fontsize=9.5, va="top", color="0.25")
    for a in axes:
        a.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _legend(figure, axes, columns):
    figure.legend(
        *axes.get_legend_handles_labels(),
        loc="upper left",
        bbox_to_anchor=(0.015, 0.845),
        ncols=columns,
        fontsize=9,
        frameon=False,
        columnspacing=1.2,
    )


def _bars(axes, results, names, value, *, bottom=0.0, text=None):
    """Groups of bars: a group per case, a bar per contestant. ``value`` gives (height, low, high) or None."""
    width = 0.84 / len(names)
    for k, name in enumerate(names):
        found = [(i, value(r["contestants"], name)) for i, r in enumerate(results)]
        found = [(i + (k - (len(names) - 1) / 2) * width, v) for i, v in found if v is not None]
        at, heights = [i for i, _ in found], [v[0] for _, v in found]
        style = _STYLE[name] | {"edgecolor": "white", "linewidth": 0.4}
        axes.bar(at, [h - bottom for h in heights], width, bottom=bottom, label=_label(name), **style)
        errors = [[h - low for h, low, _ in (v for _, v in found)], [high - h for h, _, high in (v for _, v in found)]]
        if any(map(any, errors)):
            axes.errorbar(at, heights, errors, fmt="none", ecolor="black", elinewidth=0.7, capsize=1.2)
        if text:
            for x, height in zip(at, heights, strict=True):
                axes.annotate(text(height), (x, height), (0, 2), textcoords="offset points", ha="center", fontsize=8)
    axes.set_xticks(range(len(results)), [_shape(r["name"]) for r in results], fontsize=9)
    axes.tick_params(axis="x", length=0)
    axes.set_xlabel("shape of the logits: rows x classes", fontsize=10)


def _shape(name):
    case = parse(name)
    return f"{case.rows:,}\nx {case.classes:,}"


def _label(name):
    return f"{name}: {LEGEND[name]}" if name in ("tutorial", "best eager") else name


def _speedup(results):
    figure, (axes,) = _figure(
        "Speed-up of pydistill: time of the alternative / time of pydistill",
        f"{_SETTING}\nBars: median of the ratios, round by round; black lines: first to third quartile",
    )
    names = [n for n in ALTERNATIVES if any(n in r["contestants"] for r in results)]
    axes.set_yscale("log")
    _bars(axes, results, names, lambda c, name: c[name]["over pydistill"] if name in c else None, bottom=1)
    ticks = [1, 2, 5, 10, 20, 50, 100]
    axes.set_yticks(ticks, [f"{t} x" for t in ticks])
    axes.minorticks_off()
    axes.grid(axis="y", color="0.88")
    axes.set_axisbelow(True)
    axes.axhline(1, color="black", linewidth=0.8)
    axes.set_ylabel("times as fast (log scale)", fontsize=10)
    _legend(figure, axes, 2)
    return figure


def _memory_limit(results):
    figure, (axes,) = _figure(
        "How close pydistill is to the memory limit",
        f"Time to move the data / time of pydistill. {_SETTING}\n"
        "100 %: the loss and its gradient take no longer than reading the inputs and writing the gradient",
    )
    series = {
        "pydistill": ("gradient in a buffer of its own: c = a + b", "limit", "over pydistill"),
        "pydistill in place": ("in place (inplace=True): a = a + b", "limit in place", "over in place"),
    }
    width = 0.4
    for k, (style, (label, name, ratio)) in enumerate(series.items()):
        share = [100 * r["contestants"][name][ratio][0] if name in r["contestants"] else 0 for r in results]
        at = [i + (k - 0.5) * width for i in range(len(results))]
        axes.bar(at, share, width, label=label, color=_STYLE[style]["color"], edgecolor="white", linewidth=0.4)
        for x, y in zip(at, share, strict=True):
            axes.annotate(f"{y:.0f}", (x, y), (0, 2), textcoords="offset points", ha="center", fontsize=8.5)
    axes.set_xticks(range(len(results)), [_shape(r["name"]) for r in results], fontsize=9)
    axes.tick_params(axis="x", length=0)
    axes.set_xlabel("shape of the logits: rows x classes", fontsize=10)
    axes.set_ylim(0, 112)
    axes.axhline(100, color="black", linewidth=0.8, linestyle="--")
    axes.text(-0.4, 101, "memory limit", fontsize=9, va="bottom")
    axes.set_ylabel("share of the memory limit, %", fontsize=10)
    _legend(figure, axes, 2)
    return figure


def _memory(results):
    figure, (axes,) = _figure(
        "Peak memory of one step, above the memory of its inputs",
        f"{_SETTING}\n1 buffer: rows x classes numbers, the size of the student's logits",
    )
    names = [
        n for n in (*ALTERNATIVES, "pydistill", "pydistill in place") if any(n in r["contestants"] for r in results)
    ]

    def buffers(contestants, name):
        return (contestants[name]["buffers"],) * 3 if name in contestants else None

    _bars(axes, results, names, buffers, text=lambda x: f"{x:.1f}")
    axes.set_ylabel("buffers of the logits' size", fontsize=10)
    _legend(figure, axes, 3)
    return figure


def _scaling(sweeps):
    figure, all_axes = _figure(
        "Time of a step as the batch grows, and with more threads",
        "float32, forward and backward, T = 4, alpha = 0.7\n"
        "Exponent x: fit of time = constant * size^x to the upper half of the sizes",
        columns=len(sweeps),
        sharey=True,
    )
    for axes, (factor, sweep) in zip(all_axes, sweeps.items(), strict=True):
        for name, ms in sweep["ms"].items():
            color, marker = _STYLE[name]["color"], "s" if name == "pydistill" else "o"
            axes.loglog(sweep["values"], ms, marker=marker, color=color, label=_label(name))
            below = name == "pydistill"
            axes.text(
                0.96,
                0.04 if below else 0.97,
                f"{name}: {_growth(factor, sweep, name)}",
                color=color,
                fontsize=9,
                transform=axes.transAxes,
                ha="right",
                va="bottom" if below else "top",
            )
        axes.minorticks_off()
        if factor == "threads":
            axes.set_xticks(sweep["values"], sweep["values"])
        else:
            axes.xaxis.set_major_formatter("{x:,.0f}")
        axes.set_xlabel(_axis(factor, parse(sweep["fixed"])), fontsize=10)
        axes.grid(color="0.9")
    all_axes[0].yaxis.set_major_formatter("{x:,g}")
    low, high = all_axes[0].get_ylim()
    all_axes[0].set_ylim(low / 2.5, high * 2.5)
    all_axes[0].set_ylabel("time, ms (log scale)", fontsize=10)
    _legend(figure, all_axes[0], 2)
    return figure


def _growth(factor, sweep, name):
    if factor == "threads":
        ms, values = sweep["ms"][name], sweep["values"]
        return f"speed-up {ms[0] / ms[-1]:.1f} with {values[-1]}" if len(values) > 1 else "one thread only"
    return f"exponent {sweep['exponent'][name]:.2f}"


def _axis(factor, first):
    others = {
        "rows": f"rows (x {first.classes:,} classes)",
        "classes": f"classes (x {first.rows:,} rows)",
        "threads": f"threads ({first.rows:,} x {first.classes:,} logits)",
    }
    return others[factor]
