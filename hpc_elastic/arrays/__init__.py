"""Arrays: on the host in `host`, on GPUs in `gpu`."""
