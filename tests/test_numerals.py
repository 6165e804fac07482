"""Numbers in prose: powers as powers, per cent one way, code as it is."""

import pytest

from ssdlib.companion.numerals import written


@pytest.mark.parametrize(
    ("computed", "shown"),
    [
        ("error 4e-07.", "error 4 × 10⁻⁷."),
        ("**2.5e-06** of it, 1e-05", "**2.5 × 10⁻⁶** of it, 10⁻⁵"),
        ("6e+10 FLOPs", "6 × 10¹⁰ FLOPs"),
        ("15% of 3.5%, and 15 %", "15 % of 3.5 %, and 15 %"),
        (
            "`eps=1e-05`, `f'{x:.0%}'` and 3e-4",
            "`eps=1e-05`, `f'{x:.0%}'` and 3 × 10⁻⁴",
        ),
        ("commit 12e-45ab, abc1e-05", "commit 12e-45ab, abc1e-05"),
        ("```python\nx = 1e-05\n```\nx = 1e-05", "```python\nx = 1e-05\n```\nx = 10⁻⁵"),
    ],
)
def test_numbers_are_written_one_way_and_code_is_left_alone(computed, shown):
    assert written(computed) == shown
    assert written(shown) == shown or "`" in shown
