"""Measure whether a Mixture of Experts ends as low as its dense twin with half of the FLOPs, and in less time.

    cd benchmarks && python moe_vs_dense.py --plot results/moe_vs_dense.png | tee results/moe_vs_dense.txt

The twin (`training.twin`) trains with twice the FLOPs of the experts' run. The two take turns with
each seed (race.py). The bars: with half of the FLOPs and in 0.8 of the time, the experts' loss is as low.
"""

import argparse
import math
from pathlib import Path

from common import header
from race import draw, race, report

from training import device as devices
from training.compare.runner import flops_of_a_token
from training.config import Config
from training.errors import UserError
from training.options import cli
from training.twin import describe_twin, twin

FLOPS, TIME = 0.5, 0.8  # the bars


def longer_twin(config: Config) -> Config:
    """Return the dense twin, with steps of which the experts' run takes at most FLOPS of the FLOPs.

    The lengths of the schedule should be shares of the run.
    """
    dense = twin(config)
    flops, theirs = map(flops_of_a_token, (config, dense))
    return dense.model_copy(update={"steps": math.ceil(config.steps * flops / theirs / FLOPS)})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default=str(Path(__file__).with_suffix(".yaml")), help="YAML file of the MoE's run")
    parser.add_argument("--seeds", type=int, default=3, help="runs of each (default %(default)s)")
    parser.add_argument("--cache_dir", default="data_cache", help="folder of the token shards (default %(default)s)")
    parser.add_argument("--plot", type=Path, help="draw the curves into this PNG")
    args = parser.parse_args()
    try:
        config = cli.load_config(args.config, {"data.cache_dir": args.cache_dir})
        dense = longer_twin(config)
    except UserError as error:
        parser.error(str(error))
    device = devices.select_device(config.parallel.device)
    print(f"{header(device)}\n{describe_twin(config)}", flush=True)
    pairs = race((dense, config), args.seeds, device)
    report(pairs, FLOPS, TIME)
    if args.plot:
        draw(pairs, args.plot)


if __name__ == "__main__":
    main()
