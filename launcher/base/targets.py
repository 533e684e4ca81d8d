"""Labels as the positions that have one: found where they are known, so that no pass has to ask a device for them."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

NO_LOSS = -100
"""The label of a token that bears no loss."""


class Targets(NamedTuple):
    """What is to be predicted: flat positions b · T + t of a batch, and the token that follows each."""

    positions: Tensor
    tokens: Tensor


def targets_of(labels_BT: Tensor) -> Targets:
    """Of labels that are not shifted; the first token of a row never has one."""
    shifted = labels_BT.new_full(labels_BT.shape, NO_LOSS)
    shifted[:, :-1] = labels_BT[:, 1:]
    positions = (shifted.view(-1) != NO_LOSS).nonzero().view(-1)
    return Targets(positions, shifted.view(-1)[positions])
