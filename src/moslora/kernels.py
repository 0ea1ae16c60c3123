"""``moslora.core.kernels`` under its short name."""

from moslora.core.kernels import *  # noqa: F403
