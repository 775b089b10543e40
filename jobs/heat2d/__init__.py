"""A heated plate on distributed arrays."""
