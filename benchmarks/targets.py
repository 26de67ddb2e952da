"""The targets that benchmarks measure themselves against."""

from __future__ import annotations


def target(name: str, wanted: str, measured: float, digits: int = 3) -> dict:
    """A target for the result file; it holds where ``measured``, not yet rounded, is as ``wanted`` says ("<= 2" or ">= 2")."""
    comparison, limit = wanted.split()
    holds = measured <= float(limit) if comparison == "<=" else measured >= float(limit)
    return {"name": name, "target": wanted, "measured": round(measured, digits), "holds": bool(holds)}


def target_table(targets: list[dict]) -> list[str]:
    """An empty line, and the targets as Markdown."""
    rows = [f"| {each['name']} | {each['target']} | {each['measured']} |" for each in targets]
    return ["", "| target | wanted | measured |", "|---|---|---|", *rows]
