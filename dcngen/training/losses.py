"""What a small autoencoder is trained on: reconstruction at several scales, and a light pull to the prior."""

from __future__ import annotations

import torch
import torch.nn.functional as F


def gradient_loss(reconstruction: torch.Tensor, images: torch.Tensor, num_scales: int = 3) -> torch.Tensor:
    """Mean absolute error of horizontal and vertical differences over an average-pooled pyramid, a scalar.

    Squared and absolute errors hardly punish a blurred edge; its differences do, at the scale of the edge. It stands
    where a perceptual loss would, without a pretrained network (the gradient difference loss of Mathieu et al. 2016,
    arXiv 1511.05440, section 3.2, with exponent 1, signs kept, and scales).

    Args:
        reconstruction, images: (N, C, H, W).
        num_scales: resolutions, each half the one before; fewer where the picture gets smaller than 4 pixels.
    """
    error, losses = reconstruction - images, []
    for scale in range(num_scales):
        if scale:
            error = F.avg_pool2d(error, 2)
        if min(error.shape[-2:]) < 4 and scale:
            break
        losses.append(
            (error[..., 1:] - error[..., :-1]).abs().mean() + (error[..., 1:, :] - error[..., :-1, :]).abs().mean()
        )
    return torch.stack(losses).mean()


def kl_divergence(mean: torch.Tensor, logvar: torch.Tensor) -> torch.Tensor:
    """KL(N(mean, exp(logvar)) || N(0, 1)) averaged over elements, a scalar (Kingma & Welling 2014, appendix B)."""
    return 0.5 * (mean.square() + logvar.exp() - 1.0 - logvar).mean()


def reconstruction_loss(
    reconstruction: torch.Tensor, images: torch.Tensor, *, mse_weight: float, edge_weight: float
) -> torch.Tensor:
    """L1 + mse_weight * L2 + edge_weight * gradient loss, of pictures (N, C, H, W) in [-1, 1], a scalar in fp32."""
    reconstruction, images = reconstruction.float(), images.float()
    loss = F.l1_loss(reconstruction, images) + mse_weight * F.mse_loss(reconstruction, images)
    return loss + edge_weight * gradient_loss(reconstruction, images) if edge_weight else loss
