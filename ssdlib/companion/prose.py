"""Numbers in sentences, as a book prints them: 15 % and 4 · 10⁻⁷, not 15% and 4e-07."""

import re

__all__ = ["typeset"]

_RAISED = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


def typeset(text: str) -> str:
    """Powers of ten and percentages that a format wrote; `code` stays as it is.

    From a hundredth to a thousand a number is written out: 1.2e-02 becomes 0.012.
    """
    parts = text.split("`")
    for i in range(0, len(parts), 2):
        parts[i] = re.sub(r"\b(\d(?:\.(\d+))?)e([+-]\d\d)\b", _power, parts[i])
        parts[i] = re.sub(r"(?<=\d)%", "\N{NO-BREAK SPACE}%", parts[i])
    return "`".join(parts)


def _power(match) -> str:
    digits, after, exponent = match[1], match[2] or "", int(match[3])
    if -3 < exponent < 4:
        return f"{float(match[0]):.{max(0, len(after) - exponent)}f}"
    return f"{digits} · 10{str(exponent).translate(_RAISED)}"
