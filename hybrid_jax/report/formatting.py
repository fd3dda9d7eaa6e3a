"""Numbers written for people; what is missing becomes a dash, and a mean shows its deviation."""

from hybrid_jax.report.rows import Mean, finite

MISSING = "–"
_PREFIXES = ("", "k", "M", "G", "T", "P")


def percent(value) -> str:
    """A fraction as a percentage with two decimals.

    Example:
        >>> percent(0.97222), percent(Mean((0.96, 0.98))), percent(None)
        ('97.22 %', '97.00 ± 1.41 %', '–')
    """
    if finite(value) is None:
        return MISSING
    return f"{100 * value:.2f}{_plus_minus(_std(value), 100, 2)} %"


def score(metric: str, value) -> str:
    """A value of a metric; that of "accuracy" is a percentage.

    Example:
        >>> score('accuracy', 0.5), score('R²', 0.87654)
        ('50.00 %', '0.8765')
    """
    if metric == "accuracy" or finite(value) is None:
        return percent(value)
    return f"{value:.4g}{_plus_minus(_std(value), 1, 4)}".replace("-", "−")


def change(metric: str, value) -> str:
    """A difference of two values of a metric, with its sign; of "accuracy" in percentage points.

    Example:
        >>> change('accuracy', 0.0123), change('accuracy', -1e-6), change('R²', -0.00123)
        ('+1.23', '0.00', '−0.00123')
    """
    if finite(value) is None:
        return MISSING
    scale, places = (100, 2) if metric == "accuracy" else (1, 4)
    text = f"{100 * value:+.2f}" if metric == "accuracy" else f"{value:+.3g}"
    text = text if float(text) else text[1:]
    return text.replace("-", "−") + _plus_minus(_std(value), scale, places)


def si(value, unit="") -> str:
    """A count with three significant digits, a decimal SI prefix (1 kB = 1000 bytes) and a unit.

    A deviation of exactly zero is left out: costs are often the same in every run.

    Example:
        >>> si(125_500_000, "MACs"), si(999_600, "B"), si(512, "B"), si(Mean((1500, 1540)), "B")
        ('126 M MACs', '1.00 MB', '512 B', '1.52 ± 0.03 kB')
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
    spread = _plus_minus(_std(value) or None, 1 / 1000**power, decimals)
    return f"{scaled:.{decimals}f}{spread} {tail}".strip()


def times(value, quartiles=None) -> str:
    """A ratio, and its quartiles where they are known.

    Example:
        >>> times(0.634, (0.6, 0.66)), times(12.34)
        ('0.63× (0.60–0.66)', '12.3×')
    """
    if finite(value) is None:
        return MISSING
    decimals = _decimals(value)
    spread = _plus_minus(_std(value) or None, 1, decimals)
    noise = " ({:.{d}f}–{:.{d}f})".format(*quartiles, d=decimals) if quartiles else ""
    return f"{value:.{decimals}f}{spread}×{noise}"


def milliseconds(value, quartiles=None) -> str:
    """A time in milliseconds with three significant digits, and its quartiles where they are known.

    Example:
        >>> milliseconds(0.61234), milliseconds(12.0, (11.81, 12.4))
        ('0.612 ms', '12.0 ms (11.8–12.4)')
    """
    if finite(value) is None:
        return MISSING
    noise = " ({}–{})".format(*map(_three, quartiles)) if quartiles else ""
    return f"{_three(value)}{_plus_minus(_std(value) or None, 1, 3)} ms{noise}"


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


def _std(value):
    return value.std if isinstance(value, Mean) else None


def _three(value) -> str:
    """Three significant digits, zeros at the end among them."""
    return f"{value:#.3g}".rstrip(".")


def _decimals(value) -> int:
    """Decimals that give three significant digits, at most two."""
    return 2 if abs(value) < 9.995 else 1 if abs(value) < 99.95 else 0


def _plus_minus(spread, factor, decimals) -> str:
    return "" if finite(spread) is None else f" ± {spread * factor:.{decimals}f}"
