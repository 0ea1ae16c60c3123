"""Base models: names, files on disk, loading."""
