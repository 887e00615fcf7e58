"""A linear layer with its adapter, and the gradients of several such layers."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn


@dataclass(frozen=True)
class Adapted:
    """A linear layer with its adapter.

    Attributes:
        base: The frozen layer.
        a: [rank, in], or None where the layer has no adapter.
        b: [out, rank].
        scaling: Factor of the product.
        magnitude: DoRA's, [out].
    """

    base: nn.Module
    a: nn.Parameter | None = None
    b: nn.Parameter | None = None
    scaling: float = 1.0
    magnitude: nn.Parameter | None = None

    @property
    def rank(self) -> int:
        """Of the adapter; 0 without one."""
        return 0 if self.a is None else self.a.shape[0]

    def parameters(self) -> list[nn.Parameter]:
        """What is trained."""
        return [each for each in (self.a, self.b, self.magnitude) if each is not None]


@dataclass
class Grads:
    """Gradients of a group's parameters, layer by layer; None where a layer has none."""

    a: list[Tensor | None]
    b: list[Tensor | None]
    magnitude: list[Tensor | None]
