"""Models as folders in Hugging Face's layout, written and read.

Each architecture of Transformers is a value (`architecture.py`) with tables of fields and of tensors that are read in
both directions. A model that none of them expresses keeps our names (`custom.py`).
"""

from training.weights.hf.architectures import ARCHITECTURES, READABLE
from training.weights.hf.fields import one_line
from training.weights.hf.read import read_config, read_weights
from training.weights.hf.write import to_saved_dtype, write_model

__all__ = ["ARCHITECTURES", "READABLE", "one_line", "read_config", "read_weights", "to_saved_dtype", "write_model"]
