import pytest
import torch

from dcngen.models import DCNUNet2DModel

TINY = {
    "sample_size": 8,
    "in_channels": 4,
    "out_channels": 4,
    "block_out_channels": (16, 32),
    "layers_per_block": 1,
    "norm_num_groups": 8,
    "attention_head_dim": 8,
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
    "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
    "num_class_embeds": 4,  # three classes and the null class
}
STOCK = {"conv_operator": "conv", "attention_operator": "attention"}
DCN = {"conv_operator": "dcnv4", "attention_operator": "dcnv4"}


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.fixture
def tiny():
    """The arguments of a small UNet2DModel: two levels, attention at the lower one."""
    return dict(TINY)


@pytest.fixture
def make_unet():
    """make_unet(**options) -> a small DCNUNet2DModel."""
    return lambda **options: DCNUNet2DModel(**(TINY | options))


@pytest.fixture(params=[STOCK, DCN], ids=["stock", "dcnv4"])
def arm(request):
    """The options of the baseline, then those of the DCNv4 model."""
    return dict(request.param)


@pytest.fixture
def make_batch():
    """make_batch(n) -> positional arguments of the model: sample, timestep, class labels."""
    return lambda n=3: (torch.randn(n, 4, 8, 8), torch.randint(0, 1000, (n,)), torch.randint(0, 4, (n,)))


@pytest.fixture
def randomize():
    """Adds noise to every parameter, so that zero initialisations hide nothing."""

    def apply(model, scale=0.05):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter), alpha=scale)
        return model

    return apply
