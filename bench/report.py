"""Results as text: the table of a case, the README's table, where pydistill loses, and two runs compared."""

from bench.cases import parse
from bench.contestants import LEGEND
from pydistill.formulas import DIVERGENCES

# README's columns: what a user would otherwise write.
RIVALS = ("tutorial", "best eager", "compiled tutorial", "compiled best eager")
README_CASES = (
    "1024x32000",
    "256x128256",
    "8192x1000",
    "1024x1000",
    "32x10",
    "1024x32000,bfloat16",
    "1024x32000,forward",
)


def heading(machine: dict) -> str:
    return "\n".join(
        [
            f"{machine['date']}: {machine['cpu']}, {machine['cores']} cores, {machine['system']}",
            f"Python {machine['python']}, torch {machine['torch']}, numpy {machine['numpy']}, numba {machine['numba']}"
            f", pydistill {machine['pydistill']} on {machine['backend']} ({machine['isa']}); "
            f"huge pages: {machine['huge pages']}",
        ]
    )


def threads(result: dict) -> int:
    """The threads of a case; files written before there was a field for them say it in the name alone."""
    return result.get("threads") or parse(result["name"]).threads


def legend() -> str:
    return "\n".join(f"  {name:20} {what}" for name, what in LEGEND.items())


def table(result: dict) -> str:
    """One case: a line per contestant, how many times pydistill's time it takes, and what else was measured."""
    count = threads(result)
    lines = [
        f"\n{result['name']}  ({count} thread{'s' * (count > 1)}, {result['pairs']} pairs)",
        f"{'':22}{'ms':>10}{'/ pydistill':>13}{'quartiles':>17}{'/ in place':>12}{'N x C':>8}{'error':>10}",
    ]
    for name, c in result["contestants"].items():
        middle, low, high = c["over pydistill"]
        in_place = f"{c['over in place'][0]:.2f}" if c["over in place"] else ""
        buffers = "" if c["buffers"] is None else f"{c['buffers']:.2f}"
        error = f"{c['error']:.1e}" if c["error"] else ""
        spread = f"{low:.2f} - {high:.2f}"
        lines.append(f"{name:22}{c['ms']:10.3f}{middle:13.2f}{spread:>17}{in_place:>12}{buffers:>8}{error:>10}")
    lines += [f"{name:22} not measured: {reason}" for name, reason in result["missing"].items()]
    return "\n".join(lines)


def scaling(results: dict) -> str:
    lines = ["\nScaling: time ~ value ^ exponent, fitted over the upper half"]
    for factor, sweep in results.items():
        values = ", ".join(map(str, sweep["values"]))
        exponents = (f"{name} {x:.2f}" for name, x in sweep["exponent"].items() if x is not None)
        lines.append(
            f"  {factor:8} {values:36} from {sweep['fixed']:14} exponents: {', '.join(exponents) or 'one value'}"
        )
    return "\n".join(lines)


def losses(results: list[dict]) -> str:
    """Every case and contestant that beats pydistill, limits apart, and the smallest leads."""
    slower, leads = [], []
    for result in results:
        for name, c in result["contestants"].items():
            if name.startswith(("pydistill", "dense pydistill", "limit", "torch.add", "matrix products")):
                continue
            line = f"  {result['name']:40} {name:22} takes {c['over pydistill'][0]:.2f} x pydistill's time"
            (slower if c["over pydistill"][0] < 1 else leads).append((c["over pydistill"][0], line))
    text = ["\nWhere it loses"]
    text += [line for _, line in sorted(slower)] or ["  to no contestant in this run"]
    text += ["Smallest leads"] + [line for _, line in sorted(leads)[:5]]
    return "\n".join(text)


def markdown(results: list[dict]) -> str:
    """The README's tables: times that each way of writing the loss takes, over pydistill's; and the divergences."""
    by_name = {result["name"]: result["contestants"] for result in results}
    columns = [f"{name}: {LEGEND[name]}" for name in RIVALS]
    columns += ["in place, against the tutorial", "new memory over kept", "memory", "error"]
    lines = ["| case | " + " | ".join(columns) + " |", "|---" * (len(columns) + 1) + "|"]
    for case in README_CASES:
        if case not in by_name:
            continue
        all_ = by_name[case]
        cells = [f"{all_[name]['over pydistill'][0]:.1f}" for name in RIVALS]
        in_place = all_["tutorial"]["over in place"]
        cells.append(f"{in_place[0]:.1f}" if in_place else "")
        new = all_.get("pydistill, new memory")
        cells.append(f"{new['over pydistill'][0]:.1f}" if new else "")
        buffers = [all_[name]["buffers"] for name in ("tutorial", "pydistill", "pydistill in place") if name in all_]
        cells.append(", ".join(f"{b:.1f}" for b in buffers) if None not in buffers else "")
        cells.append(f"{all_['tutorial']['error']:.0e}, {all_['pydistill']['error']:.0e}")
        lines.append(f"| {case} | " + " | ".join(cells) + " |")
    lines += ["", "| 1024x32000, in place, against | best eager form | torch.compile of it |", "|---|---|---|"]
    for case, all_ in by_name.items():
        name = case.removeprefix("1024x32000,")
        if name in DIVERGENCES or name == "k=64":
            cells = [all_[n]["over in place"][0] if n in all_ else None for n in ("best eager", "compiled best eager")]
            lines.append(f"| {name} | " + " | ".join("" if x is None else f"{x:.1f}" for x in cells) + " |")
    return "\n".join(lines + _heads(by_name))


def _heads(by_name):
    """Behind a linear head: linear_distillation_loss, whose time is mostly that of the matrix products."""
    columns = ["tutorial", "compiled tutorial", "linear_cross_entropy", "liger", "matrix products"]
    lines = ["", "| behind a linear head, against | " + " | ".join(columns) + " | memory |", "|---" * 7 + "|"]
    for case, all_ in by_name.items():
        if "hidden=" not in case:
            continue
        cells = [f"{all_[name]['over pydistill'][0]:.2f}" if name in all_ else "" for name in columns]
        buffers = [all_[name]["buffers"] for name in ("tutorial", "pydistill")]
        cells.append(", ".join(f"{b:.1f}" for b in buffers) if None not in buffers else "")
        lines.append(f"| {case} | " + " | ".join(cells) + " |")
    return lines if len(lines) > 3 else []


def compare(old: dict, new: dict) -> str:
    """The same cases in two runs. Ratios to the other contestants of the same run, since machines' speeds move."""
    before = {(result["name"], threads(result)): result["contestants"] for result in old["cases"]}
    lines = [
        "old: " + heading(old["machine"]).replace("\n", "\n     "),
        "new: " + heading(new["machine"]).replace("\n", "\n     "),
        f"\n{'case':40}{'contestant':22}{'old':>9}{'new':>9}{'change':>9}",
    ]
    for result in new["cases"]:
        key = result["name"], threads(result)
        for name, c in result["contestants"].items():
            if name == "pydistill" or name not in before.get(key, {}):
                continue
            was, low, high = before[key][name]["over pydistill"]
            is_, new_low, new_high = c["over pydistill"]
            apart = new_low > high or new_high < low
            note = ("  pydistill is faster" if is_ > was else "  pydistill is slower") if apart else ""
            lines.append(f"{result['name']:40}{name:22}{was:9.2f}{is_:9.2f}{is_ / was - 1:+9.1%}{note}")
    shared = before.keys() & {(result["name"], threads(result)) for result in new["cases"]}
    if not shared:
        raise ValueError("the two files have no case in common")
    lines.append(
        "Each figure is the contestant's time over pydistill's. A note stands where the quartiles do not overlap."
    )
    return "\n".join(lines)
