"""Tokenize the text of a run ahead of time.

    python -m training.prepare --config configs/quickstart.yaml

A run prepares its data at the start, unless this command already has.
"""

import sys
from typing import Any

from training.errors import command
from training.options import cli


@command
def main(argv: list[str] | None = None) -> int:
    """Run the command. Exit status: 0 done, 2 wrong input, 130 interrupted."""
    arguments = sys.argv[1:] if argv is None else argv
    config, _ = cli.parse_command_line(arguments, prog="python -m training.prepare", doc=__doc__, flags={})
    from training.data import prepare

    if config.init_from is not None:  # check it now, not after hours of tokenizing
        from training.weights.init_from import resolve_init_from

        resolve_init_from(config)
    print(summary(prepare(config.data).report))
    return 0


def summary(report: dict[str, Any]) -> str:
    """Format the report: the counts of each split, then time and folder."""
    lines = []
    for split in ("train", "val"):
        counts = report[split]
        ratio = counts["bytes"] / counts["tokens"]
        lines.append(
            f"{split:<6} {counts['documents']:>12,} documents {counts['tokens']:>16,} tokens"
            f" {counts['bytes']:>18,} bytes   {ratio:.3f} bytes/token"
        )
    if report["blank_documents"]:
        lines.append(f"       {report['blank_documents']:>12,} blank documents left out")
    megabytes = (report["train"]["bytes"] + report["val"]["bytes"]) / 1e6
    rate = "found in the cache" if report["is_cached"] else f"{megabytes / report['seconds']:.1f} MB/s"
    lines.append(f"vocabulary {report['vocab_size']:,}; {report['seconds']:.2f} s, {rate}; {report['folder']}")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
