"""Slurm, read and commanded through one seam: `reading.Slurm`, with the commands or pyslurm behind it."""
