"""The program of a process that tokenizes: `python -m training.data.worker FOLDER_OF_THE_TOKENIZER`.

A line of JSON with texts comes in; a line of JSON with the number of tokens in each goes out, then the tokens.
It ends when its input does, and so also when its owner is killed.
"""

from __future__ import annotations

import json
import signal
import sys

from training.data.tokenizer import Tokenizer


def work(folder: str) -> None:
    """Answer requests until there are no more."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the owner, who then ends this process
    tokenizer = Tokenizer.load(folder)
    for line in sys.stdin.buffer:
        ids = tokenizer.encode_batch(json.loads(line))
        sys.stdout.buffer.write(json.dumps([len(each) for each in ids]).encode() + b"\n")
        sys.stdout.buffer.writelines(each.tobytes() for each in ids)
        sys.stdout.buffer.flush()


if __name__ == "__main__":
    work(sys.argv[1])
