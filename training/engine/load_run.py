"""Load a trained model for evaluation, generation and export: from the folder of a run, finished or not.

`load_model` also opens a folder or hub name that `init_from` takes: an export, or a model of others such as GPT-2.
"""

from pathlib import Path
from typing import NamedTuple

import torch
from pydantic import ValidationError
from torch import Tensor

from training import checkpoint
from training import device as devices
from training.checkpoint import Checkpoint
from training.config import Config, ModelConfig, ParallelConfig
from training.data import Tokenizer
from training.data.tokenizer import from_files
from training.errors import UserError
from training.kernels.choose import choose_kernels
from training.model import GPT, kernel_requirements
from training.optim.optimizer import averages_in
from training.terminal import print_note
from training.weights import hf
from training.weights.init_from import local_folder

ATTEMPTS = 3  # to read the latest checkpoint: a run in training may remove it meanwhile


class LoadedRun(NamedTuple):
    """A checkpoint's weights, configuration, tokenizer, step, text and vocabulary."""

    config: Config
    weights: dict[str, Tensor]  # float32
    tokenizer: Tokenizer
    step: int
    data: str  # fingerprint of the text it was trained on
    n_vocab: int  # tokens that the model predicts; later rows of the embedding are padding
    averages: dict[str, Tensor]  # the averaged parameters; {} if the run has none yet


def load_run(run: str) -> LoadedRun:
    """Read the latest intact checkpoint of the run in folder `run`, or the checkpoint at `run` itself.

    Raises UserError if there is none, or if its weights do not fit its configuration.
    """
    path, loaded = _latest(Path(run).resolve())
    if loaded is None:
        raise UserError(f"--run {run}: no run with a checkpoint; name a run's folder such as runs/quickstart")
    try:
        config, step, data = (loaded.state[name] for name in ("config", "step", "data"))
        config = Config.model_validate(config)
    except ValidationError as error:
        message = error.errors()[0]["msg"]
        raise UserError(f"{path}: its configuration is not one of this version: {message}") from error
    except (KeyError, TypeError):
        raise UserError(f"{path / 'state.json'}: not the state of a run") from None
    if not _has_weights_of(config.model, loaded.model):
        raise UserError(f"{path}: its weights are not those of the model in its configuration")
    n_vocab = loaded.state.get("n_vocab") or config.model.vocab_size  # older versions: all rows are tokens
    if n_vocab not in range(1, config.model.vocab_size + 1):
        raise UserError(f"{path / 'state.json'}: n_vocab: {n_vocab!r} is no number of rows of the embedding")
    tokenizer = Tokenizer.load(path.parent.parent / "tokenizer")
    return LoadedRun(config, loaded.model, tokenizer, step, data, n_vocab, averages_in(loaded.optimizer))


def mean_of_checkpoints(run: str, n: int) -> tuple[dict[str, Tensor], list[int]]:
    """Return the mean of the weights of a run's newest n checkpoints, float32, and their steps.

    Raises UserError if fewer are there, or if one is damaged.
    """
    if (Path(run) / checkpoint.MANIFEST).is_file():
        raise UserError(f"--average {n}: {run} is one checkpoint; give --run the run's folder")
    there = checkpoint.list_checkpoints(Path(run) / "checkpoints")
    if len(there) < n:
        raise UserError(f"--average {n}: {run} has {len(there)} checkpoints; checkpoint.keep sets how many are kept")
    means: dict[str, Tensor] = {}
    for number, (_, path) in enumerate(there[-n:], start=1):
        for name, tensor in checkpoint.load(path).model.items():
            mean = means.setdefault(name, tensor.double())
            mean += (tensor - mean) / number
    return {name: mean.float() for name, mean in means.items()}, [step for step, _ in there[-n:]]


class LoadedModel(NamedTuple):
    """A network ready for inference, with its tokenizer."""

    model: GPT
    tokenizer: Tokenizer
    title: str  # "step N" of a run; else the name of the folder
    run: (
        LoadedRun | None
    )  # None: the model of an exported or downloaded folder, which has no options or text of its own


def load_model(name: str, device_name: str = "auto") -> LoadedModel:
    """Load the model of a run, a checkpoint, or a folder or hub name that `init_from` takes, on its device.

    Raises UserError if it cannot be read.
    """
    run, device = None, devices.select_device(device_name)
    if _is_run(Path(name)):
        run = load_run(name)
        config, weights, tokenizer, n_vocab = run.config.model, run.weights, run.tokenizer, run.n_vocab
        title, dtype = f"step {run.step}", devices.DTYPES[run.config.precision]
    else:
        config, weights, tokenizer = read_pretrained(name)
        title, dtype, n_vocab = name, torch.float32, config.vocab_size  # fp32: its figures equal Transformers'
    choice = choose_kernels(ParallelConfig(), kernel_requirements(config), device=device, dtype=dtype)
    model = GPT(config, choice.kernels, dtype, n_vocab)
    model.load_state_dict(model.state_dict() | weights)
    return LoadedModel(model.to(device).cast_for_inference(), tokenizer, title, run)


def read_pretrained(name: str) -> tuple[ModelConfig, dict[str, Tensor], Tokenizer]:
    """Return the model, float32 weights and tokenizer of a folder or hub name. Raises UserError if one is missing."""
    folder = local_folder(name, ["*.json", "*.safetensors", "merges.txt"], "--run")
    if not (folder / hf.CONFIG).is_file():
        raise UserError(f"--run {name}: no run with a checkpoint, and no folder with a {hf.CONFIG} and weights")
    architecture, config = hf.read_config(folder)
    weights = hf.read_weights(folder, architecture, config)
    tokenizer = from_files(folder)
    if tokenizer.vocab_size > config.vocab_size:
        problem = f"its tokenizer has {tokenizer.vocab_size:,} tokens, more than vocab_size {config.vocab_size:,}"
        raise UserError(f"--run {name}: {problem} of {hf.CONFIG}; do they belong together?")
    return config, weights, tokenizer


def _is_run(folder: Path) -> bool:
    """Return True for the folder of a run or of a checkpoint, damaged or not."""
    has_checkpoints = (folder / "checkpoints").is_dir() and not (folder / hf.CONFIG).exists()
    return has_checkpoints or (folder / checkpoint.MANIFEST).is_file()


def _has_weights_of(config: ModelConfig, weights: dict[str, Tensor]) -> bool:
    """Return True if names and shapes are the model's, by building it on the meta device, which takes no memory."""
    if config.vocab_size is None or config.n_layer > len(weights):
        return False
    try:
        with torch.device("meta"):
            shapes = {name: tensor.shape for name, tensor in GPT(config).state_dict().items()}
    except RuntimeError:  # sizes beyond the address space
        return False
    return shapes == {name: tensor.shape for name, tensor in weights.items()}


def _latest(folder: Path) -> tuple[Path, Checkpoint | None]:
    """Return (path, checkpoint): the one at `folder`, or the latest intact one of the run there, or None."""
    if (folder / checkpoint.MANIFEST).is_file():
        return folder, checkpoint.load(folder)
    for attempt in range(1, ATTEMPTS + 1):
        try:
            path = checkpoint.latest(folder / "checkpoints", warn=print_note)
            return (folder, None) if path is None else (path, checkpoint.load(path, verify=False))
        except (OSError, UserError):
            if attempt == ATTEMPTS:
                raise
    raise AssertionError
