"""Numbers in computed prose, written one way in the whole book."""

import re

__all__ = ["written"]

_POWER = re.compile(r"(?<![\w.])(\d+(?:\.\d+)?)e([+-]\d+)(?!\w)")
_RAISED = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


def written(text: str) -> str:
    """`text` with 4e-07 as 4 × 10⁻⁷ and 15% as 15 %; what is code stays as it is."""
    parts = re.split(
        r"(```.*?```|`[^`]*`)", text, flags=re.S
    )  # prose, code, prose, ...
    parts[::2] = [re.sub(r"(?<=\d)%", " %", _POWER.sub(_raised, p)) for p in parts[::2]]
    return "".join(parts)


def _raised(number: re.Match) -> str:
    power = str(int(number[2])).translate(_RAISED)
    return f"10{power}" if number[1] == "1" else f"{number[1]} × 10{power}"
