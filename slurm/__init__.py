"""Slurm: batch scripts, and a cluster for tests."""
