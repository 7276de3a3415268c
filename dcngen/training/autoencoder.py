"""The autoencoder: a pretrained one, or a small one trained here once and cached for every run of its data."""

from __future__ import annotations

import json
import math
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from diffusers import AutoencoderKL
from tqdm.auto import tqdm

from dcngen.config import AutoencoderConfig
from dcngen.data import ImageSet, LatentSet
from dcngen.data.files import atomic_directory
from dcngen.diffusion import derive_seed, module_digest, seeded_generator
from dcngen.diffusion.digests import json_digest
from dcngen.training.batches import EpochOrder
from dcngen.training.losses import kl_divergence, reconstruction_loss
from dcngen.training.schedule import learning_rate_factor, set_learning_rate

RULE = "L1 + L2 + multi-scale gradients + KL; rule 1"  # part of the cache key: change it with the training below
NUM_CHECKED_IMAGES = 512


@dataclass(frozen=True)
class Autoencoder:
    """An autoencoder and where it is from.

    Attributes:
        vae: in evaluation mode, fp32, without gradients.
        digest: SHA-256 over its architecture and weights; scaling and shift of latents are no part of it.
        source: "trained on <data>" or the pretrained name.
        about: what is worth recording: PSNR, seconds of training, ...
    """

    vae: AutoencoderKL
    digest: str
    source: str
    about: dict


def load_or_train_autoencoder(
    config: AutoencoderConfig,
    images: ImageSet,
    cache_dir: str | Path,
    *,
    device: str | torch.device = "cpu",
    mixed_precision: str = "no",
    compile: bool = False,
    progress: bool = True,
) -> Autoencoder:
    """The pretrained autoencoder, or the cached one, or a new one trained on `images` and put in the cache.

    Raises:
        OSError: the pretrained autoencoder could be found neither here nor on the hub.
        FloatingPointError: the training diverged.
    """
    if config.pretrained:
        vae = AutoencoderKL.from_pretrained(
            config.pretrained, subfolder=config.subfolder, torch_dtype=torch.float32, use_safetensors=True
        )
        return _finish(vae, device, config.pretrained, {})
    key = json_digest([images.digest, images.horizontal_flip, asdict(config), RULE])
    folder = Path(cache_dir) / "autoencoders" / key[:32]
    if not (folder / "training.json").is_file():
        with atomic_directory(folder) as scratch:
            vae, about = train_autoencoder(
                config, images, device=device, mixed_precision=mixed_precision, compile=compile, progress=progress
            )
            vae.save_pretrained(scratch)
            about |= {"data": images.name, "data_digest": images.digest, "config": asdict(config), "rule": RULE}
            (scratch / "training.json").write_text(json.dumps(about, indent=2) + "\n")
    about = json.loads((folder / "training.json").read_text())
    vae = AutoencoderKL.from_pretrained(folder, torch_dtype=torch.float32, use_safetensors=True)
    kept = {name: about[name] for name in ("psnr", "final_loss", "seconds", "device") if name in about}
    return _finish(vae, device, f"trained on {images.name}", kept)


def _finish(vae: AutoencoderKL, device, source: str, about: dict) -> Autoencoder:
    vae = vae.to(device).eval().requires_grad_(False)
    return Autoencoder(vae, autoencoder_digest(vae), source, about)


def build_autoencoder(config: AutoencoderConfig, image_size: int) -> AutoencoderKL:
    """An untrained AutoencoderKL that shrinks pictures 2^(levels - 1) times."""
    levels = len(config.block_out_channels)
    factor = 2 ** (levels - 1)
    if image_size % factor:
        raise ValueError(
            f"data.image_size: expected a multiple of {factor}, by which {levels} autoencoder levels shrink the "
            f"picture, got {image_size}"
        )
    return AutoencoderKL(
        in_channels=3,
        out_channels=3,
        down_block_types=["DownEncoderBlock2D"] * levels,
        up_block_types=["UpDecoderBlock2D"] * levels,
        block_out_channels=config.block_out_channels,
        layers_per_block=config.layers_per_block,
        latent_channels=config.latent_channels,
        norm_num_groups=config.norm_num_groups,
        sample_size=image_size,
        scaling_factor=1.0,
        mid_block_add_attention=config.mid_block_add_attention,
    )


def train_autoencoder(
    config: AutoencoderConfig,
    images: ImageSet,
    *,
    device: str | torch.device,
    mixed_precision: str = "no",
    compile: bool = False,
    progress: bool = True,
) -> tuple[AutoencoderKL, dict]:
    """Train on one device; the batches are a function of (config.seed, step). Returns it with a record of the training.

    Raises:
        FloatingPointError: the loss was not finite.
    """
    device = torch.device(device)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive_seed(config.seed, "autoencoder"))
        vae = build_autoencoder(config, images.image_size)
    vae = vae.to(device, memory_format=torch.channels_last).train()
    fast = {"fused": True} if device.type == "cuda" else {"foreach": True}
    optimizer = torch.optim.AdamW(
        vae.parameters(), lr=config.learning_rate, betas=(0.9, 0.99), weight_decay=0.0, **fast
    )
    batches = ImageBatches(images, config.train_batch_size, config.seed, device)
    loss_of = torch.compile(autoencoder_loss, dynamic=False) if compile else autoencoder_loss
    latent_size = images.image_size // 2 ** (len(config.block_out_channels) - 1)
    latent_shape = (config.train_batch_size, config.latent_channels, latent_size, latent_size)
    final_loss = math.nan
    bar = tqdm(range(config.max_train_steps), desc="training the autoencoder", unit="step", disable=not progress)
    started = time.perf_counter()
    for step in bar:
        schedule = learning_rate_factor(step, "cosine", config.lr_warmup_steps, config.max_train_steps)
        set_learning_rate(optimizer, config.learning_rate * schedule)
        noise = torch.randn(
            latent_shape, generator=seeded_generator(config.seed, "posterior", step, device=device), device=device
        )
        with torch.autocast(device.type, torch.bfloat16, enabled=mixed_precision == "bf16"):
            loss = loss_of(vae, batches(step), noise, config)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), config.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if step % 50 == 49 or step + 1 == config.max_train_steps:
            final_loss = _require_finite(loss.item(), step, config)
            bar.set_postfix(loss=f"{final_loss:.4f}")
    seconds = round(time.perf_counter() - started, 1)
    vae.eval().requires_grad_(False)
    about = {"psnr": round(reconstruction_psnr(vae, images), 2), "final_loss": round(final_loss, 5), "seconds": seconds}
    return vae, about | {"device": device.type, "torch": torch.__version__}


def autoencoder_loss(
    vae: AutoencoderKL, pixels: torch.Tensor, noise: torch.Tensor, config: AutoencoderConfig
) -> torch.Tensor:
    """Reconstruction from a posterior sample, plus the posterior's KL divergence (Kingma & Welling 2014, eq. 7).

    Args:
        pixels: (N, 3, H, W) in [-1, 1].
        noise: standard normal, of the latents' shape (N, c, h, w).
    """
    posterior = vae.encode(pixels).latent_dist
    mean, logvar = posterior.mean.float(), posterior.logvar.float()
    reconstruction = vae.decode(mean + torch.exp(0.5 * logvar) * noise).sample
    loss = reconstruction_loss(reconstruction, pixels, mse_weight=config.mse_weight, edge_weight=config.edge_weight)
    return loss + config.kl_weight * kl_divergence(mean, logvar)


def _require_finite(loss: float, step: int, config: AutoencoderConfig) -> float:
    if not math.isfinite(loss):
        raise FloatingPointError(
            f"autoencoder training: the loss is {loss} by step {step + 1}; lower autoencoder.learning_rate "
            f"(now {config.learning_rate:g})"
        )
    return loss


class ImageBatches:
    """Batches of pictures (N, 3, H, W) in [-1, 1] by step, mirrored at random where the set asks for it."""

    def __init__(self, images: ImageSet, batch_size: int, seed: int, device: torch.device):
        self.images, self.batch_size, self.seed, self.device = images, batch_size, seed, device
        self.order = EpochOrder(len(images), seed, "autoencoder order")

    def __call__(self, step: int) -> torch.Tensor:
        indices = self.order(step * self.batch_size, self.batch_size)
        pixels = self.images.batch(indices.numpy())[0]
        if self.images.horizontal_flip:
            mirrored = torch.rand(self.batch_size, generator=seeded_generator(self.seed, "flip", step)) < 0.5
            pixels[mirrored] = pixels[mirrored].flip(3)
        return to_unit_range(pixels.to(self.device, non_blocking=True))


def to_unit_range(pixels: torch.Tensor) -> torch.Tensor:
    """uint8 (N, 3, H, W) to fp32 in [-1, 1], channels-last: x = u / 127.5 - 1."""
    return (pixels.float() / 127.5 - 1.0).contiguous(memory_format=torch.channels_last)


@torch.inference_mode()
def reconstruction_psnr(vae: AutoencoderKL, images: ImageSet, num_images: int = NUM_CHECKED_IMAGES) -> float:
    """Peak signal-to-noise ratio in dB over pictures spread evenly through the set, from the posterior's mean."""
    indices = torch.linspace(0, len(images) - 1, min(num_images, len(images))).round().long()
    squared_errors = []
    for part in indices.split(64):
        pixels = to_unit_range(images.batch(part.numpy())[0].to(vae.device))
        reconstruction = vae.decode(vae.encode(pixels).latent_dist.mean).sample.clamp(-1, 1)
        squared_errors.append((reconstruction - pixels).double().square().mean(dim=(1, 2, 3)))
    # The range [-1, 1] is 2 wide, so the peak is 2.
    return (10.0 * torch.log10(4.0 / torch.cat(squared_errors).mean())).item()


def autoencoder_digest(vae: AutoencoderKL) -> str:
    """SHA-256 (hexadecimal) over architecture and weights, whatever the device; not over scaling_factor and shift."""
    scaling = ("scaling_factor", "shift_factor", "latents_mean", "latents_std")
    architecture = {k: v for k, v in vae.config.items() if not k.startswith("_") and k not in scaling}
    return json_digest([json.loads(json.dumps(architecture, default=str)), module_digest(vae)])


def set_latent_statistics(vae: AutoencoderKL, latents: LatentSet) -> None:
    """Set vae.config.scaling_factor and shift_factor so that (latents - shift) * scale has mean 0 and variance 1.

    One number for all channels, as diffusers' AutoencoderKL keeps them: 1 / std and mean over pictures, channels and
    positions of sampled latents (Rombach et al. 2022, arXiv 2112.10752, appendix G, with the mean besides).
    """
    means, stds = latents.channel_mean.double(), latents.channel_std.double()
    shift = means.mean()
    # The variance over all channels is the mean of their variances plus the variance of their means.
    scale = 1.0 / (stds.square().mean() + (means - shift).square().mean()).sqrt()
    vae.register_to_config(scaling_factor=scale.item(), shift_factor=shift.item())
