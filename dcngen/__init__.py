"""dcngen: latent diffusion with deformable convolution v4, trained, sampled and compared.

Importing the package is cheap and never fails: torch is imported by the parts that need it.
"""

__version__ = "0.1.0"
