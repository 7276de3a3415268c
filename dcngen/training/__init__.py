"""Training: the autoencoder, the latent U-Net and the run folder. `train_ldm.py` puts the parts in order."""

from dcngen.training.autoencoder import Autoencoder, load_or_train_autoencoder, set_latent_statistics
from dcngen.training.batches import LatentBatches
from dcngen.training.build import build_optimizer, build_unet, has_classes
from dcngen.training.checkpoint import Progress
from dcngen.training.describe import describe, total_batch_size
from dcngen.training.ema import EMA
from dcngen.training.grids import arrange_grid, build_pipeline, sample_grid, save_pipeline
from dcngen.training.logs import RunLog
from dcngen.training.loop import Interrupted, Trainer, TrainState, resume
from dcngen.training.record import describe_run
from dcngen.training.run_folder import RunFolder, continue_run, find_run, open_run
from dcngen.training.start import start_accelerator

__all__ = [
    "EMA",
    "Autoencoder",
    "Interrupted",
    "LatentBatches",
    "Progress",
    "RunFolder",
    "RunLog",
    "TrainState",
    "Trainer",
    "arrange_grid",
    "build_optimizer",
    "build_pipeline",
    "build_unet",
    "continue_run",
    "describe",
    "describe_run",
    "find_run",
    "has_classes",
    "load_or_train_autoencoder",
    "open_run",
    "resume",
    "sample_grid",
    "save_pipeline",
    "set_latent_statistics",
    "start_accelerator",
    "total_batch_size",
]
