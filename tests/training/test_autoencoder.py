import pytest
import torch

from dcngen.config import AutoencoderConfig
from dcngen.data import cache_latents
from dcngen.diffusion import scale_latents
from dcngen.training import autoencoder as module
from dcngen.training.autoencoder import (
    autoencoder_digest,
    build_autoencoder,
    load_or_train_autoencoder,
    reconstruction_psnr,
    set_latent_statistics,
)
from dcngen.training.losses import gradient_loss, kl_divergence, reconstruction_loss

SMALL = {"block_out_channels": [8, 16], "norm_num_groups": 4, "train_batch_size": 10, "lr_warmup_steps": 5}


def test_training_makes_reconstructions_better_and_is_cached(images, tmp_path, monkeypatch):
    config = AutoencoderConfig(**SMALL, max_train_steps=60, learning_rate=3e-3)
    untrained = reconstruction_psnr(build_autoencoder(config, 16), images)
    first = load_or_train_autoencoder(config, images, tmp_path, progress=False)
    assert first.about["psnr"] > untrained + 5
    monkeypatch.setattr(module, "train_autoencoder", lambda *_, **__: pytest.fail("trained twice"))
    again = load_or_train_autoencoder(config, images, tmp_path, progress=False)
    assert again.digest == first.digest and again.about == first.about
    assert reconstruction_psnr(again.vae, images) == pytest.approx(first.about["psnr"], abs=0.01)


def test_same_seed_same_weights_another_seed_others(images):
    def digest(seed):
        config = AutoencoderConfig(**SMALL, max_train_steps=2, seed=seed)
        return autoencoder_digest(module.train_autoencoder(config, images, device="cpu", progress=False)[0])

    assert digest(0) == digest(0) != digest(1)


def test_a_saved_folder_serves_as_pretrained(images, tmp_path):
    vae = build_autoencoder(AutoencoderConfig(**SMALL), 16)
    vae.save_pretrained(tmp_path / "vae")
    loaded = load_or_train_autoencoder(AutoencoderConfig(pretrained=str(tmp_path / "vae")), images, tmp_path)
    assert loaded.digest == autoencoder_digest(vae) and loaded.source == str(tmp_path / "vae")


def test_statistics_bring_latents_to_mean_0_and_variance_1(images, tmp_path):
    torch.manual_seed(1)
    vae = build_autoencoder(AutoencoderConfig(**SMALL), 16)
    with torch.no_grad():
        vae.quant_conv.bias += torch.linspace(-3, 3, 8)
    digest = autoencoder_digest(vae)
    latents = cache_latents(images, vae, tmp_path, vae_digest=digest, progress=False)
    set_latent_statistics(vae, latents)
    scaled = scale_latents(latents.sample(range(len(latents)), torch.Generator().manual_seed(0)), vae)
    assert scaled.mean().item() == pytest.approx(0, abs=0.02) and scaled.std().item() == pytest.approx(1, abs=0.02)
    assert autoencoder_digest(vae) == digest  # the latent cache does not depend on its own statistics


def test_gradient_loss_sees_a_blur_and_not_a_shift_of_brightness():
    images = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    blurred = torch.nn.functional.avg_pool2d(images, 3, 1, 1)
    assert gradient_loss(images + 0.3, images).item() == pytest.approx(0, abs=1e-6)
    assert gradient_loss(blurred, images) > 0.2
    assert reconstruction_loss(images + 0.5, images, mse_weight=2.0, edge_weight=0.0).item() == pytest.approx(1.0)


def test_kl_is_that_of_torch():
    mean, logvar = torch.randn(4, 3), torch.randn(4, 3)
    posterior = torch.distributions.Normal(mean, (0.5 * logvar).exp())
    expected = torch.distributions.kl_divergence(posterior, torch.distributions.Normal(0.0, 1.0)).mean()
    torch.testing.assert_close(kl_divergence(mean, logvar), expected)


def test_a_size_that_cannot_be_halved_is_refused():
    with pytest.raises(ValueError, match="multiple of 2"):
        build_autoencoder(AutoencoderConfig(**SMALL), 15)
