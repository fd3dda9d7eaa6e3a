"""Numbers written for people; whatever is missing or not finite becomes a dash."""

import math
import numbers

MISSING = "–"
_PREFIXES = ("", "k", "M", "G", "T", "P")


def finite(value) -> float | None:
    """The value as a float, or None where it is missing or not a finite number."""
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        return None
    return float(value) if math.isfinite(value) else None


def percent(value, spread=None) -> str:
    """A fraction as a percentage with two decimals, and its spread where there is one.

    Example:
        >>> percent(0.97222), percent(0.9722, 0.0031), percent(None)
        ('97.22 %', '97.22 ± 0.31 %', '–')
    """
    if finite(value) is None:
        return MISSING
    return f"{100 * value:.2f}{_plus_minus(spread, 100, 2)} %"


def points(value, spread=None) -> str:
    """A difference of two fractions in percentage points, always with its sign."""
    if finite(value) is None:
        return MISSING
    rounded = round(100 * value, 2)
    text = f"{rounded:+.2f}" if rounded else "0.00"
    return text.replace("-", "−") + _plus_minus(spread, 100, 2)


def si(value, unit="", spread=None) -> str:
    """A count with three significant digits, a decimal SI prefix (1 kB = 1000 bytes) and a unit.

    A spread of exactly zero is left out: costs are often the same in every run.

    Example:
        >>> si(125_500_000, "MACs"), si(999_600, "B"), si(512, "B"), si(1500.0, "B", 20.0)
        ('126 M MACs', '1.00 MB', '512 B', '1.50 ± 0.02 kB')
    """
    if finite(value) is None:
        return MISSING
    power = 0
    while float(f"{abs(value) / 1000**power:.3g}") >= 1000 and power < len(_PREFIXES) - 1:
        power += 1
    scaled = value / 1000**power
    decimals = 0 if power == 0 and value == int(value) else _decimals(scaled)
    # Only the byte takes its prefix without a space between: kB, but M MACs.
    tail = _PREFIXES[power] + unit if unit == "B" else f"{_PREFIXES[power]} {unit}".strip()
    number = f"{scaled:.{decimals}f}{_plus_minus(spread or None, 1 / 1000**power, decimals)}"
    return f"{number} {tail}".strip()


def times(value, spread=None) -> str:
    """A ratio; a spread of exactly zero is left out."""
    if finite(value) is None:
        return MISSING
    decimals = _decimals(value)
    return f"{value:.{decimals}f}{_plus_minus(spread or None, 1, decimals)}×"


def p_value(value) -> str:
    """A probability as statistics are quoted.

    Example:
        >>> p_value(0.0312), p_value(1e-9), p_value(1.0)
        ('p = 0.031', 'p < 0.001', 'p = 1.000')
    """
    if finite(value) is None:
        return MISSING
    return "p < 0.001" if value < 0.001 else f"p = {value:.3f}"


def duration(seconds) -> str:
    """A time span in at most two units.

    Example:
        >>> duration(0.25), duration(75.4), duration(7260)
        ('0.25 s', '1 min 15 s', '2 h 1 min')
    """
    if finite(seconds) is None:
        return MISSING
    if seconds < 60:
        return f"{seconds:.3g} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes_left = divmod(minutes, 60)
    return f"{hours} h {minutes_left} min" if hours else f"{minutes} min {rest} s"


def listing(items) -> str:
    """Items as an English enumeration."""
    *head, last = items
    return f"{', '.join(head)} and {last}" if head else last


def _decimals(value) -> int:
    """Decimals that give three significant digits, at most two."""
    return 2 if abs(value) < 9.995 else 1 if abs(value) < 99.95 else 0


def _plus_minus(spread, factor, decimals) -> str:
    return "" if finite(spread) is None else f" ± {spread * factor:.{decimals}f}"
