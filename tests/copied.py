"""`training.train` whose saves wait for their copies, so that every run sends the same requests.

main(ARGUMENTS)     in a process of its own (`warm.py`)
"""

from training.checkpoint import Copier
from training.train import main as train

start = Copier.start


def start_and_wait(copier: Copier) -> None:
    """Start a copy and wait for it; for `Copier.start`."""
    start(copier)
    with copier._condition:
        copier._is_over(60)


def main(arguments: list[str]) -> int:
    """Train; the thread that writes checkpoints waits for the copy of each."""
    Copier.start = start_and_wait
    return train(arguments)
