"""Results as text: the table of a case, the README's table, where pydistill loses, and two runs compared."""

from bench.contestants import LEGEND

# README's columns: what a user would otherwise write.
RIVALS = ("tutorial", "best eager", "compiled tutorial", "compiled best eager")


def heading(machine: dict) -> str:
    return "\n".join(
        [
            f"{machine['date']}: {machine['cpu']}, {machine['cores']} cores, {machine['system']}",
            f"Python {machine['python']}, torch {machine['torch']}, numpy {machine['numpy']}, numba {machine['numba']}"
            f", pydistill {machine['pydistill']} on {machine['backend']} ({machine['isa']}); "
            f"huge pages: {machine['huge pages']}",
        ]
    )


def legend() -> str:
    return "\n".join(f"  {name:20} {what}" for name, what in LEGEND.items())


def table(result: dict) -> str:
    """One case: a line per contestant, how many times pydistill's time it takes, and what else was measured."""
    lines = [
        f"\n{result['name']}  ({result['pairs']} pairs)",
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
            if name.startswith(("pydistill", "limit", "torch.add")):
                continue
            line = f"  {result['name']:40} {name:22} takes {c['over pydistill'][0]:.2f} x pydistill's time"
            (slower if c["over pydistill"][0] < 1 else leads).append((c["over pydistill"][0], line))
    text = ["\nWhere it loses"]
    text += [line for _, line in sorted(slower)] or ["  to no contestant in this run"]
    text += ["Smallest leads"] + [line for _, line in sorted(leads)[:5]]
    return "\n".join(text)


def markdown(results: list[dict]) -> str:
    """The README's table: per case, how many times faster pydistill is than each way of writing the loss."""
    lines = [
        "| case | "
        + " | ".join(RIVALS)
        + " | in place, against the first | N x C buffers: tutorial, pydistill, in place |",
        "|---" * (len(RIVALS) + 3) + "|",
    ]
    for result in results:
        all_ = result["contestants"]
        cells = [f"{all_[name]['over pydistill'][0]:.1f} x" if name in all_ else "" for name in RIVALS]
        in_place = all_.get("tutorial", all_["best eager"])["over in place"]
        cells.append(f"{in_place[0]:.1f} x" if in_place else "")
        buffers = [all_[name]["buffers"] for name in ("tutorial", "pydistill", "pydistill in place") if name in all_]
        cells.append(", ".join(f"{b:.2f}" for b in buffers) if None not in buffers else "")
        lines.append(f"| {result['name']} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def compare(old: dict, new: dict) -> str:
    """The same cases in two runs. Ratios to the other contestants of the same run, since machines' speeds move."""
    before = {result["name"]: result["contestants"] for result in old["cases"]}
    lines = [
        "old: " + heading(old["machine"]).replace("\n", "\n     "),
        "new: " + heading(new["machine"]).replace("\n", "\n     "),
        f"\n{'case':40}{'contestant':22}{'old':>9}{'new':>9}{'change':>9}",
    ]
    for result in new["cases"]:
        for name, c in result["contestants"].items():
            if name == "pydistill" or name not in before.get(result["name"], {}):
                continue
            was, low, high = before[result["name"]][name]["over pydistill"]
            is_, new_low, new_high = c["over pydistill"]
            apart = new_low > high or new_high < low
            note = ("  pydistill is faster" if is_ > was else "  pydistill is slower") if apart else ""
            lines.append(f"{result['name']:40}{name:22}{was:9.2f}{is_:9.2f}{is_ / was - 1:+9.1%}{note}")
    shared = before.keys() & {result["name"] for result in new["cases"]}
    if not shared:
        raise ValueError("the two files have no case in common")
    lines.append(
        "Each figure is the contestant's time over pydistill's. A note stands where the quartiles do not overlap."
    )
    return "\n".join(lines)
