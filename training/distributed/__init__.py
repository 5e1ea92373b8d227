"""Training on several ranks. Only this package imports torch.distributed; docs/distributed.md lists its files."""
