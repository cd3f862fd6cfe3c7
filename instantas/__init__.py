"""InstantAS: minimum coverage sampling for arbitrary-size image generation."""

__version__ = "0.1.0"
