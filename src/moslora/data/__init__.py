"""Data files, examples and token ids."""
