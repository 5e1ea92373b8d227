"""Several processes: the only package that imports torch.distributed. docs/distributed.md lists its files."""
