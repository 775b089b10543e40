"""hpc_elastic: elastic MPI jobs in Python."""
