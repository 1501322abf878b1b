"""Results as text for the terminal: a table per case, scaling, the smallest leads, and a comparison of two runs."""

from bench.cases import parse
from bench.contestants import LEGEND

# What a user would write without pydistill.
ALTERNATIVES = ("tutorial", "best eager", "compiled tutorial", "compiled best eager")
# Contestants that compute no loss, or are pydistill itself.
_NO_ALTERNATIVES = ("pydistill", "dense pydistill", "limit", "torch.add", "matrix products")


def heading(machine: dict) -> str:
    return "\n".join(
        [
            f"{machine['date']}: {machine['cpu']}, {machine['cores']} cores, {machine['system']}",
            f"Python {machine['python']}, torch {machine['torch']}, numpy {machine['numpy']}, numba {machine['numba']}"
            f", pydistill {machine['pydistill']}",
            f"backend {machine['backend']} ({machine['isa']}); huge pages: {_huge_pages(machine['huge pages'])}",
        ]
    )


def _huge_pages(setting: str) -> str:
    """Return the chosen value of a setting that Linux shows as ``always [madvise] never``."""
    return setting.partition("[")[2].partition("]")[0] or setting


def threads(result: dict) -> int:
    """Number of threads of a case. Older files have no such field; the number is then taken from the case's name."""
    return result.get("threads") or parse(result["name"]).threads


def legend() -> str:
    return "\n".join(f"  {name:28} {meaning}" for name, meaning in LEGEND.items())


def table(result: dict) -> str:
    """The table of one case: time, time / pydistill's time, peak memory and error of each contestant."""
    count = threads(result)
    lines = [
        f"\n{result['name']}  ({count} thread{'s' * (count > 1)}, {result['pairs']} rounds)",
        f"{'':28}{'ms':>10}{'/ pydistill':>13}{'quartiles':>17}{'/ in place':>12}{'buffers':>9}{'error':>10}",
    ]
    for name, c in result["contestants"].items():
        middle, low, high = c["over pydistill"]
        in_place = f"{c['over in place'][0]:.2f}" if c["over in place"] else ""
        buffers = "" if c["buffers"] is None else f"{c['buffers']:.2f}"
        error = f"{c['error']:.1e}" if c["error"] else ""
        spread = f"{low:.2f} - {high:.2f}"
        lines.append(f"{name:28}{c['ms']:10.3f}{middle:13.2f}{spread:>17}{in_place:>12}{buffers:>9}{error:>10}")
    lines += [f"{name:28} not measured: {reason}" for name, reason in result["missing"].items()]
    return "\n".join(lines)


def scaling(results: dict) -> str:
    lines = ["\nScaling: exponent x of time = constant * value^x, fitted over the upper half of the values"]
    for factor, sweep in results.items():
        values = ", ".join(map(str, sweep["values"]))
        exponents = [f"{name} {x:.2f}" for name, x in sweep["exponent"].items() if x is not None]
        lines.append(f"  {factor} {values} (first case {sweep['fixed']}): {', '.join(exponents) or 'only one value'}")
    return "\n".join(lines)


def leads(results: list[dict]) -> str:
    """List the alternatives that are faster than pydistill in any case, and the five smallest leads of pydistill."""
    faster, slower = ranking(results)
    lines = ["\nAlternatives that are faster than pydistill (their time / pydistill's time)"]
    lines += [_line(*entry) for entry in faster] or ["  none in this run"]
    lines += ["Smallest leads of pydistill"] + [_line(*entry) for entry in slower[:5]]
    return "\n".join(lines)


def ranking(results: list[dict]) -> tuple[list, list]:
    """Return ``(faster, slower)``: all alternatives as (time / pydistill's time, case, name), sorted."""
    entries = sorted(
        (c["over pydistill"][0], result["name"], name)
        for result in results
        for name, c in result["contestants"].items()
        if not name.startswith(_NO_ALTERNATIVES)
    )
    return [e for e in entries if e[0] < 1], [e for e in entries if e[0] >= 1]


def _line(ratio, case, name):
    return f"  {case:40} {name:22} {ratio:.2f}"


def compare(old: dict, new: dict) -> str:
    """Compare the cases that two runs share, by ratios within each run, because the speed of a machine changes."""
    before = {(result["name"], threads(result)): result["contestants"] for result in old["cases"]}
    shared = [result for result in new["cases"] if (result["name"], threads(result)) in before]
    if not shared:
        raise ValueError("the two files must have a case in common, with the same number of threads; they have none")
    lines = [
        "old: " + heading(old["machine"]).replace("\n", "\n     "),
        "new: " + heading(new["machine"]).replace("\n", "\n     "),
        f"\n{'case':40}{'contestant':28}{'old':>9}{'new':>9}{'change':>9}",
    ]
    for result in shared:
        earlier = before[result["name"], threads(result)]
        for name, c in result["contestants"].items():
            if name == "pydistill" or name not in earlier:
                continue
            was, low, high = earlier[name]["over pydistill"]
            is_, new_low, new_high = c["over pydistill"]
            apart = new_low > high or new_high < low
            note = ("  pydistill is faster" if is_ > was else "  pydistill is slower") if apart else ""
            lines.append(f"{result['name']:40}{name:28}{was:9.2f}{is_:9.2f}{is_ / was - 1:+9.1%}{note}")
    lines.append(
        "Each number is the time of the contestant / the time of pydistill. A note means that the quartiles of the two "
        "runs do not overlap."
    )
    return "\n".join(lines)
