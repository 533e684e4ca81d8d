"""Labels as the positions that have one: found where they are known, so that no pass has to ask a device for them."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

NO_LOSS = -100
"""The label of a token that bears no loss."""


class Targets(NamedTuple):
    """What is to be predicted: flat positions b · T + t of a batch, and the token that follows each."""

    positions: Tensor
    tokens: Tensor


def targets_of(labels_BT: Tensor) -> Targets:
    """Of labels that are not shifted; the first token of a row never has one. Labels on a device are waited for."""
    labels = labels_BT.cpu().numpy().reshape(-1)
    places = np.flatnonzero(labels != NO_LOSS)
    places = places[places % labels_BT.shape[1] != 0]
    found = (torch.from_numpy(places - 1), torch.from_numpy(labels[places]))
    return Targets(*(tensor.to(labels_BT.device) for tensor in found))
