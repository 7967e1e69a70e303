"""Pairs of a batch's examples in one (MixKD): which partner each example has, and its share. Pure functions of a batch and a seed."""

from __future__ import annotations

import numpy as np
import torch

from trainables.data.classification.tasks import Partners, TaskBatch


def mixed(batch: TaskBatch, alpha: float, *, seed: int) -> TaskBatch:
    """Gives each example a partner of the same batch, at random, and a share from Beta(alpha, alpha).

    Takes the whole global batch: ranks and micro-batches then take slices, so that no draw depends on how it is divided.
    Models read each position that either example has; `types_BT` are those of the first where both have one.
    """
    draws = np.random.default_rng(seed)
    partner_N = torch.from_numpy(draws.permutation(len(batch.ids_BT)))
    shares_N = torch.from_numpy(draws.beta(alpha, alpha, len(batch.ids_BT)).astype(np.float32))
    first_BT, second_BT = batch.mask_BT.bool(), batch.mask_BT[partner_N].bool()
    types_BT = batch.types_BT
    return batch._replace(
        mask_BT=(first_BT | second_BT).to(batch.mask_BT.dtype),
        types_BT=None if types_BT is None else torch.where(first_BT, types_BT, types_BT[partner_N]),
        partners=Partners(batch.ids_BT[partner_N], batch.labels_N[partner_N], shares_N),
    )
