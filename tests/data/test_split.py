"""The split by hash of a group, against the loops that it stands for, written out."""

from __future__ import annotations

import random

import numpy as np
import pytest

from trainables.data.split import sha256_hex, smallest_hashes, split_groups


def taken_in_turn(hashes: list[str], sizes: list[int], held_out: dict[str, float]) -> list[str]:
    """Groups go to one split after the other, in the order of their hashes, until each has its size."""
    split_of = ["train"] * len(hashes)
    rest = iter(sorted(range(len(hashes)), key=lambda i: (hashes[i], i)))
    for name, missing in held_out.items():
        while missing > 0 and (index := next(rest, None)) is not None:
            split_of[index] = name
            missing -= sizes[index]
    return split_of


@pytest.mark.parametrize("seed", range(60))
def test_groups_are_taken_in_turn(seed: int) -> None:
    draw = random.Random(seed)
    num = draw.randint(0, 40)
    keys = [str(draw.randint(0, 30)) for _ in range(num)]  # some are equal
    sizes = [draw.randint(0, 9) for _ in range(num)]
    shares = (0.0, 0.08 * sum(sizes), 0.12 * sum(sizes), 3.0, 1.0 * sum(sizes))
    held_out = {name: draw.choice(shares) for name in draw.choice([("dev", "test"), ("test",), ()])}
    expected = taken_in_turn([sha256_hex(key) for key in keys], sizes, held_out)
    splits = split_groups(range(num), held_out, key=keys.__getitem__, size=sizes.__getitem__)
    assert splits == {name: [i for i in range(num) if expected[i] == name] for name in ("train", "dev", "test")}


@pytest.mark.parametrize("seed", range(60))
def test_each_class_gives_its_share_by_smallest_hash(seed: int) -> None:
    draw = random.Random(seed)
    num = draw.randint(1, 50)
    strata = np.array([draw.randint(0, 3) for _ in range(num)])
    hashes = np.array([draw.randint(0, 40) for _ in range(num)], np.uint64)
    wanted = draw.randint(0, num)
    chosen = smallest_hashes(hashes, wanted, strata=strata)
    counts = np.bincount(strata)
    quota = np.bincount(strata[chosen], minlength=len(counts))
    assert chosen.sum() == wanted and (abs(quota - counts * wanted / num) < 1).all()
    for stratum in range(len(counts)):
        members = np.flatnonzero(strata == stratum)
        smallest = members[np.argsort(hashes[members], kind="stable")][: quota[stratum]]
        assert set(members[chosen[members]]) == set(smallest)
