"""Writing and reading of models as folders in Hugging Face's layout.

Each architecture of Transformers is an object (`architecture.py`) with tables of fields and of tensors, which both
writing and reading use. A model that fits none of them keeps our names (`custom.py`).
"""

from training.weights.hf.architectures import ARCHITECTURES, READABLE
from training.weights.hf.fields import one_line
from training.weights.hf.read import read_config, read_weights
from training.weights.hf.write import to_saved_dtype, write_model

__all__ = ["ARCHITECTURES", "READABLE", "one_line", "read_config", "read_weights", "to_saved_dtype", "write_model"]
