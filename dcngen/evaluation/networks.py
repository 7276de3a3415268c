"""The feature networks to choose from, as the commands offer them."""

import argparse
from pathlib import Path
from typing import Protocol

import torch

from dcngen.evaluation.dinov2 import DEFAULT_MODEL, load_dinov2
from dcngen.evaluation.inception_weights import load_inception
from dcngen.evaluation.spaces import FeatureSpace


class FeatureNetwork(Protocol):
    """A module in evaluation mode from uint8 pictures (N, 3, H, W) to float32 features (N, num_features).

    Attributes:
        space: names and conventions that follow from it.
        num_features: dimensions of a feature.
        weights_digest: SHA-256 over its tensors; features are cached and compared under it.
        weights_origin: where they came from, for people.
    """

    space: FeatureSpace
    num_features: int
    weights_digest: str
    weights_origin: str

    def __call__(self, images: torch.Tensor) -> torch.Tensor: ...

    def parameters(self): ...


def add_network_arguments(parser: argparse.ArgumentParser) -> None:
    """The options :func:`load_network` reads."""
    parser.add_argument(
        "--features",
        choices=["inception", "dinov2"],
        default="inception",
        help="network whose features are compared: inception for FID and KID (default), dinov2 for FD-DINOv2",
    )
    parser.add_argument("--inception-weights", type=Path, help="file with the Inception network's weights")
    parser.add_argument("--dinov2-weights", help=f"folder or hub name of a DINOv2 model (default: {DEFAULT_MODEL})")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")


def load_network(options: argparse.Namespace) -> FeatureNetwork:
    """The chosen network on the chosen device; prints which weights it has."""
    if options.features == "dinov2":
        network = load_dinov2(options.dinov2_weights, device=options.device)
    else:
        network = load_inception(options.inception_weights, device=options.device)
    print(f"{network.space.network} weights {network.weights_digest[:16]} from {network.weights_origin}")
    return network
