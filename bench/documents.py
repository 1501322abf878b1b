"""The measured parts of README.md and docs/benchmarks.md, written from results.json.

Both files have places marked ``<!-- bench NAME -->`` ... ``<!-- end -->``. Everything between the two markers is
replaced by the block of that name, so that no measured number is typed by hand.
"""

import math
import re
import textwrap
from pathlib import Path

from bench.cases import README_SHAPES, Case, parse
from bench.report import ALTERNATIVES, heading, ranking, threads
from pydistill.formulas import DIVERGENCES

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "bench" / "results"
PAGES = (ROOT / "README.md", ROOT / "docs" / "benchmarks.md")
_BASE = Case().name
_MARKED = re.compile(r"(<!-- bench (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)
_SPEEDUP_CASES = (
    "1024x32000",
    "256x128256",
    "8192x1000",
    "1024x1000",
    "32x10",
    "1024x32000,bfloat16",
    "1024x32000,forward",
)


def write(results: dict) -> list[Path]:
    """Rewrite the marked parts of both pages and return their paths."""
    made = blocks(results)
    for page in PAGES:
        page.write_text(fill(page.read_text(), made))
    return list(PAGES)


def fill(text: str, made: dict[str, str]) -> str:
    """Return the text with every marked part replaced by its block."""
    return _MARKED.sub(lambda match: f"{match[1]}{made[match[2]]}\n{match[3]}", text)


def blocks(results: dict) -> dict[str, str]:
    """Return all blocks by name. The results must contain the default cases."""
    cases = {result["name"]: result["contestants"] for result in results["cases"]}
    return {
        "headline": _headline(cases),
        "times": _times(cases, results["machine"]),
        "caveats": _caveats(cases),
        "leads": _leads(results["cases"]),
        "machine": "\n".join(f"- {line}" for line in heading(results["machine"]).splitlines()),
        "speedups": _speedups(cases),
        "divergences": _divergences(cases),
        "heads": _heads(cases),
        "all": _all_times(results["cases"]),
    }


def _headline(cases):
    base = cases[_BASE]
    ratios = [c["over pydistill"][0] for c in _alternatives(base).values()]
    memory, our_memory, in_place = (base[name]["buffers"] for name in ("tutorial", "pydistill", "pydistill in place"))
    error, our_error = (base[name]["error"] for name in ("tutorial", "pydistill"))
    return _wrapped(
        f"**{_shape(_BASE)} logits (rows x classes), forward and backward, float32, one thread: {ratios[0]:.0f} times "
        f"as fast as `kl_div + cross_entropy`, {ratios[2]:.0f} times as fast as the fastest formula under "
        "`torch.compile`. "
        f"Peak memory above the inputs: {our_memory:.1f} times the size of the student's logits, instead of "
        f"{memory:.1f} for `kl_div + cross_entropy`, and {in_place:.1f} with `inplace=True`. Relative error of the "
        f"gradient: {our_error:.1e}, instead of {error:.1e}.**"
    )


def _alternatives(contestants):
    """The three columns of the README; "compiled" is the faster of the two compiled formulas."""
    compiled = min(("compiled tutorial", "compiled best eager"), key=lambda name: contestants[name]["ms"])
    names = {"tutorial": "tutorial", "best eager": "best eager", "compiled": compiled}
    return {column: contestants[name] for column, name in names.items()}


def _times(cases, machine):
    """Return the README's table: milliseconds of a step."""
    rows = []
    spread = " (first to third quartile)" if "ms quartiles" in cases[_BASE]["pydistill"] else ""
    title = (
        f"Milliseconds per step: median{spread}. float32, T = 4, alpha = 0.7, one thread; {machine['cpu']}, torch "
        f"{machine['torch']}."
    )
    for case in README_SHAPES:
        of = cases[case]
        cells = [_spread(c) for c in _alternatives(of).values()]
        rows.append([_shape(case), *cells, f"**{_spread(of['pydistill'])}**", _spread(of.get("limit"))])
    columns = ["rows x classes", *_alternatives(cases[_BASE]), "**pydistill**", "memory limit"]
    return f"{_wrapped(title)}\n\n{_table(columns, rows)}"


def _caveats(cases):
    base, huge = cases[_BASE], cases[f"{_BASE},huge-pages"]
    new = base["pydistill, new memory"]["over pydistill"][0]
    pairs = zip(_alternatives(huge).items(), _alternatives(base).values(), strict=True)
    changes = [
        f"{a['over pydistill'][0]:.0f} instead of {b['over pydistill'][0]:.0f} ({name})" for (name, a), b in pairs
    ]
    items = [
        "- **New memory.** A gradient of 8 MiB or more reuses the memory of the previous step's gradient, as in a "
        f"training loop. A step on new memory, such as the first one, takes {new:.1f} times as long ({_shape(_BASE)}).",
        "- **Huge pages.** Much of the lead over eager torch at many classes comes from page faults in eager torch. If "
        f"torch allocates huge pages too (`THP_MEM_ALLOC_ENABLE=1`), the speed-ups for {_shape(_BASE)} are "
        f"{', '.join(changes)}.",
    ]
    return "\n".join(map(_wrapped, items))


def _leads(results):
    faster, slower = ranking(results)
    lines = []
    if faster:
        lines.append("Alternatives that are faster than pydistill in this run (their time / pydistill's time):")
        lines += [""] + [f"- `{case}`, {name}: {ratio:.2f}" for ratio, case, name in faster] + [""]
    else:
        lines += ["No alternative is faster than pydistill in this run.", ""]
    lines.append("The smallest leads (time of the alternative / time of pydistill):")
    lines += [""] + [f"- `{case}`, {name}: {ratio:.2f}" for ratio, case, name in slower[:5]]
    return "\n".join(lines)


def _speedups(cases):
    columns = ["case", *ALTERNATIVES, "in place, tutorial", "new memory / kept", "memory", "error"]
    rows = []
    for case in _SPEEDUP_CASES:
        of = cases[case]
        new = of.get("pydistill, new memory")
        memory = [of[name]["buffers"] for name in ("tutorial", "pydistill", "pydistill in place") if name in of]
        rows.append(
            [
                f"`{case}`",
                *(f"{of[name]['over pydistill'][0]:.1f}" for name in ALTERNATIVES),
                _ratio(of["tutorial"]["over in place"], 1),
                _ratio(new and new["over pydistill"], 1),
                _buffers(memory),
                f"{of['tutorial']['error']:.0e}, {of['pydistill']['error']:.0e}",
            ]
        )
    return _table(columns, rows)


def _divergences(cases):
    rows = []
    for case, of in cases.items():
        name = case.removeprefix(f"{_BASE},")
        if name in DIVERGENCES or name == "k=64":
            ratios = (of[n]["over in place"] if n in of else None for n in ("best eager", "compiled best eager"))
            rows.append([f"`{name}`", *(_ratio(x, 1) for x in ratios)])
    return _table([f"{_shape(_BASE)}, in place", "best eager", "compiled best eager"], rows)


def _heads(cases):
    columns = ["tutorial", "compiled tutorial", "linear_cross_entropy", "liger", "matrix products"]
    rows = []
    for case, of in cases.items():
        if parse(case).hidden:
            ratios = [_ratio(of[name]["over pydistill"] if name in of else None, 2) for name in columns]
            rows.append([f"`{case}`", *ratios, _buffers([of[name]["buffers"] for name in ("tutorial", "pydistill")])])
    return _table(["case", *columns, "memory"], rows)


def _all_times(results):
    """Median milliseconds of the main contestants in every case."""
    columns = [*ALTERNATIVES, "pydistill", "pydistill in place", "limit", "limit in place"]
    rows = []
    for result in results:
        of = result["contestants"]
        cells = [_milliseconds(of[name]["ms"]) if name in of else "" for name in columns]
        rows.append([f"`{result['name']}`", str(threads(result)), str(result["pairs"]), *cells])
    return _table(["case", "threads", "rounds", *columns], rows)


def _wrapped(text):
    """Wrap into lines of at most 118 characters; the further lines of a list item are indented."""
    return textwrap.fill(text, 118, subsequent_indent="  " * text.startswith("- "), break_on_hyphens=False)


def _table(columns, rows):
    lines = ["| " + " | ".join(columns) + " |", "|---" + "|---:" * (len(columns) - 1) + "|"]
    return "\n".join(lines + ["| " + " | ".join(row) + " |" for row in rows])


def _shape(case):
    of = parse(case)
    return f"{of.rows:,} x {of.classes:,}"


def _spread(contestant):
    """Median milliseconds with both quartiles; the median alone for older files, which have no quartiles."""
    if contestant is None:
        return ""
    median, quartiles = _milliseconds(contestant["ms"]), contestant.get("ms quartiles")
    return median if quartiles is None else f"{median} ({' to '.join(map(_milliseconds, quartiles))})"


def _milliseconds(x):
    """Format with three significant digits, at most three decimals, and all digits before the point."""
    magnitude = math.floor(math.log10(float(f"{x:.3g}")))
    return f"{x:,.{min(3, max(0, 2 - magnitude))}f}"


def _ratio(spread, digits):
    return "" if spread is None else f"{spread[0]:.{digits}f}"


def _buffers(values):
    return "" if None in values else ", ".join(f"{b:.1f}" for b in values)
