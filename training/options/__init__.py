"""Read, check and print options. Nothing here imports torch."""
