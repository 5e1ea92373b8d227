"""Measure generation: with the key-value cache, without it, and in Transformers with the same weights.

    python benchmarks/generate.py | tee benchmarks/results/generate.txt

Sides take turns; a figure is the median over rounds, a ratio the median of the ratios within each round. Weights are
random, as speed does not depend on them. Greedy, float32.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
import transformers
from common import header

from training import device as devices
from training.config import ModelConfig
from training.model import GPT, init_weights
from training.model.generation import SamplingParams, sample
from training.weights import hf

N_VOCAB = 50257
SHAPES = {
    "12 layers x 384": {"n_layer": 12, "n_head": 6, "n_embd": 384, "vocab_size": N_VOCAB},
    "GPT-2 124M": {"n_layer": 12, "n_head": 12, "n_embd": 768, "vocab_size": N_VOCAB},
}
Ids = list[list[int]]  # token ids of each text


def with_cache(model: GPT, prompts: Ids, n_tokens: int) -> Ids:
    """Generate as `training.generate` does."""
    new: Ids = [[] for _ in prompts]

    def take(i: int, token: int) -> bool:
        new[i].append(token)
        return True

    seeds = range(len(prompts))
    sample(model, prompts, n_tokens, take, n_vocab=N_VOCAB, seeds=seeds, params=SamplingParams(temperature=0))
    return new


@torch.inference_mode()
def without_cache(model: GPT, prompts: Ids, n_tokens: int) -> Ids:
    """Compute every token from the whole text before it."""
    text_BT = torch.tensor(prompts, device=model.wte.weight.device)
    for _ in range(n_tokens):
        token_B1 = model.logits(text_BT, n_last=1)[:, :, :N_VOCAB].argmax(-1)
        text_BT = torch.cat([text_BT, token_B1], dim=1)
    return text_BT[:, -n_tokens:].tolist()


def in_transformers(model: GPT) -> Callable[[GPT, Ids, int], Ids]:
    """Return Transformers' `generate` with these weights."""
    with tempfile.TemporaryDirectory() as folder:
        hf.write_model(Path(folder), model.state_dict(), model.config, N_VOCAB - 1)
        theirs = transformers.AutoModelForCausalLM.from_pretrained(folder).to(model.wte.weight.device)
    theirs.generation_config.eos_token_id = None  # always n_tokens tokens

    @torch.inference_mode()
    def generate(_: GPT, prompts: Ids, n_tokens: int) -> Ids:
        x = torch.tensor(prompts, device=theirs.device)
        y = theirs.generate(x, attention_mask=torch.ones_like(x), max_new_tokens=n_tokens, do_sample=False)
        return y[:, x.shape[1] :].tolist()

    return generate


def compare(
    model: GPT, sides: dict[str, Callable], prompts: Ids, n_tokens: int, rounds: int, bar: float | None
) -> None:
    """Print both sides' tokens/s and the ratio of the first to the second, which should reach `bar`."""
    warm = [generate(model, prompts, 8) for generate in sides.values()]
    rates: dict[str, list[float]] = {name: [] for name in sides}
    texts = {}
    for _ in range(rounds):
        for name, generate in sides.items():
            start = time.perf_counter()
            texts[name] = generate(model, prompts, n_tokens)
            rates[name].append(len(prompts) * n_tokens / (time.perf_counter() - start))
    for name, rate in rates.items():
        print(f"    {name:16} {statistics.median(rate):8.1f} tokens/s  ({min(rate):.1f} to {max(rate):.1f})")
    ours, theirs = rates.values()
    ratio = statistics.median(a / b for a, b in zip(ours, theirs, strict=True))
    first, second = texts.values()
    same = "the same tokens" if first == second and warm[0] == warm[1] else "NOT THE SAME TOKENS"
    verdict = "" if bar is None else f"bar {bar:.1f}: {'met' if ratio >= bar else 'MISSED'}; "
    print(f"    ratio            {ratio:8.2f}  ({verdict}{same})", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--rounds", type=int, default=15, help="turns of each side in the shortest comparison (default %(default)s)"
    )
    parser.add_argument("--threads", type=int, help="threads of torch (default: torch's choice)")
    parser.add_argument("--device", default="auto", help="auto, cuda, mps or cpu (default %(default)s)")
    args = parser.parse_args()
    device = devices.select_device(args.device)
    if args.threads:
        torch.set_num_threads(args.threads)
    transformers.utils.logging.disable_progress_bar()
    print(f"{header(device, 'transformers')}; float32")
    for name, shape in SHAPES.items():
        model = init_weights(GPT(ModelConfig.model_validate(shape)), 0).to(device)
        hugging_face = in_transformers(model)
        model.cast_for_inference()
        prompts = torch.randint(0, N_VOCAB, (8, 16), generator=torch.Generator().manual_seed(0)).tolist()
        for n_texts, n_tokens, rounds, sides, bar in (
            (1, 512, max(1, args.rounds // 5), {"with cache": with_cache, "without cache": without_cache}, 5.0),
            (1, 128, args.rounds, {"this": with_cache, "transformers": hugging_face}, 1.0),
            (8, 128, max(1, args.rounds // 3), {"this": with_cache, "transformers": hugging_face}, None),
        ):
            texts = "1 text" if n_texts == 1 else f"{n_texts} texts"
            print(f"{name}: {texts}, {n_tokens} tokens after a prompt of 16, {rounds} rounds")
            compare(model, sides, prompts[:n_texts], n_tokens, rounds, bar)


if __name__ == "__main__":
    main()
