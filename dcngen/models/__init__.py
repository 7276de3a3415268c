"""U-Nets with DCNv4 in the place of convolutions and attention."""

from dcngen.models.operators import LevelOperators, operators_by_level
from dcngen.models.swap import count_parameters, load_unet, swap_operators
from dcngen.models.unet import DCNUNet2DModel

__all__ = [
    "DCNUNet2DModel",
    "LevelOperators",
    "count_parameters",
    "load_unet",
    "operators_by_level",
    "swap_operators",
]
