"""Write the dense twin of a Mixture of Experts: the same run with dense layers of equal FLOPs per token.

    python -m training.twin --config configs/quickstart.yaml --out twin.yaml
    python -m training.train --config twin.yaml

The experts pay off if their run reaches a lower loss than the twin after the same number of tokens.
"""

import sys
from pathlib import Path

from training.config import Config, FeedForward, MLPConfig, MoEConfig
from training.errors import UserError, command
from training.files import write_atomically
from training.options import cli
from training.terminal import print_result, print_text


@command
def main(argv: list[str] | None = None) -> int:
    """Run the command. Exit status: 0 done, 2 wrong input."""
    args = sys.argv[1:] if argv is None else argv
    out_flag = {"--out": "file to write the twin to (default: print it)"}
    config, flags = cli.parse_command_line(args, prog="python -m training.twin", doc=__doc__, flags=out_flag)
    out = None if flags["--out"] is None else cli.flag_path("--out", flags["--out"])
    dense, summary = twin(config), describe_twin(config)
    text = f"# {summary}\n{cli.dump_config(dense)}"
    if out is None:
        print_text(text)
    elif Path(out).is_dir():  # of the user: `write_atomically` would set it aside
        raise UserError(f"--out {out}: a folder; name a file")
    else:
        write_atomically(Path(out), text)
        print_result(f"{out}: {summary}")
    return 0


def twin(config: Config) -> Config:
    """Return the run with each MoE layer replaced by a dense one, as wide as all experts of a token together.

    Raises UserError if no layer has experts, or if `init_from` or `tokens_per_parameter` is set.
    """
    if config.tokens_per_parameter is not None:
        remedy = "give tokens or steps, which training.plan prints"
        raise UserError(f"tokens_per_parameter: the twin has other parameters, so it would read other tokens; {remedy}")
    if config.init_from is not None:
        raise UserError("init_from: a twin starts from its own initial weights; leave it out")
    if not any(isinstance(block.ffn, MoEConfig) for block in config.model.blocks):
        raise UserError("model.blocks: no layer has experts (ffn: {type: moe}), so the run has no dense twin")
    model = config.model
    blocks = tuple(block.model_copy(update={"ffn": _dense(block.ffn, model.n_embd)}) for block in model.blocks)
    dense = model.model_copy(update={"blocks": blocks})
    return config.model_copy(update={"name": f"{config.name}-dense", "model": dense})


def _dense(ffn: FeedForward, n_embd: int) -> FeedForward:
    if not isinstance(ffn, MoEConfig):
        return ffn
    hidden = (ffn.top_k + ffn.n_shared) * (ffn.hidden or 4 * n_embd)
    if hidden >= 2**63:
        raise UserError(f"model.blocks: the twin needs hidden {hidden}, too large a number; lower top_k or hidden")
    return MLPConfig(hidden=hidden, activation=ffn.activation, gated=ffn.gated)


def describe_twin(config: Config) -> str:
    """Return one line about the dense layers that replace the experts of `config`."""
    layers = [block.ffn for block in config.model.layers() if isinstance(block.ffn, MoEConfig)]
    moe, hidden = layers[0], _dense(layers[0], config.model.n_embd).hidden
    router = moe.n_experts / (hidden * (3 if moe.gated else 2))
    example = "" if all(other == moe for other in layers) else "such as "
    return (
        f"dense twin of {config.name}: {len(layers)} layers of experts, {example}{moe.top_k + moe.n_shared} of "
        f"{moe.n_experts + moe.n_shared} per token, become dense layers with hidden {hidden}: "
        f"the same FLOPs except for the router's, {router:.1%} of a layer"
    )


if __name__ == "__main__":
    sys.exit(main())
