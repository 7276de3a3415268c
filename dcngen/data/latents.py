"""The latent cache: the autoencoder's posterior of every picture, computed once.

Layout, under ``<cache>/latents/<key>/``: ``moments-00000.safetensors`` and on, each with ``moments`` (n, 2c, h, w) and
``labels`` (n,), and ``meta.json``. The key is the digest of data + autoencoder + how they were combined.
"""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from tqdm.auto import tqdm

from dcngen.data.files import atomic_directory
from dcngen.data.images import ImageSet

IMAGES_PER_SHARD = 32768
STORAGE_DTYPES = {"float16": torch.float16, "float32": torch.float32}


class LatentSet:
    """Posterior moments of every picture; with ``horizontal_flip``, first all pictures, then all mirrored.

    Attributes:
        labels: (N,) int64.
        digest: digest of data + autoencoder + storage; two runs with one digest train on the same latents.
        num_classes, num_images: classes, and pictures before mirroring (N is twice that if mirrored).
        channel_mean, channel_std: (c,) fp32, of unscaled latents over the whole set; a scaling factor that brings the
            latents to unit variance is ``1 / channel_std.square().mean().sqrt()``.
        dtype: what the moments are stored in.
    """

    def __init__(self, folder: Path):
        meta = json.loads((folder / "meta.json").read_text())
        self.folder = folder
        self.digest = meta["digest"]
        self.num_classes = meta["num_classes"]
        self.num_images = meta["num_images"]
        self.channel_mean = torch.tensor(meta["channel_mean"])
        self.channel_std = torch.tensor(meta["channel_std"])
        self.dtype = STORAGE_DTYPES[meta["dtype"]]
        # safetensors maps the files: pages are read when a latent is, and the system may drop them again.
        shards = [load_file(folder / name) for name in meta["shards"]]
        self._shards = [shard["moments"] for shard in shards]
        self.labels = torch.cat([shard["labels"] for shard in shards])

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def shape(self) -> tuple[int, int, int]:
        """(c, h, w) of one latent."""
        channels, height, width = self._shards[0].shape[1:]
        return channels // 2, height, width

    @property
    def moments(self) -> torch.Tensor:
        """(N, 2c, h, w): mean, then log variance. Several shards are joined into one tensor in memory."""
        if len(self._shards) > 1:
            self._shards = [torch.cat(self._shards)]
        return self._shards[0]

    def gather(self, indices: torch.Tensor | Sequence[int]) -> torch.Tensor:
        """Moments (B, 2c, h, w) of some pictures, without joining the shards."""
        indices = torch.as_tensor(indices, dtype=torch.int64)
        if len(self._shards) == 1:
            return self._shards[0][indices]
        out = torch.empty((len(indices), *self._shards[0].shape[1:]), dtype=self.dtype)
        start = 0
        for shard in self._shards:
            here = ((indices >= start) & (indices < start + len(shard))).nonzero().squeeze(1)
            out[here] = shard[indices[here] - start]
            start += len(shard)
        return out

    def sample(self, indices: torch.Tensor | Sequence[int], generator: torch.Generator | None = None) -> torch.Tensor:
        """Draw unscaled latents (B, c, h, w) fp32 from the posterior of some pictures."""
        return sample_moments(self.gather(indices), generator)


def sample_moments(moments: torch.Tensor, generator: torch.Generator | None = None) -> torch.Tensor:
    """Reparameterised draw from moments (B, 2c, h, w): ``mean + exp(logvar / 2) * noise``, fp32, on their device."""
    mean, logvar = moments.float().chunk(2, dim=1)
    noise_device = generator.device if generator is not None else mean.device
    noise = torch.randn(mean.shape, generator=generator, device=noise_device).to(mean.device)
    return mean + torch.exp(0.5 * logvar.clamp(-30, 20)) * noise


def cache_latents(
    images: ImageSet,
    vae,
    cache_dir: str | Path,
    *,
    vae_digest: str,
    batch_size: int = 64,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    storage_dtype: torch.dtype = torch.float16,
    progress: bool = True,
) -> LatentSet:
    """Encode a set of pictures with an autoencoder, or open the cached result.

    Args:
        images: the pictures; ``images.horizontal_flip`` adds every picture mirrored.
        vae: a diffusers autoencoder whose ``encode(x).latent_dist`` has ``parameters`` (mean and log variance).
        cache_dir: root of the cache (``DataConfig.cache_root``).
        vae_digest: digest of the autoencoder's weights and configuration.
        dtype: what the encoder computes in; other than fp32 runs under autocast.
        storage_dtype: ``torch.float16`` or ``torch.float32``.

    Raises:
        TypeError: the autoencoder has no Gaussian posterior.
        FloatingPointError: the encoder gave values that are not finite, or too large for the storage dtype.
    """
    storage = {v: k for k, v in STORAGE_DTYPES.items()}.get(storage_dtype)
    if storage is None:
        raise ValueError(f"storage_dtype must be torch.float16 or torch.float32, got {storage_dtype}")
    flips = [False, True] if images.horizontal_flip else [False]
    recipe = [images.digest, vae_digest, len(images), flips, str(dtype), storage, "moments; rule 1"]
    digest = hashlib.sha256(json.dumps(recipe).encode()).hexdigest()
    folder = Path(cache_dir) / "latents" / digest[:32]
    if not (folder / "meta.json").is_file():
        encode = _encoder(vae, torch.device(device), dtype)
        bar = tqdm(total=len(images) * len(flips), desc="caching latents", unit="img", disable=not progress)
        with bar, atomic_directory(folder) as scratch:
            writer = _ShardWriter(scratch, storage_dtype)
            for flip in flips:
                for start in range(0, len(images), batch_size):
                    pixels, labels = images.batch(range(start, min(start + batch_size, len(images))))
                    writer.add(encode(pixels.flip(3) if flip else pixels), labels)
                    bar.update(len(labels))
            meta = writer.finish()
            meta |= {"digest": digest, "data_digest": images.digest, "vae_digest": vae_digest, "dtype": storage}
            meta |= {"num_classes": images.num_classes, "num_images": len(images), "mirrored": images.horizontal_flip}
            (scratch / "meta.json").write_text(json.dumps(meta, indent=2) + "\n")
    return LatentSet(folder)


def _encoder(vae, device: torch.device, dtype: torch.dtype):
    vae = vae.to(device).eval()

    @torch.inference_mode()
    def encode(pixels: torch.Tensor) -> torch.Tensor:
        x = pixels.to(device).float() / 127.5 - 1
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            posterior = getattr(vae.encode(x), "latent_dist", None)
        if not hasattr(posterior, "parameters"):
            raise TypeError(
                f"{type(vae).__name__} has no Gaussian posterior (encode(x).latent_dist.parameters); "
                f"use a KL autoencoder such as diffusers' AutoencoderKL"
            )
        return posterior.parameters.float().cpu()

    return encode


class _ShardWriter:
    """Collects moments and writes a file each time a shard is full; keeps the running channel statistics."""

    def __init__(self, folder: Path, dtype: torch.dtype):
        self.folder, self.dtype = folder, dtype
        self.moments, self.labels, self.shards = [], [], []
        self.count, self.sum, self.sum_of_squares = 0, 0.0, 0.0

    def add(self, moments: torch.Tensor, labels: torch.Tensor) -> None:
        stored = moments.to(self.dtype)
        if not torch.isfinite(stored).all():
            raise FloatingPointError(
                f"the autoencoder gave latents that are not finite in {self.dtype} (largest magnitude "
                f"{moments.abs().max():g}); encode in torch.float32 and store with storage_dtype=torch.float32"
            )
        mean, logvar = moments.double().chunk(2, dim=1)
        self.sum = self.sum + mean.sum(dim=(0, 2, 3))
        self.sum_of_squares = self.sum_of_squares + (mean.square() + logvar.clamp(-30, 20).exp()).sum(dim=(0, 2, 3))
        self.count += mean.shape[0] * mean.shape[2] * mean.shape[3]
        self.moments.append(stored)
        self.labels.append(labels)
        if sum(map(len, self.labels)) >= IMAGES_PER_SHARD:
            self._write()

    def _write(self) -> None:
        name = f"moments-{len(self.shards):05d}.safetensors"
        save_file({"moments": torch.cat(self.moments), "labels": torch.cat(self.labels)}, self.folder / name)
        self.shards.append(name)
        self.moments, self.labels = [], []

    def finish(self) -> dict:
        if self.labels:
            self._write()
        mean = self.sum / self.count
        std = (self.sum_of_squares / self.count - mean.square()).clamp_min(0).sqrt()
        return {"shards": self.shards, "channel_mean": mean.tolist(), "channel_std": std.tolist()}
