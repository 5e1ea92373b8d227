"""Everything about several processes; the only package that imports torch.distributed."""
