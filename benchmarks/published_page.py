"""What published.py found, as docs/published.md.

It is handed what published.py wrote, or a folder of such files:

    python benchmarks/published_page.py published.json --binary binary.json > docs/published.md
"""

from __future__ import annotations

import argparse
import importlib
import json
from pathlib import Path

from published import MODULES, STAGES, passed
from published_source import ENTRIES, Entry

Found = dict[str, dict[str, str]]  # what each stage said, by program and stage
WHY = {
    "globals": "a latent that all rows share",
    "variable-length": "rows of different lengths",
    "coupled-rows": "rows that depend on each other",
    "parts-observed": "sites that observe parts of the data",
    "noise-outside-sites": "random numbers outside of sites",
}
HEAD = (
    "Programs that other people published for Pyro, tried with no line of them changed: from checkouts of their repositories, "
    "through `fit` (plain and compiled),\n`log_likelihood`, `encode`, `sample`, `reconstruct`, saving and loading, and the "
    "report, by `python benchmarks/published.py --sources DIR`. `pv.adopt(...)` around a\nprogram, with `observed=`, "
    "`constants=` and `conditioned=`, and `inputs=` in the calls are no change (nor is that `sample` is handed rows where it "
    "asks for their\ntotal counts). The list was written before the library could run any of it."
)


def main() -> None:
    """Print the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("found", type=Path, help="what published.py wrote")
    parser.add_argument("--binary", type=Path, help="what it wrote with --binary")
    parser.add_argument(
        "--before", type=Path, help="what it wrote at an earlier commit, for programs that were not run again"
    )
    given = parser.parse_args()
    for module in MODULES:
        importlib.import_module(module)
    print(page(*(read(path) if path else {} for path in (given.found, given.binary, given.before))))


def read(path: Path) -> Found:
    """What published.py wrote, or several of its files by parts, in one folder."""
    files = sorted(path.glob("*.json")) if path.is_dir() else [path]
    return {name: stages for file in files for name, stages in json.loads(file.read_text(encoding="utf-8")).items()}


def page(found: Found, binary: Found, before: Found) -> str:
    """The page, in markdown."""
    again, found = set(found), {**before, **found}
    counted = {n: found[n] for n, entry in ENTRIES.items() if entry.kind == "ordinary"}
    whole = [n for n, r in counted.items() if passed(r)]
    helped = [n for n in counted if n not in whole and n in binary]
    lines = [
        "# Published Pyro programs",
        "",
        HEAD,
        "",
        f"**{len(whole)} of {len(counted)} go through everything** (before: none). {len(ENTRIES) - len(counted)} more are not "
        "counted: what they are is not what this library evaluates yet.",
    ]
    if helped:
        through = sum(passed(binary[n]) for n in helped)
        lines += [
            "",
            f"{len(helped)} of those that do not have grey levels under a Bernoulli likelihood here, which has no log "
            "p of them: the refusal says to binarize. **Given binary images instead**, the same programs, still with no line "
            f"changed, go through everything in {through} of {len(helped)} cases (the last column): "
            f"{len(whole) + through} of {len(counted)} then.",
        ]
    if earlier := [n for n in counted if n not in again]:
        lines += ["", f"What {len(earlier)} of them give is of an earlier run, and says so."]
    lines += ["", "| program | source | lines changed | result | with binary images |", "|---|---|---|---|---|"]
    for name in sorted(counted, key=lambda n: n not in whole):
        when = " (an earlier run)" if name in earlier else ""
        cells = [name, source(ENTRIES[name]), "0", result(counted[name]) + when]
        lines.append(f"| {' | '.join(cells)} | {result(binary[name]) if name in helped else ''} |")
    lines += ["", "Not counted:", "", "| program | source | why |", "|---|---|---|"]
    lines += [f"| {n} | {source(ENTRIES[n])} | {WHY[ENTRIES[n].kind]} |" for n in ENTRIES if n not in counted]
    return "\n".join(lines)


def source(entry: Entry) -> str:
    """Where a program was published."""
    return f"{entry.repository}, {entry.path}"


def result(stages: dict[str, str]) -> str:
    """How many stages of this library went through, and what stopped the first that did not."""
    if passed(stages):
        return "everything"
    own = STAGES[1:]
    first = next(value for value in stages.values() if value != "ok")
    return f"{sum(stages.get(s) == 'ok' for s in own)} of {len(own)}: {first.replace('|', 'given')[:170]}"


if __name__ == "__main__":
    main()
