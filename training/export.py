"""Write a trained model as a folder that Transformers opens, and check it.

python -m training.export --run runs/quickstart

A new process opens the folder and must compute the same logits and the same greedy continuation as the trained model;
otherwise the folder is removed. The model is written as the first architecture of Transformers that computes exactly
the same function (docs/exports.md), or else with its own Python files.
"""

import re
import sys
from pathlib import Path

from training.errors import UserError, command
from training.files import atomic_folder
from training.options.cli import Parser
from training.terminal import print_result


@command
def main(argv: list[str] | None = None) -> int:
    """Run the command. Exit status: 0 done, 2 wrong input or a wrong export, 130 interrupted."""
    parser = Parser(prog="python -m training.export", description=__doc__)
    parser.add_path("--run", required=True, help="folder of a run, finished or not, or of one of its checkpoints")
    parser.add_path("--out", help="folder to write, which must not exist (default: RUN/export)")
    parser.add_argument(
        "--dtype", default="fp32", choices=["fp32", "bf16", "fp16"], help="dtype of the weights (default %(default)s)"
    )
    parser.add_argument(
        "--average", metavar="N|ema", help="N: mean of the newest N checkpoints; ema: the average of optim.average"
    )
    args = parser.parse_args(argv)
    if args.average is not None and args.average != "ema" and not re.fullmatch("[1-9][0-9]{0,3}", args.average):
        parser.error(f"--average: {args.average!r} is neither a number of checkpoints nor ema")
    for line in export(args.run, args.out, args.dtype, args.average):
        print_result(line)
    return 0


def export(run: str, out: str | None, dtype_name: str, average: str | None = None) -> list[str]:
    """Write and check the folder; return a report. Raises UserError, and leaves no folder, if anything is wrong."""
    target = Path(out) if out is not None else Path(run, "export")
    if target.exists():
        raise UserError(f"{target}: already exists; choose another --out")
    from safetensors import SafetensorError

    from training.data.dialogues import end_tokens
    from training.device import DTYPES
    from training.engine.load_run import load_run, mean_of_checkpoints
    from training.model import GPT
    from training.weights import hf
    from training.weights.export_check import check_export

    loaded, dtype = load_run(run), DTYPES[dtype_name]
    weights, config, tokenizer = loaded.weights, loaded.config.model, loaded.tokenizer
    what = f"step {loaded.step}"
    if average == "ema":
        if not loaded.averages:
            raise UserError(f"--average ema: {run} has no averaged weights; train with optim.average, past the warm-up")
        weights, what = weights | loaded.averages, f"{what}, averaged weights"
    elif average is not None:
        weights, steps = mean_of_checkpoints(run, int(average))
        what = f"mean of steps {', '.join(map(str, steps))}"
    rounded = GPT(config, n_vocab=loaded.n_vocab)
    rounded.load_state_dict(hf.to_saved_dtype(weights, dtype))
    try:
        with atomic_folder(target) as partial:
            ends = end_tokens(tokenizer) if loaded.config.data.has_messages else ()
            options = {"n_vocab": loaded.n_vocab, "dtype": dtype, "end_tokens": ends}
            model_type = hf.write_model(partial, weights, config, tokenizer.end_of_text, **options)
            tokenizer.save(partial, config.n_positions)
            opened = check_export(partial, rounded, tokenizer.vocab_size)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{target}: the model could not be written: {error}") from error
    lines, trust = [f"{target}: {model_type}, {dtype_name}, {what}", opened], ""
    if model_type not in hf.ARCHITECTURES:
        reasons: dict[str | None, list[str]] = {}
        for name, architecture in hf.ARCHITECTURES.items():
            reasons.setdefault(architecture.reason_unsupported(config, weights), []).append(name)
        unsupported = "; ".join(f"{reason} ({', '.join(names)})" for reason, names in reasons.items())
        trust = ", trust_remote_code=True"
        lines.append(f"with its own Python files; not supported in Transformers: {unsupported}")
        lines.append(f"AutoTokenizer.from_pretrained({str(target)!r}{trust})")
    return [*lines, f"AutoModelForCausalLM.from_pretrained({str(target)!r}{trust})"]


if __name__ == "__main__":
    sys.exit(main())
