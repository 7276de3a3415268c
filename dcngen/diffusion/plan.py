"""SamplePlan: everything about a set of pictures apart from the model that draws them."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from typing import Any, Literal

from dcngen.diffusion.digests import json_digest
from dcngen.diffusion.pipeline import IMAGE_RULE, NUM_SEEDS
from dcngen.diffusion.schedulers import SAMPLERS

MixedPrecision = Literal["no", "fp16", "bf16"]


@dataclass(frozen=True)
class SamplePlan:
    """A set of pictures: picture i is drawn from seed + i and label i, by one sampler.

    Two models sampled under one plan differ by the models alone.

    Args:
        num_images: number of pictures, N.
        seed: seed of picture 0; picture i has seed + i, below 2**32.
        class_labels: labels to cycle through, picture i having class_labels[i % len(class_labels)]. None: all classes
            in turn, so that each has N / num_classes pictures, give or take one (and no label at all for an
            unconditional model).
        sampler: "ddim", "dpm-solver++", "euler" or "heun".
        steps: solver steps, 1 or more.
        guidance_scale: g in uncond + g * (cond - uncond); 1 turns guidance off.
        mixed_precision: autocast of the U-Net: "no", "fp16" or "bf16". The solver and the decoder are always fp32.
        image_rule: how a decoded picture becomes bytes; there is one rule, written down with the pictures.

    Raises:
        ValueError: a number out of range or an unknown name.
    """

    num_images: int = 64
    seed: int = 0
    class_labels: tuple[int, ...] | None = None
    sampler: str = "dpm-solver++"
    steps: int = 50
    guidance_scale: float = 1.0
    mixed_precision: MixedPrecision = "no"
    image_rule: str = IMAGE_RULE

    def __post_init__(self) -> None:
        if self.class_labels is not None:
            object.__setattr__(self, "class_labels", tuple(int(label) for label in self.class_labels))
            if not self.class_labels:
                raise ValueError(
                    "class_labels expected at least one label or None, got an empty list; None balances "
                    "the pictures over all classes"
                )
        object.__setattr__(self, "guidance_scale", float(self.guidance_scale))
        if self.num_images < 1:
            raise ValueError(f"num_images expected at least 1, got {self.num_images}")
        if self.seed < 0 or self.seed + self.num_images > NUM_SEEDS:
            raise ValueError(
                f"seeds expected to lie in [0, 2**32), got {self.seed} to "
                f"{self.seed + self.num_images - 1}; choose a smaller seed"
            )
        if self.sampler not in SAMPLERS:
            raise ValueError(f"sampler expected one of {', '.join(SAMPLERS)}, got {self.sampler!r}")
        if self.steps < 1:
            raise ValueError(f"steps expected at least 1, got {self.steps}; 50 is usual")
        if self.mixed_precision not in ("no", "fp16", "bf16"):
            raise ValueError(f"mixed_precision expected no, fp16 or bf16, got {self.mixed_precision!r}")
        if self.image_rule != IMAGE_RULE:
            raise ValueError(
                f"image_rule expected {IMAGE_RULE!r}, got {self.image_rule!r}: these pictures were made "
                "by another version; sample them again"
            )

    def labels(self, num_classes: int) -> list[int] | None:
        """The label of every picture for a model of `num_classes` classes; None for an unconditional model (0).

        Label `num_classes`, the null class, may be asked for by name in `class_labels`.

        Raises:
            ValueError: a label that the model does not have.
        """
        if num_classes == 0:
            if self.class_labels is not None:
                raise ValueError(f"class_labels expected None for an unconditional model, got {self.class_labels}")
            if self.guidance_scale != 1.0:
                raise ValueError(f"guidance_scale expected 1 for an unconditional model, got {self.guidance_scale}")
            return None
        cycle = self.class_labels if self.class_labels is not None else range(num_classes)
        wrong = sorted({label for label in cycle if not 0 <= label <= num_classes})
        if wrong:
            raise ValueError(f"class_labels expected 0 to {num_classes - 1} for this model, got {wrong}")
        return [cycle[i % len(cycle)] for i in range(self.num_images)]

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as written to plan.json."""
        values = asdict(self)
        return values | {"class_labels": list(self.class_labels) if self.class_labels is not None else None}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> SamplePlan:
        """Inverse of `to_dict`.

        Raises:
            ValueError: a key that a plan does not have.
        """
        unknown = sorted(set(values) - {field.name for field in fields(cls)})
        if unknown:
            raise ValueError(
                f"a plan expected the keys {', '.join(f.name for f in fields(cls))}, got {unknown} besides"
            )
        return cls(**values)

    def digest(self) -> str:
        """SHA-256 of the plan: equal digests mean the same seeds, labels, sampler and rounding."""
        return json_digest(self.to_dict())
