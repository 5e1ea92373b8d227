"""Writing and reading of models as folders in Hugging Face's layout.

Each architecture of Transformers is an object (`architecture.py`) with tables of fields and of tensors (`tables.py`),
which both writing and reading use. A model that fits none of them keeps our names (`custom.py`).
"""

from training.weights.hf.model_folder import ARCHITECTURES, read_config, read_weights, to_saved_dtype, write_model
from training.weights.hf.tables import one_line

__all__ = ["ARCHITECTURES", "one_line", "read_config", "read_weights", "to_saved_dtype", "write_model"]
