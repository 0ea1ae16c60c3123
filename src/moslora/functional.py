"""``moslora.core.functional`` under its short name."""

from moslora.core.functional import *  # noqa: F403
