"""The Inception-v3 network of FID: the 2015-12-05 TensorFlow graph, whose pooled features FID is defined on.

Szegedy et al., "Rethinking the Inception Architecture for Computer Vision", 2016, figures 5 to 7; Heusel et al., "GANs
Trained by a Two Time-Scale Update Rule", 2017. It is not torchvision's Inception: the graph's own resize (bilinear,
corners not aligned, no antialiasing, pixel centres not shifted), average pools that leave the padding out of the count,
and a max pool in the last block all move the features. Parameter names are those of torch-fidelity, so that its weights
load as they are.
"""

from contextlib import contextmanager

import torch
from torch import nn
from torch.nn import functional as F

from dcngen.evaluation.spaces import INCEPTION

FEATURE_LAYERS = {64: "Conv2d_2b_3x3", 192: "Conv2d_4a_3x3", 768: "Mixed_6e", 2048: "Mixed_7c"}
INPUT_SIZE = 299


class ConvNormReLU(nn.Module):
    """Convolution without bias, batch normalisation in inference (eps 1e-3), ReLU."""

    def __init__(self, in_channels: int, out_channels: int, kernel: int | tuple[int, int], stride: int, same: bool):
        super().__init__()
        kernel = (kernel, kernel) if isinstance(kernel, int) else kernel
        padding = tuple(k // 2 for k in kernel) if same else 0
        self.conv = nn.Conv2d(in_channels, out_channels, kernel, stride, padding, bias=False)
        self.bn = nn.BatchNorm2d(out_channels, eps=1e-3)

    def forward(self, x):
        return F.relu(self.bn(self.conv(x)), inplace=True)


class Branch(nn.Module):
    """One path of a block: an optional 3x3 pool, a chain of convolutions, and possibly two last ones side by side.

    The convolutions are members of the block (their names are the weights' names); the branch keeps their names.
    """

    def __init__(self, block: nn.Module, in_channels: int, steps: list, pool: str | None = None):
        super().__init__()
        self.pool, self.chain, self.forks = pool, [], []
        self.out_channels = in_channels
        forked = 0
        for name, out_channels, kernel, *options in steps:
            stride = 2 if "stride 2" in options else 1
            source = self.out_channels
            block.add_module(name, ConvNormReLU(source, out_channels, kernel, stride, same=stride == 1))
            if "fork" in options:
                self.forks.append(name)
                forked += out_channels
            else:
                self.chain.append(name)
                self.out_channels = out_channels
        self.out_channels = forked or self.out_channels

    def run(self, block: nn.Module, x):
        if self.pool == "average":
            x = F.avg_pool2d(x, 3, stride=1, padding=1, count_include_pad=False)
        elif self.pool == "max":
            x = F.max_pool2d(x, 3, stride=1, padding=1)
        elif self.pool == "halve":
            x = F.max_pool2d(x, 3, stride=2)
        for name in self.chain:
            x = block.get_submodule(name)(x)
        if self.forks:
            x = torch.cat([block.get_submodule(name)(x) for name in self.forks], dim=1)
        return x


class Mixed(nn.Module):
    """An Inception block: branches over the same input, joined along the channels.

    Args:
        in_channels: channels of the input.
        *branches: each ``(pool, steps)``; a step is ``(name, out_channels, kernel)``, perhaps with ``"stride 2"`` or
            ``"fork"``.
    """

    def __init__(self, in_channels: int, *branches: tuple[str | None, list]):
        super().__init__()
        self.branches = [Branch(self, in_channels, steps, pool) for pool, steps in branches]
        self.out_channels = sum(branch.out_channels for branch in self.branches)

    def forward(self, x):
        return torch.cat([branch.run(self, x) for branch in self.branches], dim=1)


def block_35(in_channels: int, pooled: int) -> Mixed:
    return Mixed(
        in_channels,
        (None, [("branch1x1", 64, 1)]),
        (None, [("branch5x5_1", 48, 1), ("branch5x5_2", 64, 5)]),
        (None, [("branch3x3dbl_1", 64, 1), ("branch3x3dbl_2", 96, 3), ("branch3x3dbl_3", 96, 3)]),
        ("average", [("branch_pool", pooled, 1)]),
    )


def reduce_35_to_17(in_channels: int) -> Mixed:
    return Mixed(
        in_channels,
        (None, [("branch3x3", 384, 3, "stride 2")]),
        (None, [("branch3x3dbl_1", 64, 1), ("branch3x3dbl_2", 96, 3), ("branch3x3dbl_3", 96, 3, "stride 2")]),
        ("halve", []),
    )


def block_17(in_channels: int, inner: int) -> Mixed:
    row, column = (1, 7), (7, 1)
    double = [("branch7x7dbl_1", inner, 1), ("branch7x7dbl_2", inner, column), ("branch7x7dbl_3", inner, row)]
    double += [("branch7x7dbl_4", inner, column), ("branch7x7dbl_5", 192, row)]
    return Mixed(
        in_channels,
        (None, [("branch1x1", 192, 1)]),
        (None, [("branch7x7_1", inner, 1), ("branch7x7_2", inner, row), ("branch7x7_3", 192, column)]),
        (None, double),
        ("average", [("branch_pool", 192, 1)]),
    )


def reduce_17_to_8(in_channels: int) -> Mixed:
    long = [("branch7x7x3_1", 192, 1), ("branch7x7x3_2", 192, (1, 7)), ("branch7x7x3_3", 192, (7, 1))]
    return Mixed(
        in_channels,
        (None, [("branch3x3_1", 192, 1), ("branch3x3_2", 320, 3, "stride 2")]),
        (None, [*long, ("branch7x7x3_4", 192, 3, "stride 2")]),
        ("halve", []),
    )


def block_8(in_channels: int, pool: str) -> Mixed:
    row, column = (1, 3), (3, 1)
    double = [("branch3x3dbl_1", 448, 1), ("branch3x3dbl_2", 384, 3)]
    double += [("branch3x3dbl_3a", 384, row, "fork"), ("branch3x3dbl_3b", 384, column, "fork")]
    single = [("branch3x3_1", 384, 1), ("branch3x3_2a", 384, row, "fork"), ("branch3x3_2b", 384, column, "fork")]
    return Mixed(
        in_channels, (None, [("branch1x1", 320, 1)]), (None, single), (None, double), (pool, [("branch_pool", 192, 1)])
    )


class InceptionFeatures(nn.Module):
    """uint8 pictures (N, 3, H, W) of any size to features (N, num_features), float32.

    It stays in evaluation mode, and works as ``feature=`` of torchmetrics' ``FrechetInceptionDistance``.

    Args:
        num_features: 2048 (the one FID means), 768, 192 or 64: the layer whose spatial mean is taken.
    """

    space = INCEPTION

    def __init__(self, num_features: int = 2048):
        super().__init__()
        if num_features not in FEATURE_LAYERS:
            raise ValueError(f"num_features must be one of {sorted(FEATURE_LAYERS)}, got {num_features}")
        self.num_features = num_features
        self.Conv2d_1a_3x3 = ConvNormReLU(3, 32, 3, stride=2, same=False)
        self.Conv2d_2a_3x3 = ConvNormReLU(32, 32, 3, stride=1, same=False)
        self.Conv2d_2b_3x3 = ConvNormReLU(32, 64, 3, stride=1, same=True)
        self.Conv2d_3b_1x1 = ConvNormReLU(64, 80, 1, stride=1, same=True)
        self.Conv2d_4a_3x3 = ConvNormReLU(80, 192, 3, stride=1, same=False)
        self.Mixed_5b = block_35(192, pooled=32)
        self.Mixed_5c = block_35(256, pooled=64)
        self.Mixed_5d = block_35(288, pooled=64)
        self.Mixed_6a = reduce_35_to_17(288)
        self.Mixed_6b = block_17(768, inner=128)
        self.Mixed_6c = block_17(768, inner=160)
        self.Mixed_6d = block_17(768, inner=160)
        self.Mixed_6e = block_17(768, inner=192)
        self.Mixed_7a = reduce_17_to_8(768)
        self.Mixed_7b = block_8(1280, pool="average")
        self.Mixed_7c = block_8(2048, pool="max")
        self.requires_grad_(False).eval()

    def train(self, mode: bool = True) -> "InceptionFeatures":
        return super().train(False)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        require_uint8_pictures(images)
        device = self.Conv2d_1a_3x3.conv.weight.device
        with exact_float32(), torch.autocast(device.type, enabled=False):
            x = (resize_like_tensorflow(images.to(device).float(), INPUT_SIZE) - 128) / 128
            x = x.contiguous(memory_format=torch.channels_last)
            last = FEATURE_LAYERS[self.num_features]
            for name, layer in self.named_children():
                x = layer(x)
                if name in ("Conv2d_2b_3x3", "Conv2d_4a_3x3"):
                    x = F.max_pool2d(x, 3, stride=2)
                if name == last:
                    break
            return x.mean(dim=(2, 3))


def require_uint8_pictures(images: torch.Tensor) -> None:
    """Raise TypeError for anything but uint8 (N, 3, H, W): floats would have been scaled by an unknown rule."""
    if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] != 3:
        raise TypeError(f"expected uint8 pictures (N, 3, H, W), got {images.dtype} of shape {tuple(images.shape)}")


def resize_like_tensorflow(images: torch.Tensor, size: int) -> torch.Tensor:
    """Bilinear resize of TensorFlow 1 with its default arguments: output pixel i reads input position i * in / out.

    Args:
        images: (N, C, H, W) floating point.
    """

    def taps(extent: int):
        position = torch.arange(size, dtype=torch.float32, device=images.device) * (extent / size)
        low = position.floor().long()
        return low, (low + 1).clamp_max(extent - 1), (position - low).to(images.dtype)

    if images.shape[-2:] == (size, size):
        return images
    left, right, along_x = taps(images.shape[-1])
    top, bottom, along_y = taps(images.shape[-2])
    rows = images[..., left] + (images[..., right] - images[..., left]) * along_x
    return rows[..., top, :] + (rows[..., bottom, :] - rows[..., top, :]) * along_y[:, None]


@contextmanager
def exact_float32():
    """Full float32 products inside: TF32 keeps 10 bits of the mantissa and moves FID in the second decimal."""
    matmul, cudnn = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = matmul, cudnn
