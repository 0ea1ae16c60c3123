"""What this package needs of PEFT beyond its public functions: 0.18 to 0.21.2.

``base_tuner.py``, ``base_layer.py``, ``state_hooks.py``, ``state_dict.py``, ``quantization.py``: what PEFT 0.21 has and
older versions lack. ``functions.py``: single functions. ``registration.py``: PEFT's tables. ``patches.py``: changes of
its functions. ``docs/versions.md`` has the table for users.
"""

# First, and before any file of this package: PEFT's import ends with the registration, which imports them.
import peft  # noqa: F401
