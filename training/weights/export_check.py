"""Compare what Transformers computes from an export with the trained model."""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from training.errors import UserError
from training.model import GPT

MAX_TOKENS = 2048  # upper limit of the comparison, if a window is wider
TOLERANCE = 1e-4  # of logits, relative to the largest one if that is above 1


def check_export(folder: Path, model: GPT, tokenizer_size: int) -> str:
    """Open the folder in a new process and return one line about it. Raises UserError if its outputs differ."""
    n_positions, widest = model.config.n_positions, max(block.mixer.window or 0 for block in model.config.blocks)
    n_tokens = min(n_positions, max(128, min(widest + 16, MAX_TOKENS)))
    tokens_BT = torch.randint(tokenizer_size, (1, n_tokens), generator=torch.Generator().manual_seed(0))
    prompt_1T = tokens_BT[:1, : max(1, min(n_tokens // 4, 64))]
    n_new = min(16, n_positions + 1 - prompt_1T.shape[1])  # the model does not read the last one
    with tempfile.TemporaryDirectory() as scratch:
        probe = Path(scratch, "probe")
        save_file({"tokens": tokens_BT, "prompt": prompt_1T.clone(), "n_new": torch.tensor(n_new)}, probe)
        _open(folder, probe, Path(scratch, "modules"))
        outputs = load_file(f"{probe}.outputs")
        with safe_open(f"{probe}.outputs", framework="pt") as file:
            metadata = file.metadata()
    with torch.inference_mode():
        logits_BTV = model.logits(tokens_BT)
    if outputs["logits"].shape != logits_BTV.shape:
        raise UserError(f"the export gives logits {tuple(outputs['logits'].shape)}, not {tuple(logits_BTV.shape)}")
    difference = float((outputs["logits"] - logits_BTV).abs().max())
    tolerance = TOLERANCE * max(1.0, float(logits_BTV.abs().max()))
    if not difference <= tolerance:
        problem = f"logits differ by {difference:.1e}"
    elif not distance_to_greedy(model, prompt_1T, outputs["continuation"]) <= 2 * tolerance:
        problem = "its greedy continuation differs"
    elif int(metadata["n_vocab"]) != tokenizer_size:
        problem = f"its tokenizer has {metadata['n_vocab']} tokens, not {tokenizer_size}"
    else:
        opened = f"opened by Transformers {metadata['version']} as {metadata['model']}"
        return f"{opened}: logits differ by {difference:.1e}, {n_new} greedy tokens are the same"
    raise UserError(f"the export is not the trained model: {problem}; nothing was written")


@torch.inference_mode()
def distance_to_greedy(model: GPT, prompt_1T: Tensor, continuation_T: Tensor) -> float:
    """Return how far the logit of a token of the continuation is below the largest one, at most.

    Tokens themselves cannot be compared: rounding decides between two that are equally likely.
    """
    text_1T = torch.cat([prompt_1T, continuation_T[None]], dim=1)
    logits_TV = model.logits(text_1T[:, :-1])[0, prompt_1T.shape[1] - 1 :]
    return float((logits_TV.amax(1) - logits_TV.gather(1, continuation_T[:, None])[:, 0]).max())


def _open(folder: Path, probe: Path, modules: Path) -> None:
    """Run open_export.py, offline. Raises UserError with its last line if it fails."""
    offline = {"HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": str(modules), "TRANSFORMERS_VERBOSITY": "error"}
    command = [sys.executable, "-P", str(Path(__file__).with_name("open_export.py")), str(folder), str(probe)]
    result = subprocess.run(command, env=os.environ | offline, stdin=subprocess.DEVNULL, capture_output=True, text=True)
    if result.returncode:
        reason = (result.stderr.strip().splitlines() or ["no reason given"])[-1]
        raise UserError(f"Transformers does not open the export: {reason}; nothing was written")
