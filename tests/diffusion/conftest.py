"""Tiny random models, and one whose optimum is known in closed form."""

import pytest
import torch
from diffusers import AutoencoderKL, ConfigMixin, ModelMixin, UNet2DModel
from diffusers.configuration_utils import register_to_config

from dcngen.diffusion import LatentDiffusionPipeline, Objective

NUM_CLASSES = 3
UNET_ARGUMENTS = dict(
    sample_size=4,
    in_channels=4,
    out_channels=4,
    block_out_channels=(16, 32),
    layers_per_block=1,
    down_block_types=("DownBlock2D", "AttnDownBlock2D"),
    up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    norm_num_groups=8,
    attention_head_dim=8,
    num_class_embeds=NUM_CLASSES + 1,
)


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    """Models this small lose more to waiting threads than they gain."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def vae() -> AutoencoderKL:
    """4 latent channels, twice downsampled; a scale and a shift that matter."""
    torch.manual_seed(1)
    return AutoencoderKL(
        block_out_channels=(8, 16),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=4,
        norm_num_groups=4,
        scaling_factor=0.5,
        shift_factor=0.25,
    ).eval()


@pytest.fixture(scope="session")
def unet() -> UNet2DModel:
    torch.manual_seed(0)
    return UNet2DModel(**UNET_ARGUMENTS).eval()


@pytest.fixture
def pipeline(unet, vae) -> LatentDiffusionPipeline:
    pipeline = LatentDiffusionPipeline(unet, vae, Objective().scheduler_config(), class_names=["sea", "coast", "land"])
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture
def dcn_pipeline(vae) -> LatentDiffusionPipeline:
    """The same with DCNv4 everywhere, its offsets and masks moved off their zero initialisation."""
    from dcngen.models import DCNUNet2DModel

    torch.manual_seed(2)
    unet = DCNUNet2DModel(**UNET_ARGUMENTS, dcn_group_channels=8).eval()
    for name, parameter in unet.named_parameters():
        if "offset_mask" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    pipeline = LatentDiffusionPipeline(unet, vae, Objective().scheduler_config())
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


class GaussianModel(ModelMixin, ConfigMixin):
    """The best possible model of data x_0 ~ N(0, std^2), for the noise level that it is told.

    It believes the timestep, so that a sampler that tells it another level than the sample has ends elsewhere.
    """

    @register_to_config
    def __init__(
        self,
        std: float = 0.5,
        sample_size: int = 4,
        in_channels: int = 4,
        out_channels: int = 4,
        num_class_embeds: int | None = None,
    ):
        super().__init__()
        self.anchor = torch.nn.Parameter(torch.zeros(1))
        self.objective = Objective()
        self.calls = 0

    def forward(self, sample, timesteps, class_labels=None, return_dict=True):
        self.calls += 1
        if not self.objective.is_flow:
            assert torch.equal(timesteps, timesteps.round())
            timesteps = timesteps.long()
        alpha, sigma = (values.view(-1, 1, 1, 1) for values in self.objective.alpha_sigma(timesteps))
        variance = alpha**2 * self.config.std**2 + sigma**2
        noise = sigma / variance * sample  # E[eps | x_t]
        data = alpha * self.config.std**2 / variance * sample  # E[x_0 | x_t]
        if self.objective.prediction_type == "epsilon":
            return (noise,)
        return (noise - data if self.objective.is_flow else alpha * noise - sigma * data,)


@pytest.fixture
def gaussian_pipeline(vae):
    """A function from an objective to a pipeline around its `GaussianModel`."""

    def build(objective: Objective) -> LatentDiffusionPipeline:
        model = GaussianModel()
        model.objective = objective
        pipeline = LatentDiffusionPipeline(model, vae, objective.scheduler_config())
        pipeline.set_progress_bar_config(disable=True)
        return pipeline

    return build
