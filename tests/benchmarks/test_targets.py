import pytest
from targets import target, target_table


@pytest.mark.parametrize(
    ("wanted", "measured", "holds"),
    [("<= 2", 2.0, True), ("<= 2", 2.0001, False), (">= 1", 1, True), (">= 1", 0.9, False)],
)
def test_a_target_is_compared_before_rounding(wanted, measured, holds):
    found = target("a ratio", wanted, measured)
    assert found == {"name": "a ratio", "target": wanted, "measured": round(measured, 3), "holds": holds}
    assert target_table([found])[-1] == f"| a ratio | {wanted} | {round(measured, 3)} | {'yes' if holds else 'no'} |"
