"""A run: its stages, its directory, and the proof at its end."""
