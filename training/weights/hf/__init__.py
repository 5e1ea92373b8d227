"""Models as folders in Hugging Face's layout, written and read by the tables of an architecture (`architecture.py`).

A model that fits no architecture of Transformers keeps our names (`custom.py`).
"""

from training.weights.hf.model_folder import (
    ARCHITECTURES,
    CONFIG,
    open_weights,
    read_config,
    read_weights,
    to_saved_dtype,
    weight_files,
    write_model,
)
from training.weights.hf.tables import one_line
