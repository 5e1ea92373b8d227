"""From text to batches: `prepare` tokenizes once, `Batches` serves any sample by its index."""

from training.data.loader import Batches
from training.data.prepare import Dataset, prepare
from training.data.shards import Split
from training.data.tokenizer import Tokenizer

__all__ = ["Batches", "Dataset", "Split", "Tokenizer", "prepare"]
