"""Tokenizing: megabytes a second of one core, and memory against the size of the text.

    python benchmarks/tokens.py --tokenizer PATH --plot benchmarks/results/tokens_memory.png

The text is Python's standard library: for speed some of it, beside the `tokenizers` library with the same ids; for
memory as often over as a size takes, in files of 10 MB, by `training.prepare` with a process a core. Memory is the most
that all its processes had at one time, pages that they share counted once (PSS; Linux).
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from itertools import count
from pathlib import Path

import torch
from common import against, header, ratio, turns

from training.config import Config, StdlibSource
from training.data.sources import build_reader
from training.data.tokenizer import Tokenizer, from_vocab_and_merges, train_bpe
from training.options import cli

HERE = Path(__file__).parent.parent
BAR_SPEED, BAR_GIB = 5.0, 1.0
FILE_BYTES = 10_000_000


def stdlib() -> list[str]:
    """The text of its modules."""
    return ["".join(document.chunks) for document in build_reader(StdlibSource()).documents()]


def tokenizers(folder: Path | None) -> Iterator[tuple[str, Tokenizer]]:
    """8192 tokens learned from some of the text, and those of a folder, such as GPT-2's."""
    yield "trained here", train_bpe(stdlib()[:200], 8192)
    if folder is not None:
        yield folder.name, from_vocab_and_merges(folder / "vocab.json", folder / "merges.txt")


def speed(name: str, tokenizer: Tokenizer, megabytes: float, rounds: int) -> None:
    """Print megabytes a second, in turn with the library's."""
    texts, size = [], 0
    for text in stdlib():
        if size < megabytes * 1e6:
            texts.append(text)
            size += len(text.encode())
    sides = {
        "this": lambda: tokenizer.encode_batch(texts),
        "tokenizers": lambda: tokenizer.inner.encode_batch_fast(texts, add_special_tokens=False),
    }
    times = turns(sides, rounds, torch.device("cpu"))
    rates = {name: size / 1e6 / min(seconds) for name, seconds in times.items()}
    print(f"{name}, {tokenizer.vocab_size:,} tokens: MB/s of one core, the best of {rounds}:")
    print(f"    this {against(rates['this'], BAR_SPEED, least=True)}, tokenizers {rates['tokenizers']:.2f}")
    print(f"    tokenizers / this: {ratio(times, 'tokenizers', 'this'):.2f} (the median)", flush=True)


def write_text(folder: Path, size: int) -> None:
    """Files of real text, of so many bytes in all; no two modules are alike."""
    modules = [text.encode() for text in stdlib()]
    numbered = (b"%d\n%b" % (n, modules[n % len(modules)]) for n in count())
    for part in range(-(-size // FILE_BYTES)):
        left = min(FILE_BYTES, size - part * FILE_BYTES)
        with (folder / f"{part:04}.txt").open("wb") as file:
            while left > 0:
                left -= file.write(next(numbered))


def family(pid: int) -> Iterator[int]:
    """A process and all that come of it."""
    yield pid
    for task in Path(f"/proc/{pid}/task").glob("*"):
        for child in (task / "children").read_text().split():
            yield from family(int(child))


def memory_gib(pid: int) -> float:
    """Of the family, now."""
    total = 0
    try:
        for member in family(pid):
            total += int(Path(f"/proc/{member}/smaps_rollup").read_text().partition("Pss:")[2].split()[0])
    except (OSError, IndexError, ValueError):  # one ended meanwhile
        return 0.0
    return total / 2**20


def peak_of(size: int) -> tuple[float, float]:
    """(GiB at the most, seconds) of preparing so many bytes."""
    with tempfile.TemporaryDirectory() as folder:
        for name, n_bytes in (("text", size), ("val", 100_000)):
            (Path(folder) / name).mkdir()
            write_text(Path(folder) / name, n_bytes)
        sources, val_sources = ([{"paths": [f"{folder}/{name}"]}] for name in ("text", "val"))
        config = {"sources": sources, "val_sources": val_sources, "cache_dir": f"{folder}/c"}
        path = Path(folder) / "config.yaml"
        path.write_text(cli.dump_config(Config.model_validate({"name": "run", "steps": 1000, "data": config})))
        start, most = time.perf_counter(), 0.0
        run = subprocess.Popen(
            [sys.executable, "-m", "training.prepare", "--config", str(path)], cwd=HERE, stdout=subprocess.DEVNULL
        )
        while run.poll() is None:
            most = max(most, memory_gib(run.pid))
            time.sleep(0.1)
        if run.returncode:
            raise SystemExit("it did not come to its end")
        return most, time.perf_counter() - start


def growth(sizes: list[int], plot: Path | None) -> None:
    """Print, and draw, the most memory of each size."""
    found = {}
    for size in sizes:
        found[size], seconds = peak_of(size)
        said = (
            f"{size / 1e6:7,.0f} MB of text: {found[size]:.3f} GiB at the most, {size / 1e6 / seconds:.1f} MB/s in all"
        )
        print(f"    {said}", flush=True)
    print(f"    the most: {against(max(found.values()), BAR_GIB, least=False)} GiB", flush=True)
    if plot is not None:
        draw(found, plot)


def draw(found: dict[int, float], path: Path) -> None:
    """Memory against size."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4.5), layout="constrained")
    axes.plot([size / 1e6 for size in found], list(found.values()), marker="o", label="all processes")
    axes.axhline(BAR_GIB, color="grey", linestyle="--", label="bar")
    axes.set(
        xscale="log",
        ylim=(0, None),
        xlabel="text (MB)",
        ylabel="most memory (GiB)",
        title="Memory of tokenizing a text",
    )
    axes.set_xticks([size / 1e6 for size in found], [f"{size / 1e6:g}" for size in found], minor=False)
    axes.minorticks_off()
    axes.legend()
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokenizer", type=Path, help="folder with vocab.json and merges.txt, such as GPT-2's")
    parser.add_argument("--rounds", type=int, default=5, help="default %(default)s")
    parser.add_argument("--timed", type=float, default=8, help="megabytes that are timed (default %(default)s)")
    parser.add_argument("--megabytes", type=int, nargs="*", default=[10, 30, 100, 300, 1000], help="sizes of the text")
    parser.add_argument("--plot", type=Path, help="draw memory against the text's size into this PNG")
    asked = parser.parse_args()
    os.environ["RAYON_NUM_THREADS"] = "1"  # of the library, read at its first use
    print(header(torch.device("cpu"), "tokenizers", "tiktoken"))
    for name, tokenizer in tokenizers(asked.tokenizer):
        speed(name, tokenizer, asked.timed, asked.rounds)
    del os.environ["RAYON_NUM_THREADS"]
    growth([size * 1_000_000 for size in asked.megabytes], asked.plot)


if __name__ == "__main__":
    main()
