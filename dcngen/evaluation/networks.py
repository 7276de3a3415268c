"""The feature networks to choose from, as the commands offer them."""

import argparse
from pathlib import Path
from typing import Protocol

import torch

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
    parser.add_argument("--inception-weights", type=Path, help="file with the Inception network's weights")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")


def load_network(options: argparse.Namespace) -> FeatureNetwork:
    """The chosen network on the chosen device; prints which weights it has."""
    network = load_inception(options.inception_weights, device=options.device)
    print(f"{network.space.network} weights {network.weights_digest[:16]} from {network.weights_origin}")
    return network
