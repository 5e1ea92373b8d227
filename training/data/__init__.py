"""From text to batches: `prepare` tokenizes once, `Samples` reads samples by index, `Loader` reads a step's batch."""

from training.data.dataset import Dataset, prepare
from training.data.loader import Loader, Samples, build_samples
from training.data.shards import Split
from training.data.tokenizer import Tokenizer
