"""What must hold before a time is printed: the timed thing computes what its plain form computes."""

from __future__ import annotations

import torch
from torch import nn


def relative_error(got: torch.Tensor, expected: torch.Tensor) -> float:
    """|got - expected| / |expected| in the Euclidean norm; NaN where either holds one."""
    got, expected = got.detach().double(), expected.detach().double()
    return ((got - expected).norm() / expected.norm()).item()


def require_close(what: str, got: torch.Tensor, expected: torch.Tensor, tolerance: float) -> None:
    """
    Raises:
        RuntimeError: the relative error is above the tolerance, or not finite; no time is worth printing then.
    """
    error = relative_error(got, expected)
    if not error <= tolerance:
        raise RuntimeError(f"{what}: expected a relative error of at most {tolerance:g}, got {error:.3g}; not timed")


def require_same_layer(name: str, layer: nn.Module, run, x: torch.Tensor, grad: torch.Tensor) -> None:
    """Compares ``run``, the layer compiled and under bf16 autocast, with the layer itself in float32.

    Args:
        name: for the message.
        layer: the plain layer, float32 weights.
        run: what will be timed.
        x: the input, which requires a gradient.
        grad: of the output.

    Raises:
        RuntimeError: output or input gradient are off by more than bf16 explains.
    """
    with torch.autocast(x.device.type, dtype=torch.bfloat16):
        output = run(x)
    (grad_x,) = torch.autograd.grad(output, x, grad.to(output.dtype))
    plain = x.detach().float().requires_grad_()
    expected = layer(plain)
    (expected_grad,) = torch.autograd.grad(expected, plain, grad.float())
    require_close(f"{name}: output", output, expected, 0.03)
    require_close(f"{name}: gradient of the input", grad_x, expected_grad, 0.03)
