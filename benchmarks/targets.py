"""Targets of the benchmarks."""

from __future__ import annotations


def target(name: str, wanted: str, measured: float, digits: int = 3) -> dict:
    """Return a target for the result file. It holds if ``measured``, before rounding, satisfies ``wanted`` ("<= 2", ">= 2")."""
    comparison, limit = wanted.split()
    holds = measured <= float(limit) if comparison == "<=" else measured >= float(limit)
    return {"name": name, "target": wanted, "measured": round(measured, digits), "holds": bool(holds)}


def target_table(targets: list[dict]) -> list[str]:
    """Format the targets as Markdown, after an empty line; nothing without targets."""
    if not targets:
        return []
    rows = [
        f"| {each['name']} | {each['target']} | {each['measured']} | {'yes' if each['holds'] else 'no'} |" for each in targets
    ]
    return ["", "| target | wanted | measured | holds |", "|---|---|---|---|", *rows]
