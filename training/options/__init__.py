"""How options are declared, read, checked and shown. Nothing here imports torch."""
