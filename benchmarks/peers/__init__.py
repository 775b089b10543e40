"""Elastic training of one model by hpc_elastic, Horovod Elastic and torchrun, side by side."""
