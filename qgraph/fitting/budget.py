"""The cheapest choice of one format for each weight under a budget of bytes.

This is the multiple-choice knapsack problem.  Costs add up and bytes are whole numbers, so dynamic
programming over bytes is exact; bytes count in units of what divides all of them, or, if that made
more than `MOST_UNITS`, in larger ones, rounded up, so that the budget holds in any case.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import gcd

import numpy as np

MOST_UNITS = 100_000


def cheapest(
    bytes_of: Sequence[Sequence[int]], costs: Sequence[Sequence[float]], budget: int
) -> list[int] | None:
    """Which option each item takes, so that costs are least and bytes at most the budget.

    Args:
        bytes_of, costs: of each option of each item.

    Returns:
        The number of an option for each item; None where the budget is too small for any choice.

    >>> cheapest([[2, 4], [2, 4]], [[5.0, 1.0], [9.0, 2.0]], 6)
    [0, 1]
    """
    least = [min(sizes) for sizes in bytes_of]
    room = budget - sum(least)
    if room < 0:
        return None
    extra = [[size - low for size in sizes] for sizes, low in zip(bytes_of, least, strict=True)]
    unit = max(gcd(*(e for sizes in extra for e in sizes)), 1)
    room = min(room, sum(map(max, extra)))
    if room // unit > MOST_UNITS:
        unit = -(-room // MOST_UNITS)
    units = room // unit
    best = np.zeros(units + 1)
    chosen = np.zeros((len(extra), units + 1), np.uint8)
    for i, (sizes, prices) in enumerate(zip(extra, costs, strict=True)):
        new = np.full(units + 1, np.inf)
        for option, (size, price) in enumerate(zip(sizes, prices, strict=True)):
            step = -(-size // unit)
            if step > units:
                continue
            total = best[: units + 1 - step] + price
            better = total < new[step:]
            new[step:][better] = total[better]
            chosen[i, step:][better] = option
        best = new
    found = []
    for i in reversed(range(len(extra))):
        option = int(chosen[i, units])
        found.append(option)
        units -= -(-extra[i][option] // unit)
    return found[::-1]
