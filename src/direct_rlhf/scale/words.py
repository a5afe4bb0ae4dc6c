"""Bytes and seconds as people read them."""

UNITS = ("B", "kB", "MB", "GB", "TB", "PB")


def size(n_bytes: float) -> str:
    """Two or three digits and a decimal unit, as GPUs are sold: 14.5 GB, 812 MB."""
    unit = 0
    while n_bytes >= 999.5 and unit < len(UNITS) - 1:
        n_bytes, unit = n_bytes / 1000, unit + 1
    return f"{n_bytes:.{0 if n_bytes >= 99.95 or unit == 0 else 1}f} {UNITS[unit]}"


def duration(seconds: float) -> str:
    """12 ms, 8.2 s, 14 min, 3.5 h, 120 h."""
    if seconds < 1:
        return f"{seconds * 1000:.3g} ms"
    if seconds < 120:
        return f"{seconds:.3g} s"
    if seconds < 120 * 60:
        return f"{seconds / 60:.3g} min"
    return f"{seconds / 3600:,.1f} h" if seconds < 360000 else f"{seconds / 3600:,.0f} h"
