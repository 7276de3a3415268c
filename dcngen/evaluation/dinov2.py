"""DINOv2 features, in which the Frechet distance is FD-DINOv2.

Stein et al., "Exposing flaws of generative model evaluation metrics and their unfair treatment of diffusion models",
2023, who found it closer to people's judgement of pictures than FID. As in their code: bicubic resize to 224 as
Pillow's, ImageNet's mean and deviation, the class token after the last layer norm. Published figures use ViT-L/14, and
the original resampling of the position embeddings, from which that of transformers differs in the last digits.
"""

from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F

from dcngen.evaluation.inception import exact_float32, require_uint8_pictures
from dcngen.evaluation.inception_weights import tensors_digest
from dcngen.evaluation.spaces import DINOV2

DEFAULT_MODEL = "facebook/dinov2-base"
INPUT_SIZE = 224
REMEDY = (
    f"remedies: on a machine with network run `hf download {DEFAULT_MODEL} --local-dir dinov2-base`, carry the folder "
    f"here and pass it with --dinov2-weights; or use --features inception"
)


class DINOv2Features(nn.Module):
    """uint8 pictures (N, 3, H, W) of any size to features (N, num_features), float32.

    Args:
        model: a transformers ``Dinov2Model``.
        origin: where it came from, for people.
    """

    space = DINOV2

    def __init__(self, model: nn.Module, origin: str):
        super().__init__()
        self.model = model.float()
        self.num_features = model.config.hidden_size
        self.weights_digest, self.weights_origin = tensors_digest(model.state_dict()), origin
        self.register_buffer("mean", 255 * torch.tensor([0.485, 0.456, 0.406])[:, None, None], persistent=False)
        self.register_buffer("deviation", 255 * torch.tensor([0.229, 0.224, 0.225])[:, None, None], persistent=False)
        self.requires_grad_(False).eval()

    def train(self, mode: bool = True) -> "DINOv2Features":
        return super().train(False)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        require_uint8_pictures(images)
        device = self.mean.device
        with exact_float32(), torch.autocast(device.type, enabled=False):
            x = (resize_like_pillow(images.to(device), INPUT_SIZE) - self.mean) / self.deviation
            return self.model(pixel_values=x).last_hidden_state[:, 0]


def resize_like_pillow(images: torch.Tensor, size: int) -> torch.Tensor:
    """Pillow's bicubic resize of uint8 pictures (N, C, H, W), as float32 grey levels.

    Columns first, then rows, each rounded and clipped; in float64, so that the many exact halves round as Pillow's do.
    """
    x = images.double()
    for shape in ((x.shape[-2], size), (size, size)):
        x = (F.interpolate(x, size=shape, mode="bicubic", antialias=True) + 0.5).floor().clamp(0, 255)
    return x.float()


def load_dinov2(name_or_folder: str | Path | None = None, *, device: str | torch.device = "cpu") -> DINOv2Features:
    """The network from a folder or, by its name, from the hub's cache or the hub (default ``facebook/dinov2-base``).

    Raises:
        RuntimeError: neither the folder nor the hub has it; the message lists the remedies.
        ValueError: it is another model, or its weights are incomplete.
    """
    from transformers import AutoConfig, AutoModel

    name = str(name_or_folder or DEFAULT_MODEL)
    try:
        config = AutoConfig.from_pretrained(name)
        if config.model_type != "dinov2":
            raise ValueError(
                f"{name} is a {config.model_type} model, expected dinov2: its distance would not be FD-DINOv2"
            )
        # eager attention is plain products, which exact_float32 governs
        model, loading = AutoModel.from_pretrained(
            name, config=config, use_safetensors=True, attn_implementation="eager", output_loading_info=True
        )
    except OSError as error:
        raise RuntimeError(
            f"no DINOv2 weights: {name} could not be read as a folder of a transformers model nor from the hub "
            f"({str(error).splitlines()[0]})\n{REMEDY}"
        ) from error
    absent = [key for kind in ("missing_keys", "mismatched_keys") for key in loading[kind]]
    if absent:  # transformers would go on with random numbers in their place
        raise ValueError(
            f"{name} does not hold all weights of a DINOv2 model: {absent[0]} and {len(absent) - 1} others"
        )
    return DINOv2Features(model, name).to(device)
