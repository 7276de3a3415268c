"""Feature spaces: which network's features a distance is taken in, and what that distance is then called."""

from dataclasses import dataclass


@dataclass(frozen=True)
class FeatureSpace:
    """Names and conventions that follow from the network.

    Attributes:
        network: the network, as in "Inception features".
        frechet, kernel: what the two distances are called in it. Only Inception's are FID and KID.
        resize: how pictures reach the network's input.
        published: what the published figures of this distance were made with, besides their reference.
        published_by_default: whether our extractor is the published one, so that only the number of pictures remains.
    """

    network: str
    frechet: str
    kernel: str
    resize: str
    published: str
    published_by_default: bool

    def named(self, values: dict) -> dict:
        """The same values under this space's names: ``frechet_error`` becomes ``fid_error`` or ``fd_dinov2_error``."""
        keys = {"frechet": self.frechet, "kernel": self.kernel}
        named = {}
        for key, value in values.items():
            first, separator, rest = key.partition("_")
            named[keys.get(first, first).lower().replace("-", "_") + separator + rest] = value
        return named


INCEPTION = FeatureSpace(
    network="Inception",
    frechet="FID",
    kernel="KID",
    resize="TensorFlow 1 bilinear to 299, no antialiasing, from uint8",
    published="50,000 pictures",
    published_by_default=True,
)
DINOV2 = FeatureSpace(
    network="DINOv2",
    frechet="FD-DINOv2",
    kernel="KD-DINOv2",
    resize="bicubic to 224 as Pillow's, with antialiasing, from uint8",
    published="50,000 pictures and ViT-L/14 (facebook/dinov2-large)",
    published_by_default=False,
)
SPACES = {space.network: space for space in (INCEPTION, DINOV2)}
