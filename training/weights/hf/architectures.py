"""The architectures of Transformers that models are written as and read from."""

from training.weights.hf.architecture import Architecture
from training.weights.hf.custom import CUSTOM, MODEL_TYPE
from training.weights.hf.deepseek import DEEPSEEK_V3, DOTS1, GLM4_MOE
from training.weights.hf.ernie import ERNIE4_5_MOE
from training.weights.hf.gpt2 import GPT2
from training.weights.hf.llama import LLAMA
from training.weights.hf.mixtral import MIXTRAL
from training.weights.hf.qwen3 import QWEN3, QWEN3_MOE

# By `model_type`; a model is written as the first that expresses it.
ARCHITECTURES: dict[str, Architecture] = {
    "gpt2": GPT2,
    "llama": LLAMA,
    "qwen3": QWEN3,
    "qwen3_moe": QWEN3_MOE,
    "mixtral": MIXTRAL,
    "ernie4_5_moe": ERNIE4_5_MOE,
    "dots1": DOTS1,
    "glm4_moe": GLM4_MOE,
    "deepseek_v3": DEEPSEEK_V3,
}
READABLE = ARCHITECTURES | {MODEL_TYPE: CUSTOM}
