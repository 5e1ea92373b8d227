"""Measure tokenizing: megabytes per second of one core, and memory by the size of the text.

    python benchmarks/tokens.py --tokenizer PATH --plot benchmarks/results/tokens_memory.png

The text is Python's standard library. For speed, a part of it is tokenized beside the `tokenizers` library, which
produces the same ids. For memory, `training.prepare` tokenizes each size, in files of 10 MB, with one thread per core;
the figure is the peak of the process and its children, with shared pages counted once (PSS; Linux).
"""

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
    """Return the text of each module."""
    return ["".join(document.chunks) for document in build_reader(StdlibSource()).documents()]


def tokenizers(folder: Path | None) -> Iterator[tuple[str, Tokenizer]]:
    """Yield a BPE of 8192 tokens trained on some of the text, and the tokenizer in `folder`, such as GPT-2's."""
    yield "trained here", train_bpe(stdlib()[:200], 8192)
    if folder is not None:
        yield folder.name, from_vocab_and_merges(folder / "vocab.json", folder / "merges.txt")


def speed(name: str, tokenizer: Tokenizer, megabytes: float, rounds: int) -> None:
    """Print megabytes per second of both libraries, which take turns."""
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
    """Write files of real text, `size` bytes in all; each module is numbered, so no two are equal."""
    modules = [text.encode() for text in stdlib()]
    numbered = (b"%d\n%b" % (n, modules[n % len(modules)]) for n in count())
    for part in range(-(-size // FILE_BYTES)):
        left = min(FILE_BYTES, size - part * FILE_BYTES)
        with (folder / f"{part:04}.txt").open("wb") as file:
            while left > 0:
                left -= file.write(next(numbered))


def family(pid: int) -> Iterator[int]:
    """Yield the ids of a process and all its descendants."""
    yield pid
    for task in Path(f"/proc/{pid}/task").glob("*"):
        for child in (task / "children").read_text().split():
            yield from family(int(child))


def memory_gib(pid: int) -> float:
    """Return the GiB of a process and all its descendants, now."""
    total = 0
    try:
        for member in family(pid):
            total += int(Path(f"/proc/{member}/smaps_rollup").read_text().partition("Pss:")[2].split()[0])
    except (OSError, IndexError, ValueError):  # a process has just ended
        return 0.0
    return total / 2**20


def peak_of(size: int) -> tuple[float, float]:
    """Prepare `size` bytes of text; return (peak GiB, seconds)."""
    with tempfile.TemporaryDirectory() as folder:
        for name, n_bytes in (("text", size), ("val", 100_000)):
            (Path(folder) / name).mkdir()
            write_text(Path(folder) / name, n_bytes)
        sources, val_sources = ([{"paths": [f"{folder}/{name}"]}] for name in ("text", "val"))
        config = {"sources": sources, "val_sources": val_sources, "cache_dir": f"{folder}/c"}
        path = Path(folder) / "config.yaml"
        path.write_text(cli.dump_config(Config.model_validate({"name": "run", "steps": 1000, "data": config})))
        start, peak = time.perf_counter(), 0.0
        run = subprocess.Popen(
            [sys.executable, "-m", "training.prepare", "--config", str(path)], cwd=HERE, stdout=subprocess.DEVNULL
        )
        while run.poll() is None:
            peak = max(peak, memory_gib(run.pid))
            time.sleep(0.1)
        if run.returncode:
            raise SystemExit("training.prepare failed")
        return peak, time.perf_counter() - start


def growth(sizes: list[int], plot: Path | None) -> None:
    """Print, and draw, the peak memory of each size."""
    peaks = {}
    for size in sizes:
        peaks[size], seconds = peak_of(size)
        rate = f"{size / 1e6 / seconds:.1f} MB/s in all"
        print(f"    {size / 1e6:7,.0f} MB of text: {peaks[size]:.3f} GiB at the peak, {rate}", flush=True)
    print(f"    the largest: {against(max(peaks.values()), BAR_GIB, least=False)} GiB", flush=True)
    if plot is not None:
        draw(peaks, plot)


def draw(peaks: dict[int, float], path: Path) -> None:
    """Draw peak memory against the size of the text."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4.5), layout="constrained")
    axes.plot([size / 1e6 for size in peaks], list(peaks.values()), marker="o", label="all processes")
    axes.axhline(BAR_GIB, color="grey", linestyle="--", label="bar")
    axes.set(
        xscale="log",
        ylim=(0, None),
        xlabel="text (MB)",
        ylabel="peak memory (GiB)",
        title="Memory of tokenizing a text",
    )
    axes.set_xticks([size / 1e6 for size in peaks], [f"{size / 1e6:g}" for size in peaks], minor=False)
    axes.minorticks_off()
    axes.legend()
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokenizer", type=Path, help="folder with vocab.json and merges.txt, such as GPT-2's")
    parser.add_argument("--rounds", type=int, default=5, help="turns of each side (default %(default)s)")
    parser.add_argument("--timed", type=float, default=8, help="megabytes of text for speed (default %(default)s)")
    parser.add_argument(
        "--megabytes", type=int, nargs="*", default=[10, 30, 100, 300, 1000], help="sizes of the text for memory"
    )
    parser.add_argument("--plot", type=Path, help="draw memory against the text's size into this PNG")
    args = parser.parse_args()
    os.environ["RAYON_NUM_THREADS"] = "1"  # of the `tokenizers` library, which reads it at its first use
    print(header(torch.device("cpu"), "tokenizers", "tiktoken"))
    for name, tokenizer in tokenizers(args.tokenizer):
        speed(name, tokenizer, args.timed, args.rounds)
    del os.environ["RAYON_NUM_THREADS"]
    growth([size * 1_000_000 for size in args.megabytes], args.plot)


if __name__ == "__main__":
    main()
