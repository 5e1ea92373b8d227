"""From text to batches: `prepare` tokenizes once, `Samples` serves any sample by its index."""

from training.data.loader import Samples
from training.data.prepare import Dataset, prepare
from training.data.shards import Split
from training.data.tokenizer import Tokenizer

__all__ = ["Dataset", "Samples", "Split", "Tokenizer", "prepare"]
