"""MoSLoRA (arXiv:2406.11909) for PyTorch and Hugging Face: train with a mixer, ship a plain LoRA.

Importing it registers the method with PEFT, so that configurations and checkpoints of type ``"MOSLORA"``
work wherever PEFT's do.
"""

from moslora.tuner.config import MoSLoRAConfig
from moslora.tuner.model import MoSLoRAModel, register

__version__ = "0.1.0"
__all__ = ["MoSLoRAConfig", "MoSLoRAModel"]

register()
