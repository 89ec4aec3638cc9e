"""sqap: quantization and visual token pruning for vision-language-action policies."""

from sqap import openmp as openmp  # before PyTorch
from sqap.build import __version__ as __version__
from sqap.checkpoints import load
from sqap.compress import compress
from sqap.observation import Camera, Observation
from sqap.policy import Policy
from sqap.quantization.inplace import quantize_
from sqap.recipe import Recipe, Scheme

__all__ = ["Camera", "Observation", "Policy", "Recipe", "Scheme", "compress", "load", "quantize_"]
