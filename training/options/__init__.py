"""Reading, checking and showing options. Nothing here imports torch."""
