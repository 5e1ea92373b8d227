"""Tokenize the text of a run ahead of time.

    python -m training.prepare --config configs/quickstart.yaml

A run prepares its data at the start, unless this command already has.
"""

import sys

from training.errors import command
from training.options import cli
from training.terminal import print_result


@command
def main(argv: list[str] | None = None) -> int:
    """Run the command. Exit status: 0 done, 2 wrong input, 130 interrupted."""
    arguments = sys.argv[1:] if argv is None else argv
    config, _ = cli.parse_command_line(arguments, prog="python -m training.prepare", doc=__doc__, flags={})
    from training.data import prepare

    if config.init_from is not None:  # check it now, not after hours of tokenizing
        from training.weights.init_from import resolve_init_from

        resolve_init_from(config)
    dataset = prepare(config.data)
    report, splits = dataset.report, (dataset.train, dataset.val)
    for split in splits:
        print_result(
            f"{split.name:<6} {split.n_documents:>12,} documents {split.n_tokens:>16,} tokens"
            f" {split.n_bytes:>18,} bytes   {split.n_bytes / split.n_tokens:.3f} bytes/token"
        )
    speed = sum(split.n_bytes for split in splits) / 1e6 / report["seconds"]
    rate = "found in the cache" if report["is_cached"] else f"{speed:.1f} MB/s"
    print_result(f"vocabulary {dataset.train.vocab_size:,}; {report['seconds']:.2f} s, {rate}; {report['folder']}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
