"""Parts of the sentences that messages are made of."""

from collections.abc import Sequence


def few(names: Sequence[object], most: int = 5, separator: str = ", ") -> str:
    """The first ``most`` names, and how many more there are: "a, b and 3 more"."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return separator.join(map(str, names[:most])) + more


def times(values: Sequence[float]) -> str:
    """Sides as "1 x 1.2 x 3"."""
    return " x ".join(f"{value:.4g}" for value in values)
