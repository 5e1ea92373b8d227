"""Write a trained model as a folder that Transformers opens, and see it opened.

python -m training.export --run runs/quickstart

The folder is opened in a fresh process, and its logits and a greedy continuation are compared with the trained
model's; where they differ, no folder is left. What has a home in Transformers (the table in docs/exports.md) is
written as that; anything else with a modeling file of its own.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from training.errors import UserError, command
from training.options.cli import Parser

if TYPE_CHECKING:
    from torch import Tensor

    from training.model import GPT

MOST_TOKENS = 2048  # compared, of a window that is wider
TOLERANCE = 1e-4  # of logits, relative to the largest where that is above one


def arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(prog="python -m training.export", description=__doc__)
    parser.add_argument("--run", required=True, help="folder of a run, finished or not, or of one of its checkpoints")
    parser.add_argument("--out", help="folder to write, which must not exist; default: RUN/export")
    parser.add_argument(
        "--dtype", default="fp32", choices=["fp32", "bf16", "fp16"], help="of the weights (default %(default)s)"
    )
    return parser.parse_args(argv)


@command
def main(argv: list[str] | None = None) -> int:
    """Run the command. Exit status: 0 done, 2 wrong input or an export that differs from the run, 130 interrupted."""
    args = arguments(argv)
    for line in export(args.run, args.out, args.dtype):
        print(line)
    return 0


def export(run: str, out: str | None, dtype_name: str) -> list[str]:
    """Write and verify; returns what to say. Raises UserError, and leaves no folder, where anything is wrong."""
    target = Path(out) if out is not None else Path(run, "export")
    if target.exists():
        raise UserError(f"{target}: is already there; choose another --out")
    from safetensors import SafetensorError

    from training.device import DTYPES
    from training.engine import load_run as trained
    from training.files import atomic_folder
    from training.model import GPT
    from training.weights import hf

    config, weights, tokenizer, step, _ = trained.read(run)
    n_vocab, dtype = tokenizer.vocab_size, DTYPES[dtype_name]
    rounded = GPT(config.model)
    rounded.load_state_dict(hf.to_saved_dtype(weights, dtype))
    try:
        with atomic_folder(target) as partial:
            kind = hf.write_model(partial, weights, config.model, tokenizer.end_of_text, n_vocab=n_vocab, dtype=dtype)
            tokenizer.save(partial)
            seen = verify(partial, rounded, n_vocab)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{target}: the model could not be written: {error}") from error
    own = kind not in hf.ARCHITECTURES
    call = f"AutoModelForCausalLM.from_pretrained({str(target)!r}{', trust_remote_code=True' if own else ''})"
    lines = [
        f"{target}: {kind}, {dtype_name}, step {step}",
        f"opened by Transformers {seen.version} as {seen.model}: logits differ by {seen.difference:.1e}, "
        f"{seen.n_same} greedy tokens are the same",
    ]
    if own:
        unfit: dict[str | None, list[str]] = {}
        for name, architecture in hf.ARCHITECTURES.items():
            unfit.setdefault(hf.reason_unsupported(architecture, weights, config.model), []).append(name)
        reasons = "; ".join(f"{reason} ({', '.join(names)})" for reason, names in unfit.items())
        lines.append(f"with a modeling file of its own; what does not fit: {reasons}")
        lines.append(f"AutoTokenizer.from_pretrained({str(target)!r}, trust_remote_code=True)")
    return [*lines, call]


class Seen(NamedTuple):
    """What a fresh process saw of an export."""

    model: str  # Transformers' class
    version: str
    difference: float  # the largest between logits
    n_same: int  # greedy tokens


def verify(folder: Path, model: GPT, n_vocab: int) -> Seen:
    """Open the folder in a fresh process and compare it with `model`, in float32. Raises UserError if they differ."""
    import torch
    from safetensors import safe_open
    from safetensors.torch import load_file, save_file

    widest = max(block.mixer.window or 0 for block in model.config.blocks)
    n_tokens = min(model.config.n_positions, max(128, min(widest + 16, MOST_TOKENS)))
    tokens_BT = torch.randint(n_vocab, (1, n_tokens), generator=torch.Generator().manual_seed(0))
    prompt_1T = tokens_BT[:1, : max(1, min(n_tokens // 4, 64))]
    n_new = min(16, model.config.n_positions - prompt_1T.shape[1])
    with torch.inference_mode():
        logits_BTV = model.logits(tokens_BT)[..., :n_vocab]
        continuation = greedy(model, prompt_1T, n_new, n_vocab)
    with tempfile.TemporaryDirectory() as place:
        probe = Path(place, "probe")
        save_file({"tokens": tokens_BT, "prompt": prompt_1T.clone(), "n_new": torch.tensor(n_new)}, probe)
        _reopen(folder, probe, Path(place, "modules"))
        answer = load_file(f"{probe}.answer")
        with safe_open(f"{probe}.answer", framework="pt") as file:
            said = file.metadata()
    if answer["logits"].shape != logits_BTV.shape:
        raise UserError(f"the export gives logits {tuple(answer['logits'].shape)}, not {tuple(logits_BTV.shape)}")
    difference = float((answer["logits"] - logits_BTV).abs().max())
    if not difference <= TOLERANCE * max(1.0, float(logits_BTV.abs().max())):
        raise UserError(f"the export is not the trained model: logits differ by {difference:.1e}; nothing was written")
    if answer["continuation"].tolist() != continuation:
        raise UserError("the export is not the trained model: its greedy continuation differs; nothing was written")
    if int(said["n_vocab"]) != n_vocab:
        raise UserError(f"the export's tokenizer has {said['n_vocab']} tokens, not {n_vocab}; nothing was written")
    return Seen(said["model"], said["version"], difference, n_new)


def greedy(model: GPT, prompt_1T: Tensor, n_new: int, n_vocab: int) -> list[int]:
    """The likeliest next tokens, one after the other, all computed anew for each."""
    import torch

    tokens_1T = prompt_1T
    for _ in range(n_new):
        likeliest_11 = model.logits(tokens_1T)[:, -1:, :n_vocab].argmax(-1)
        tokens_1T = torch.cat([tokens_1T, likeliest_11], dim=1)
    return tokens_1T[0, prompt_1T.shape[1] :].tolist()


def _reopen(folder: Path, probe: Path, modules: Path) -> None:
    """Run open_export.py, offline. Raises UserError with its last line where it fails."""
    offline = {"HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": str(modules), "TRANSFORMERS_VERBOSITY": "error"}
    script = Path(__file__).with_name("weights") / "open_export.py"
    done = subprocess.run(
        [sys.executable, "-P", str(script), str(folder), str(probe)],
        env=os.environ | offline,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
    )
    if done.returncode:
        said = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
        raise UserError(f"Transformers does not open the export: {said}; nothing was written")


if __name__ == "__main__":
    sys.exit(main())
