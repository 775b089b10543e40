"""A real Slurm cluster on one machine, for tests and demonstrations: all its state in one private directory."""

from .cluster import Cluster
from .processes import ClusterError

__all__ = ["Cluster", "ClusterError"]
