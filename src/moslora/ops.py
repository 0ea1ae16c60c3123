"""``moslora.core.ops`` under its short name."""

from moslora.core.ops import *  # noqa: F403
