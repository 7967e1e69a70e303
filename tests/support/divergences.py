"""Divergences written out in plain numbers, beside the kinds that have one."""

from __future__ import annotations

from typing import Any, get_args

import numpy as np
from pydantic import TypeAdapter

from trainables.config.terms import Term
from trainables.losses.terms import DIVERGENCES

Row = list[float]  # of one position
KINDS = [get_args(member.model_fields["kind"].annotation)[0] for member in DIVERGENCES]


def soft_ranks(values: Row, strength: float) -> Row:
    """Blondel et al. 2020, prop. 3, by pooling adjacent violators."""
    order = sorted(range(len(values)), key=lambda i: -values[i])
    s = [values[i] / strength for i in order]
    pools: list[list[float]] = []
    for place, one in enumerate(s):
        pools.append([one - (len(s) - place)])
        while len(pools) > 1 and np.mean(pools[-2]) <= np.mean(pools[-1]):
            pools[-2:] = [pools[-2] + pools[-1]]
    v = [float(np.mean(pool)) for pool in pools for _ in pool]
    found = [0.0] * len(s)
    for place, i in enumerate(order):
        found[i] = s[place] - v[place]
    return found


def flow(kind: str, **more: Any) -> Term:
    value = {"kind": kind, "from": "a", "to": "b", "tau_squared": False, **more}
    return TypeAdapter(Term).validate_python(value)  # type: ignore[no-any-return]
