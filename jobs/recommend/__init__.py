"""Recommendation: which films somebody will like next."""
