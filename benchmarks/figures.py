"""Makes the figures of README and docs: docs/figures/* and docs/pictures.jpg. Numbers come from benchmarks/results.

python benchmarks/figures.py                      # all figures, some minutes on a CPU core
python benchmarks/figures.py few-steps pictures # some of: ring, architecture, few-steps, strip, pictures
"""

from __future__ import annotations

import argparse
from functools import partial
from pathlib import Path

from drawing.architecture import architecture
from drawing.contest import contest
from drawing.images import readme, strip
from drawing.ring import ring

DOCS = Path("docs")
FIGURES = {
    "ring": partial(ring, DOCS / "figures/ring.svg"),
    "architecture": partial(architecture, DOCS / "figures/architecture.svg"),
    "few-steps": partial(contest, Path("benchmarks/results/rivals-emoji.json"), DOCS / "figures/few-steps.svg"),
    "strip": partial(strip, DOCS / "figures/strip.jpg"),
    "pictures": partial(readme, DOCS / "pictures.jpg"),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"figures to make: {', '.join(FIGURES)}; default: all")
    names = parser.parse_args().names or list(FIGURES)
    if unknown := [name for name in names if name not in FIGURES]:
        parser.error(f"NAME: expected some of {', '.join(FIGURES)}, found {unknown[0]}")
    for name in names:
        print(f"wrote {FIGURES[name]()}", flush=True)


if __name__ == "__main__":
    main()
