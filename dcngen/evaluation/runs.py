"""A finished training run as the comparison sees it: its folder, read once."""

import json
import math
from dataclasses import dataclass, field, fields
from pathlib import Path

import torch
import yaml

from dcngen.data import DataConfig

# What may differ between two arms of a comparison without touching what is compared.
BOOKKEEPING = ("name", "output_dir", "logging", "sampling", "checkpoint", "data.cache_dir", "data.source")


@dataclass
class Run:
    """A run folder.

    Attributes:
        folder: ``runs/<name>``.
        config: the resolved configuration (``config.yaml``).
        record: what training wrote down about itself (``run.json``); empty if it did not.
        metrics: the lines of ``metrics.jsonl``, in order.
    """

    folder: Path
    config: dict
    record: dict
    metrics: list[dict] = field(repr=False)

    @classmethod
    def open(cls, folder: str | Path) -> "Run":
        """Read a run folder.

        Raises:
            FileNotFoundError: no such folder, or it has no configuration.
        """
        folder = Path(folder)
        config = folder / "config.yaml"
        if not config.is_file():
            raise FileNotFoundError(
                f"{folder} is not a finished run: expected {config} (train one with "
                f"`accelerate launch train_ldm.py --config configs/<name>.yaml`)"
            )
        record = folder / "run.json"
        return cls(
            folder,
            yaml.safe_load(config.read_text()) or {},
            json.loads(record.read_text()) if record.is_file() else {},
            _read_metrics(folder / "metrics.jsonl"),
        )

    @property
    def name(self) -> str:
        return self.folder.resolve().name

    @property
    def data_config(self) -> DataConfig:
        known = {f.name for f in fields(DataConfig)}
        return DataConfig(**{key: value for key, value in self.config.get("data", {}).items() if key in known})

    def load_pipeline(self):
        """The pipeline with the averaged weights, on the CPU."""
        from dcngen.diffusion.loading import load_run

        return load_run(self.folder)

    @property
    def training(self) -> dict:
        """Pictures a second, seconds and pictures seen, as far as they were written down."""
        last = self.metrics[-1] if self.metrics else {}
        rates = sorted(m["images_per_second"] for m in self.metrics if m.get("images_per_second"))
        known = last | {"images_per_second": rates[len(rates) // 2] if rates else None} | self.record
        names = ("images_per_second", "train_seconds", "num_images_seen", "step", "device_name")
        return {name: known.get(name) for name in names}


def _read_metrics(path: Path) -> list[dict]:
    if not path.is_file():
        return []
    lines = []
    for line in path.read_text().splitlines():
        try:
            lines.append(json.loads(line))
        except json.JSONDecodeError:
            continue  # the last line of a run that was killed while writing
    return lines


def flatten(tree: dict, prefix: str = "") -> dict:
    """Nested mapping to dotted keys."""
    flat = {}
    for key, value in tree.items():
        if isinstance(value, dict):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def recipe(run: Run) -> dict:
    """What a run was trained by: its dotted configuration keys without bookkeeping and the training seed."""
    return {key: value for key, value in _settings(run).items() if key != "seed"}


def _settings(run: Run) -> dict:
    flat = flatten(run.config)
    return {key: value for key, value in flat.items() if not {key, key.split(".")[0]} & set(BOOKKEEPING)}


def config_differences(runs: list[Run]) -> dict[str, list]:
    """Dotted configuration keys whose values differ between the runs, bookkeeping left out."""
    flats = [_settings(run) for run in runs]
    keys = sorted(set().union(*flats))
    values = {key: [flat.get(key) for flat in flats] for key in keys}
    return {key: row for key, row in values.items() if any(value != row[0] for value in row)}


def require_comparable(runs: list[Run], vae_digests: list[str], data_digests: list[str], allow: bool) -> list[str]:
    """Refuse runs that differ in what must be shared; with ``allow``, return the differences as warnings.

    Raises:
        ValueError: another autoencoder, data set or objective, and ``allow`` is false.
    """
    shared = {
        "autoencoder": vae_digests,
        "data set": data_digests,
        "objective": [json.dumps(run.config.get("objective", {}), sort_keys=True) for run in runs],
    }
    problems = []
    for what, values in shared.items():
        for run, value in zip(runs[1:], values[1:], strict=True):
            if value != values[0]:
                problems.append(
                    f"{run.name} and {runs[0].name} differ in their {what} ({value[:60]}, {values[0][:60]})"
                )
    if problems and not allow:
        raise ValueError(
            "these runs cannot be compared:\n  " + "\n  ".join(problems) + "\n"
            "train them with the same autoencoder, data and objective, or pass --allow-different to compare anyway"
        )
    return problems


def unequal_training(runs: list[Run]) -> list[str]:
    """A warning if the runs did not see the same number of pictures in training."""
    seen = [(run.name, run.training["num_images_seen"]) for run in runs]
    if len({count for _, count in seen}) == 1:
        return []
    counts = ", ".join(f"{name} {count:,}" if count else f"{name} unknown" for name, count in seen)
    return [f"the runs saw different numbers of pictures in training: {counts}"]


def unet_flops(unet: torch.nn.Module) -> int | None:
    """Floating-point operations of one U-Net evaluation on one sample (a multiply-add counts 2), or None.

    Counted on the meta device by torch's flop counter: convolutions, matrix products, attention, and DCNv4 at 8 a tap
    and channel (four corners, a multiply-add each). Norms and activations are not counted.
    """
    from torch.utils.flop_counter import FlopCounterMode

    try:
        with torch.device("meta"):
            model = type(unet)(**{k: v for k, v in dict(unet.config).items() if not k.startswith("_")})
            size = unet.config.sample_size
            height, width = (size, size) if isinstance(size, int) else size
            sample = torch.empty(1, unet.config.in_channels, height, width)
            timestep = torch.empty((1,), dtype=torch.int64)
            labels = torch.empty((1,), dtype=torch.int64) if unet.config.num_class_embeds else None
        counter = FlopCounterMode(display=False, custom_mapping=_custom_flops())
        with counter, torch.no_grad():
            model(sample, timestep, class_labels=labels)
        return int(counter.get_total_flops())
    except (NotImplementedError, RuntimeError, TypeError):
        return None  # a layer that cannot run without data; the number is an extra


def _custom_flops() -> dict:
    """Rules for torch's flop counter: our operators' shapes to operations."""

    def of_taps(out_shape, scalars) -> int:
        kernel_h, kernel_w, *_, remove_center, _softmax = scalars[:SCALAR_COUNT]  # packed_bias may follow
        return 8 * math.prod(out_shape) * (kernel_h * kernel_w - (1 if remove_center else 0))

    def separate(input_shape, offset_mask_shape, *scalars, out_shape=None, **_) -> int:
        return of_taps(out_shape, scalars)

    def packed(packed_shape, channels, *scalars, out_shape=None, **_) -> int:
        return of_taps(out_shape, scalars)

    def packed_linear(packed_shape, weight, bias, channels, save_output, *scalars, out_shape=None, **_) -> int:
        pixels = math.prod(out_shape[0][:-1])
        return of_taps((pixels, channels), scalars) + 2 * pixels * math.prod(weight)

    if not hasattr(torch.ops, "dcngen") or not hasattr(torch.ops.dcngen, "dcnv4"):
        return {}
    from dcngen.ops.dcnv4 import SCALAR_COUNT

    operators = torch.ops.dcngen
    return {
        operators.dcnv4: separate,
        operators.dcnv4_packed: packed,
        operators.dcnv4_packed_linear: packed_linear,
    }
