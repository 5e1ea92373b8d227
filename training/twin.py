"""Write a Mixture of Experts' dense twin: the same run with dense layers that cost each token the same FLOPs.

    python -m training.twin --config configs/quickstart.yaml --out twin.yaml
    python -m training.train --config twin.yaml

Where the experts are worth having, they beat the twin at equal tokens.
"""

from __future__ import annotations

import sys
from pathlib import Path

from training.config import BlockConfig, Config, MLPConfig, MoEConfig
from training.errors import UserError, command
from training.files import write_atomically
from training.options import cli

FLAGS = {"--out": "file that the twin is written to; without it, it is printed"}


@command
def main(argv: list[str] | None = None) -> int:
    """Run the command. Exit status: 0 done, 2 wrong input, 130 interrupted."""
    arguments = sys.argv[1:] if argv is None else argv
    config, flags = cli.parse_command_line(arguments, prog="python -m training.twin", doc=__doc__, flags=FLAGS)
    text = cli.dump_config(twin(config))
    if flags["--out"] is None:
        print(f"# {describe_twin(config)}", text, sep="\n", end="")
    else:
        write_atomically(Path(flags["--out"]), f"# {describe_twin(config)}\n{text}")
        print(f"{flags['--out']}: {describe_twin(config)}")
    return 0


def twin(config: Config) -> Config:
    """The same with every layer of experts dense, as wide as the experts that a token goes to are together.

    Raises UserError where there are no experts, or where the model is that of `init_from`.
    """
    if config.init_from is not None:
        raise UserError("init_from: a twin begins with weights of its own; leave it out")
    if not any(isinstance(block.ffn, MoEConfig) for block in config.model.blocks):
        raise UserError("model.blocks: no layer has experts (ffn: {type: moe}), so there is nothing to make dense")
    blocks = tuple(dense(block, config.model.n_embd) for block in config.model.blocks)
    model = config.model.model_copy(update={"blocks": blocks})
    return config.model_copy(update={"name": f"{config.name}-dense", "model": model})


def dense(block: BlockConfig, n_embd: int) -> BlockConfig:
    """The block with a dense layer in place of its experts."""
    moe = block.ffn
    if not isinstance(moe, MoEConfig):
        return block
    hidden = (moe.top_k + moe.n_shared) * (moe.hidden or 4 * n_embd)
    return block.model_copy(update={"ffn": MLPConfig(hidden=hidden, activation=moe.activation, gated=moe.gated)})


def describe_twin(config: Config) -> str:
    """What became of the experts, on a line."""
    layers = [block.ffn for block in config.model.layers() if isinstance(block.ffn, MoEConfig)]
    moe, hidden = layers[0], dense(BlockConfig(ffn=layers[0]), config.model.n_embd).ffn.hidden
    router = moe.n_experts / (hidden * (3 if moe.gated else 2))
    same = "" if all(other == moe for other in layers) else "such as "
    return (
        f"the dense twin of {config.name}: {len(layers)} layers of experts, {same}{moe.top_k + moe.n_shared} of "
        f"{moe.n_experts + moe.n_shared} for a token, are dense, {hidden} wide: the same FLOPs but for the routers', "
        f"{router:.1%} of a layer"
    )


if __name__ == "__main__":
    sys.exit(main())
