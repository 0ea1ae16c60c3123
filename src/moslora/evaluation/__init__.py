"""A base and its adapter side by side on the same items."""
