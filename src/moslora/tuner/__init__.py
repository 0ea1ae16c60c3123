"""The live adapter: PEFT's grammar for MoSLoRA."""

# First, and before any file of this package: PEFT's import ends with the registration, which imports them.
import peft  # noqa: F401
