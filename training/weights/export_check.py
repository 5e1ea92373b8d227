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


def check_export(folder: Path, model: GPT, n_vocab: int) -> str:
    """Open the folder in a new process and return one line about it. Raises UserError if its outputs differ."""
    widest = max(block.mixer.window or 0 for block in model.config.blocks)
    n_tokens = min(model.config.n_positions, max(128, min(widest + 16, MAX_TOKENS)))
    tokens_BT = torch.randint(n_vocab, (1, n_tokens), generator=torch.Generator().manual_seed(0))
    prompt_1T = tokens_BT[:1, : max(1, min(n_tokens // 4, 64))]
    n_new = min(16, model.config.n_positions - prompt_1T.shape[1])
    with torch.inference_mode():
        logits_BTV = model.logits(tokens_BT)[..., :n_vocab]
        continuation = greedy(model, prompt_1T, n_new, n_vocab)
    with tempfile.TemporaryDirectory() as scratch:
        probe = Path(scratch, "probe")
        save_file({"tokens": tokens_BT, "prompt": prompt_1T.clone(), "n_new": torch.tensor(n_new)}, probe)
        _open(folder, probe, Path(scratch, "modules"))
        outputs = load_file(f"{probe}.outputs")
        with safe_open(f"{probe}.outputs", framework="pt") as file:
            metadata = file.metadata()
    if outputs["logits"].shape != logits_BTV.shape:
        raise UserError(f"the export gives logits {tuple(outputs['logits'].shape)}, not {tuple(logits_BTV.shape)}")
    difference = float((outputs["logits"] - logits_BTV).abs().max())
    if not difference <= TOLERANCE * max(1.0, float(logits_BTV.abs().max())):
        problem = f"logits differ by {difference:.1e}"
    elif outputs["continuation"].tolist() != continuation:
        problem = "its greedy continuation differs"
    elif int(metadata["n_vocab"]) != n_vocab:
        problem = f"its tokenizer has {metadata['n_vocab']} tokens, not {n_vocab}"
    else:
        opened = f"opened by Transformers {metadata['version']} as {metadata['model']}"
        return f"{opened}: logits differ by {difference:.1e}, {n_new} greedy tokens are the same"
    raise UserError(f"the export is not the trained model: {problem}; nothing was written")


def greedy(model: GPT, prompt_1T: Tensor, n_new: int, n_vocab: int) -> list[int]:
    """Return the likeliest continuation, computed without a cache."""
    tokens_1T = prompt_1T
    for _ in range(n_new):
        likeliest_11 = model.logits(tokens_1T)[:, -1:, :n_vocab].argmax(-1)
        tokens_1T = torch.cat([tokens_1T, likeliest_11], dim=1)
    return tokens_1T[0, prompt_1T.shape[1] :].tolist()


def _open(folder: Path, probe: Path, modules: Path) -> None:
    """Run open_export.py, offline. Raises UserError with its last line if it fails."""
    offline = {"HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": str(modules), "TRANSFORMERS_VERBOSITY": "error"}
    command = [sys.executable, "-P", str(Path(__file__).with_name("open_export.py")), str(folder), str(probe)]
    result = subprocess.run(command, env=os.environ | offline, stdin=subprocess.DEVNULL, capture_output=True, text=True)
    if result.returncode:
        reason = (result.stderr.strip().splitlines() or ["no reason given"])[-1]
        raise UserError(f"Transformers does not open the export: {reason}; nothing was written")
