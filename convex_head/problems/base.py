"""What a solver may know of a problem: the network it optimises and the questions it can ask."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Network:
    """A two-layer polynomial network f_c(x) = sum_{j: function[j]=c} weights[j] s(directions[j]'x).

    Attributes:
        directions: (M, d) unit rows u_j.
        weights: (M,) signed output weights alpha_j.
        function: (M,) int64, the index c of the function that neuron j belongs to.
    """

    directions: Tensor
    weights: Tensor
    function: Tensor

    @property
    def size(self) -> int:
        """Number of neurons M."""
        return int(self.weights.numel())

    @property
    def norm(self) -> Tensor:
        """sum_j |alpha_j|, which equals sum_c (z4_c + z4'_c); scalar."""
        return self.weights.abs().sum()

    @staticmethod
    def empty(width: int, dtype: torch.dtype = torch.float64, device: torch.device | str = "cpu") -> Network:
        """The zero network on ``width`` features."""
        return Network(
            torch.zeros(0, width, dtype=dtype, device=device),
            torch.zeros(0, dtype=dtype, device=device),
            torch.zeros(0, dtype=torch.int64, device=device),
        )
