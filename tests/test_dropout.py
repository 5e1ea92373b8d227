"""Dropout: its masks are functions of seed, sample, layer, token and channel, however a step is executed."""

import json

import pytest
import torch
from conftest import rows, tensors, write_config
from safetensors.torch import load_file
from trajectory import train as train_and_return

from training.batch import Batch
from training.config import ModelConfig
from training.data.loader import Samples
from training.distributed.world import World
from training.kernels.attention.table import ATTENTION_BACKENDS
from training.kernels.interface import Kernels
from training.model import GPT, init_weights
from training.model.layers import EMBEDDING_DROPOUT, FFN_DROPOUT, MIXER_DROPOUT, FeedForwardContext, dropout
from training.train import train
from training.weights.init_from import resolve_init_from

KEY_B = torch.tensor([5, 6, 5 + (1 << 40), (1 << 48) - 1])
SIZES = {"n_layer": 2, "n_head": 2, "n_embd": 16, "n_positions": 32}
MOE = {"type": "moe", "n_experts": 4, "hidden": 32, "jitter": 0.1}
DROPPED = {"model": SIZES | {"dropout": 0.25, "blocks": [{"ffn": MOE}, {}]}}


def mask_of(share: float, key_B=KEY_B, shape=(40, 31), stream=MIXER_DROPOUT, layer=0) -> torch.Tensor:
    """Return True where an element is kept."""
    context = FeedForwardContext(1, key_B, is_training=True).for_layer(layer)
    return dropout(torch.ones(len(key_B), *shape), share, context, stream) != 0


def hash_32(x: int) -> int:
    x = ((x ^ x >> 16) * 0x7FEB352D) % 2**32
    x = ((x ^ x >> 15) * 0x846CA68B) % 2**32
    return x ^ x >> 16


def plainly(key: int, token: int, channel: int, width: int, share: float) -> bool:
    """Return True if an element is kept, in Python's integers."""
    half = (width + 1) // 2
    seed = hash_32(hash_32(key >> 32) ^ key % 2**32)
    bits = hash_32(seed ^ hash_32(token * half + channel % half))
    return (bits >> 16 if channel >= half else bits % 2**16) >= round(share * 2**16)


@pytest.mark.parametrize("width", [1, 30, 31])
def test_a_mask_is_the_plain_hash(width):
    layer, share = 3, 0.3
    mask = mask_of(share, shape=(20, width), stream=FFN_DROPOUT, layer=layer)
    for b, key in enumerate(KEY_B.tolist()):
        key += (layer << 48) + FFN_DROPOUT
        expected = [[plainly(key, t, c, width, share) for c in range(width)] for t in range(20)]
        assert mask[b].tolist() == expected


@pytest.mark.parametrize("share", [0.001, 0.2, 0.5, 0.99])
def test_the_share_is_dropped_and_the_mean_kept(share):
    mask = mask_of(share, torch.arange(16), (256, 64))
    deviation = (share * (1 - share) / mask.numel()) ** 0.5
    assert 1 - float(mask.double().mean()) == pytest.approx(share, abs=5 * deviation + 2**-17)
    x = torch.rand(16, 256, 64) + 1
    y = dropout(x, share, FeedForwardContext(1, torch.arange(16), is_training=True), MIXER_DROPOUT)
    assert torch.equal(y != 0, mask)
    kept = 1 - round(share * 2**16) / 2**16
    assert torch.allclose(y[mask], x[mask] / kept, rtol=1e-6)
    assert float(y.double().mean()) == pytest.approx(float(x.double().mean()), abs=8 * deviation / kept)


def test_masks_are_independent_between_samples_layers_places_tokens_channels_and_steps(config):
    shape, n = (64, 64), 64 * 64
    masks = [mask_of(0.5, KEY_B, shape, stream, layer) for stream in (MIXER_DROPOUT, FFN_DROPOUT, EMBEDDING_DROPOUT)
             for layer in (0, 1, 9999)]  # fmt: skip
    flat = torch.cat([mask.flatten(1) for mask in masks]).double()
    off_diagonal = torch.corrcoef(flat) - torch.eye(len(flat))
    assert off_diagonal.abs().max() < 5 / n**0.5
    one = (mask_of(0.5, torch.arange(64), shape)).double()  # (B, T, C)
    for dimension in range(3):
        by = one.movedim(dimension, 0).flatten(1)
        assert (torch.corrcoef(by) - torch.eye(64)).abs().max() < 5.5 / n**0.5  # of 2,016 pairs
        assert (by.mean(1) - 0.5).abs().max() < 5 * 0.5 / n**0.5
    samples = Samples.__new__(Samples)
    samples.seed = config().seed
    keys = samples.random_keys(torch.arange(1000).numpy())
    assert len(set(keys.tolist())) == 1000  # each step and epoch has other samples' keys


def test_streams_of_the_deepest_model_do_not_meet():
    """A stream's number is above the 48 bits of a sample's key, and the sum is below 2^63."""
    places = [0, MIXER_DROPOUT, FFN_DROPOUT, EMBEDDING_DROPOUT]
    numbers = [(place >> 48) + layer for place in places[:3] for layer in (0, 9999)] + [EMBEDDING_DROPOUT >> 48]
    assert len(set(numbers)) == len(numbers) and numbers == sorted(numbers)
    assert EMBEDDING_DROPOUT + (1 << 48) < 2**63
    assert ModelConfig.model_json_schema()["properties"]["n_layer"]["maximum"] == 10_000


def model_of(share: float, dtype=torch.float32, **changes) -> GPT:
    config = ModelConfig(**SIZES | {"vocab_size": 64, "dropout": share} | changes)
    return init_weights(GPT(config, Kernels(ATTENTION_BACKENDS["flash"]), dtype), seed=0)


def batch_of(n: int = 4) -> Batch:
    tokens_BT = torch.randint(64, (n, 32), generator=torch.Generator().manual_seed(n))
    return Batch(tokens_BT, tokens_BT, KEY_B[:n], tokens_BT.numel())


def test_a_model_is_the_plain_one_with_masks_on_embeddings_and_outputs_of_sub_layers():
    ours, plain, batch = model_of(0.25), model_of(0.0), batch_of()

    def masked(x, stream, layer=0):
        return x * mask_of(0.25, batch.key_B, x.shape[1:], stream, layer) / 0.75

    plain.blocks[0].register_forward_pre_hook(lambda _, args: (masked(args[0], EMBEDDING_DROPOUT), *args[1:]))
    for i, block in enumerate(plain.blocks):
        block.mixer.register_forward_hook(lambda _, _args, out, i=i: masked(out, MIXER_DROPOUT, i))
        block.ffn.register_forward_hook(lambda _, _args, out, i=i: (masked(out[0], FFN_DROPOUT, i), out[1]))
    losses = []
    for model in (ours, plain):
        losses.append(model(batch)[0])
        losses[-1].backward()
    assert torch.allclose(*losses, rtol=1e-6)
    for (name, p), q in zip(ours.named_parameters(), plain.parameters(), strict=True):
        assert torch.allclose(p.grad, q.grad, rtol=1e-4, atol=1e-7), name
    assert not torch.allclose(losses[0], model_of(0.0)(batch)[0])


def test_dropout_is_off_in_evaluation_and_generation_and_by_default():
    ours, plain, batch = model_of(0.25), model_of(0.0), batch_of()
    assert torch.equal(ours.logits(batch.tokens_BT), plain.logits(batch.tokens_BT))
    assert torch.equal(ours.eval()(batch)[0], plain.eval()(batch)[0])
    without_keys = batch._replace(key_B=None)
    assert torch.equal(ours.train()(without_keys)[0], plain.train()(without_keys)[0])
    x = torch.ones(1, 2, 3)
    assert dropout(x, 0.0, FeedForwardContext(1, KEY_B[:1], is_training=True), 0) is x  # no operation at all
    assert ModelConfig().dropout == 0.0


def test_a_sample_has_its_mask_in_any_micro_batch():
    model, batch = model_of(0.25), batch_of()
    whole, _ = model(batch)
    parts = [model(batch.rows(slice(i, i + 1)))[0] for i in range(4)]
    assert torch.allclose(whole, sum(parts), rtol=1e-6)
    whole.backward()
    gradients = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    sum(parts).backward()
    assert all(
        torch.allclose(p.grad, g, rtol=1e-4, atol=1e-7) for p, g in zip(model.parameters(), gradients, strict=True)
    )


@pytest.mark.filterwarnings("ignore")  # compilers warn
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_a_compiled_block_draws_the_same(dtype):
    model, plain, batch = model_of(0.25, dtype), model_of(0.25, dtype), batch_of()
    torch._dynamo.reset()
    for block in model.blocks:
        block.compile(backend="aot_eager", fullgraph=True)
    losses = [model(batch)[0], plain(batch)[0]]
    assert float(losses[0]) == pytest.approx(float(losses[1]), rel=1e-5 if dtype == torch.float32 else 1e-2)
    for loss in losses:
        loss.backward()
    for (name, p), q in zip(model.named_parameters(), plain.named_parameters(), strict=True):
        scale = q[1].grad.abs().max()
        assert (p.grad - q[1].grad).abs().max() <= scale * (1e-4 if dtype == torch.float32 else 0.05), name


# --- whole runs ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("recompute", ["selective", "full"])
def test_recomputation_draws_the_same(recompute, config):
    results = [
        train_and_return(
            config(name=name, steps=3, parallel={"device": "cpu", "recompute": name}, **DROPPED),
            World(0, 1, torch.device("cpu")),
        )
        for name in ("none", recompute)
    ]
    assert results[0][0] == results[1][0]
    assert all(torch.equal(tensor, results[1][1][name]) for name, tensor in results[0][1].items())


def test_a_stopped_run_resumes_bit_for_bit_and_other_seeds_draw_others(run, config, at_step):
    through = run(name="through", **DROPPED)
    at_step.send(5)
    stopped = config(name="stopped", **DROPPED)
    assert train(stopped) != 0
    assert train(stopped) == 0
    assert rows(stopped.run_dir) == rows(through) and tensors(stopped.run_dir, 8) == tensors(through, 8)


def test_micro_batches_and_ranks_draw_the_same(processes, options, config, tmp_path):
    changes = {"steps": 4} | DROPPED
    alone = train_and_return(config(name="alone", **changes), World(0, 1, torch.device("cpu")))
    small = train_and_return(config(name="small", **changes | {"micro_batch": 1}), World(0, 1, torch.device("cpu")))
    meshes = {"copies": {}, "shards": {"shard": 2}, "experts": {"shard": 2, "expert": 2}}
    paths = [
        write_config(tmp_path / f"{name}.yaml", options(name=name, parallel={"device": "cpu", "mesh": mesh}, **changes))
        for name, mesh in meshes.items()
    ]
    ended = processes.run("trajectory:main", str(tmp_path), *map(str, paths), n_ranks=2)
    assert ended.returncode == 0, ended.stderr
    for name, weights in [("small", small[1]), *((p.stem, load_file(p.with_suffix(".safetensors"))) for p in paths)]:
        assert all((tensor - alone[1][key]).abs().max() < 1e-5 for key, tensor in weights.items()), name


def test_exports_carry_dropout_and_runs_that_start_from_them_do_not_inherit_it(finished, config):
    folder = finished(name="parent", model=SIZES | {"dropout": 0.25})
    fields = json.loads((folder / "model/config.json").read_text())
    assert (fields["embd_pdrop"], fields["resid_pdrop"], fields["attn_pdrop"]) == (0.25, 0.25, 0.0)
    for model, expected in (({}, 0.0), ({"dropout": 0.5}, 0.5)):
        child = config(name="child", init_from=str(folder / "model"), model=model, batch_tokens=1024)
        assert resolve_init_from(child).model.dropout == expected
