"""The broker for Slurm."""
