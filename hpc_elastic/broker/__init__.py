"""Brokers: where slots for ranks come from."""
