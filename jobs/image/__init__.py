"""Image recognition: upright or upside down, or ten classes."""
