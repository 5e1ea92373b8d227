"""The runs of a folder and the caches of their text: `python -m training.runs`."""
