"""torch.compile for stages that run one graph of fixed shape thousands of times."""

from __future__ import annotations

import logging
from collections.abc import Callable

import torch
from torch import Tensor

from train.config import TrainConfig
from train.parallel import Parallel

log = logging.getLogger(__name__)


def compiled(
    network: Callable[..., Tensor], config: TrainConfig, parallel: Parallel
) -> Callable[..., Tensor]:
    """`network`, compiled where the configuration asks for it; shards of a network are not."""
    if not config.compile or parallel.mesh is not None:
        return network
    log.info("the first step compiles the network: a minute or two, less when it has been before")
    return torch.compile(network, dynamic=False)
