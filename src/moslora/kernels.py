"""``moslora.core.kernels.update`` under its short name."""

from moslora.core.kernels.update import *  # noqa: F403
