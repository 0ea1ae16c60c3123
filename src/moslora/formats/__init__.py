"""One file per adapter format, each with ``read`` and/or ``write``."""
