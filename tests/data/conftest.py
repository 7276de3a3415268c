import numpy as np
import pytest
from PIL import Image


@pytest.fixture
def picture():
    """Make a distinct RGB picture: picture(seed, (width, height))."""

    def make(seed, size=(20, 14), mode="RGB"):
        generator = np.random.default_rng(seed)
        coarse = generator.integers(0, 256, (4, 4, 3), dtype=np.uint8)
        return Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC).convert(mode)

    return make


@pytest.fixture
def image_folder(tmp_path, picture):
    """root/train/{cat,dog} and root/test/{cat,dog} with a few pictures each."""
    root = tmp_path / "pets"
    counts = {("train", "cat"): 5, ("train", "dog"): 3, ("test", "cat"): 2, ("test", "dog"): 2}
    for offset, ((split, name), count) in enumerate(counts.items()):
        folder = root / split / name
        folder.mkdir(parents=True)
        for index in range(count):
            picture(100 * offset + index).save(folder / f"{index:03d}.png")
    return root
