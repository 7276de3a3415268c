import numpy as np
import pytest
import torch

from dcngen.data import ImageSet, cache_latents, latents


class Posterior:
    def __init__(self, parameters):
        self.parameters = parameters


class Encoded:
    def __init__(self, parameters):
        self.latent_dist = Posterior(parameters)


class PoolingAutoencoder(torch.nn.Module):
    """Mean: 2x2-pooled colours; log variance: -4. Enough structure to see every pixel and its place."""

    calls = 0

    def encode(self, x):
        type(self).calls += 1
        mean = torch.nn.functional.avg_pool2d(x, 2)
        return Encoded(torch.cat([mean, torch.full_like(mean, -4.0)], dim=1))


@pytest.fixture
def images():
    pixels = np.random.default_rng(0).integers(0, 256, (10, 3, 4, 4), dtype=np.uint8)
    return ImageSet(pixels, np.arange(10) % 3, ["a", "b", "c"], digest="d" * 64, name="noise", split="train")


def cache(images, tmp_path, **options):
    options = {"vae_digest": "v", "batch_size": 4, "progress": False, "storage_dtype": torch.float32, **options}
    return cache_latents(images, PoolingAutoencoder(), tmp_path, **options)


def test_moments_are_the_encoders(images, tmp_path):
    found = cache(images, tmp_path)
    x = images.batch(range(10))[0].float() / 127.5 - 1
    assert torch.equal(found.moments[:, :3], torch.nn.functional.avg_pool2d(x, 2))
    assert (found.moments[:, 3:] == -4).all()
    assert found.labels.tolist() == images.labels.tolist()
    assert found.shape == (3, 2, 2) and found.num_classes == 3 and found.num_images == len(found) == 10


def test_second_call_reads_the_cache_and_keys_differ(images, tmp_path):
    first = cache(images, tmp_path)
    calls = PoolingAutoencoder.calls
    assert cache(images, tmp_path).digest == first.digest and PoolingAutoencoder.calls == calls
    assert cache(images, tmp_path, vae_digest="w").digest != first.digest
    assert cache(images, tmp_path, storage_dtype=torch.float16).digest != first.digest


def test_mirrored_pictures_follow_the_originals(images, tmp_path):
    images.horizontal_flip = True
    found = cache(images, tmp_path)
    assert len(found) == 20 and found.num_images == 10
    assert torch.allclose(found.moments[10:], found.moments[:10].flip(3), atol=1e-6)
    assert torch.equal(found.labels[10:], found.labels[:10])


def test_shards_read_as_one_set(images, tmp_path, monkeypatch):
    whole = cache(images, tmp_path / "whole")
    monkeypatch.setattr(latents, "IMAGES_PER_SHARD", 4)
    sharded = cache(images, tmp_path / "sharded")
    assert len(sharded._shards) == 3
    order = [9, 0, 5, 5, 3]
    assert torch.equal(sharded.gather(order), whole.moments[order])
    assert torch.equal(sharded.moments, whole.moments) and torch.equal(sharded.labels, whole.labels)


def test_sample_draws_from_the_posterior(images, tmp_path):
    found = cache(images, tmp_path)
    drawn = found.sample([2] * 4000, torch.Generator().manual_seed(0))
    assert drawn.dtype == torch.float32 and drawn.shape == (4000, 3, 2, 2)
    assert torch.allclose(drawn.mean(dim=0), found.moments[2, :3], atol=0.01)
    assert torch.allclose(drawn.std(dim=0), torch.full((3, 2, 2), float(np.exp(-2))), atol=0.01)
    assert torch.equal(drawn, found.sample([2] * 4000, torch.Generator().manual_seed(0)))


def test_channel_statistics_are_those_of_sampled_latents(images, tmp_path):
    found = cache(images, tmp_path)
    drawn = found.sample(list(range(10)) * 400, torch.Generator().manual_seed(1)).double()
    assert torch.allclose(found.channel_mean.double(), drawn.mean(dim=(0, 2, 3)), atol=5e-3)
    assert torch.allclose(found.channel_std.double(), drawn.std(dim=(0, 2, 3)), atol=5e-3)


class Overflowing(PoolingAutoencoder):
    def encode(self, x):
        return Encoded(torch.full((len(x), 6, 2, 2), 1e6))


class WithoutPosterior(torch.nn.Module):
    def encode(self, x):
        return x


@pytest.mark.parametrize(
    ("vae", "error", "message"),
    [(Overflowing(), FloatingPointError, "float32"), (WithoutPosterior(), TypeError, "AutoencoderKL")],
)
def test_unusable_autoencoder_leaves_nothing_behind(images, tmp_path, vae, error, message):
    with pytest.raises(error, match=message):
        cache_latents(images, vae, tmp_path, vae_digest="v", progress=False)
    assert list((tmp_path / "latents").iterdir()) == []
