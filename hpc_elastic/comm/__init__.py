"""Membership: the only room that speaks MPI. Modules here import mpi4py when they are imported, `vendor` apart."""
