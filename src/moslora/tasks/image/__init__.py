"""Text-to-image models."""
