"""Batches in stages: every sample is read once and in order, whatever the ranks, the micro-batch and the restarts."""

import re
from typing import NamedTuple

import numpy as np
import pytest
from conftest import rows, tensors
from hypothesis import given
from hypothesis import strategies as st

from training import plan
from training.compare.page import read_track
from training.compare.results import RunResult
from training.compare.runner import Runner, first_batch, timing_config
from training.compare.variants import Variant
from training.config import Config
from training.data import Loader
from training.distributed.mesh import check_mesh
from training.errors import UserError
from training.optim.batch_schedule import BatchSchedule, Stage
from training.options.cli import dump_config, load_config
from training.options.notices import notices
from training.options.yaml import ConfigErrors
from training.planning.horizon import resolve_steps
from training.planning.memory import max_samples_per_rank
from training.train import train

# 4 samples of 32 tokens in 3 steps, 10 samples in 2 steps, then 2 samples.
STAGES = [(0, 128), (300, 320), (1000, 64)]
SIZES = [128, 128, 128, 320, 320, 64, 64]
STAGED = {
    "batch_tokens": None,
    "batch_schedule": [{"from_tokens": start, "batch_tokens": size} for start, size in STAGES],
}
stages = st.lists(st.tuples(st.integers(1, 400), st.integers(1, 90)), min_size=1, max_size=5).map(
    lambda pairs: [
        (start, size) for start, (_, size) in zip([0, *np.cumsum([n for n, _ in pairs])], pairs, strict=False)
    ]
)


def test_a_stage_starts_at_a_whole_step():
    batches = BatchSchedule(STAGES)
    assert batches.stages == [Stage(0, 0, 128, 0), Stage(3, 384, 320, 1), Stage(5, 1024, 64, 2)]
    assert [batches.batch_tokens(step) for step in range(7)] == SIZES
    assert [batches.tokens(steps) for steps in range(8)] == np.cumsum([0, *SIZES]).tolist()
    assert [batches.steps(n) for n in (1, 128, 129, 384, 385, 704, 705, 1024, 1025, 1088)] == [
        1, 1, 2, 3, 4, 4, 5, 5, 6, 6
    ]  # fmt: skip
    assert [batches.nearest_steps(n) for n in (1, 180, 200, 384, 1060)] == [1, 1, 2, 3, 6]
    assert BatchSchedule([(0, 100), (50, 7), (90, 9)]).stages == [Stage(0, 0, 100, 0), Stage(1, 100, 9, 2)]
    assert (batches.constant, BatchSchedule([(0, 5)]).constant) == (None, 5)


@given(stages=stages, tokens=st.integers(1, 3000))
def test_stages_agree_with_counting_step_by_step(stages, tokens):
    batches, read, step = BatchSchedule(stages), 0, 0
    while read < tokens:
        assert batches.tokens(step) == read
        size = [size for start, size in stages if start <= read][-1]
        assert batches.batch_tokens(step) == size
        read, step = read + size, step + 1
    assert batches.steps(tokens) == step and batches.tokens(step) == read
    nearest = batches.nearest_steps(tokens)
    assert nearest == 1 or abs(batches.tokens(nearest) - tokens) <= abs(read - tokens)


class Read(NamedTuple):
    """Stands for a batch: the indices of its samples."""

    indices: list[int]
    n_tokens: int | None = None


class Indices:
    """Stands for samples."""

    n_positions = 32

    def batch(self, indices):
        return Read(indices.tolist())


@pytest.mark.parametrize("n_ranks", [1, 2, 3])
def test_the_steps_read_all_samples_in_order_on_any_number_of_ranks(n_ranks):
    ranges = [lambda n, rank=rank: range(n * rank // n_ranks, n * (rank + 1) // n_ranks) for rank in range(n_ranks)]
    loaders = [Loader(Indices(), BatchSchedule(STAGES), each) for each in ranges]
    batches = [[index for loader in loaders for index in loader.at(step).indices] for step in range(7)]
    assert [len(batch) * 32 for batch in batches] == SIZES
    assert [index for batch in batches for index in batch] == list(range(sum(SIZES) // 32))
    assert [index for loader in loaders for index in loader.at(4).indices] == batches[4], (
        "a batch depends on its step alone"
    )
    assert [loader.at(4).n_tokens for loader in loaders] == [SIZES[4]] * n_ranks, "of the global batch"


def test_a_killed_run_resumes_bit_for_bit_across_the_borders(run, config, at_step, finished):
    whole = finished(**STAGED, steps=7, checkpoint={"every": 2, "keep": 9})
    assert [row["tokens"] for row in rows(whole)] == np.cumsum(SIZES).tolist()
    for n, (died_at, every) in enumerate([(4, 3), (3, 2), (6, 5)]):  # from a border, to a border, past both
        changes = STAGED | {"name": f"killed-{n}", "steps": 7, "checkpoint": {"every": every, "keep": 9}}
        at_step.die(died_at)
        with pytest.raises(KeyboardInterrupt):
            train(config(**changes))
        at_step.clear()
        folder = run(**changes, micro_batch=3 if n == 2 else 4)
        if n < 2:  # another micro-batch adds in another order
            assert tensors(folder, 7) == tensors(whole, 7) and rows(folder) == rows(whole)
        assert [row["tokens"] for row in rows(folder)] == np.cumsum(SIZES).tolist()
        assert [row["loss"] for row in rows(folder)] == pytest.approx([row["loss"] for row in rows(whole)], rel=1e-5)


def test_the_size_of_the_residual_stream_does_not_depend_on_the_batch(build_run):
    changes = {"logging": {"histogram_every": 1, "tensorboard": False}, "optim": {"learning_rate": 1e-6}}
    run = build_run(**STAGED, **changes, steps=7)
    for _ in range(6):
        run.train_step()
    sizes = [row["layers"]["residual_rms"] for row in run.rows()]
    assert all(size == pytest.approx(sizes[0], rel=0.15) for size in sizes)


def test_one_stage_is_a_batch_of_one_size(finished, run):
    plain = finished(steps=3)
    staged = run(name="staged", steps=3, batch_tokens=None, batch_schedule=[{"from_tokens": 0, "batch_tokens": 256}])
    assert tensors(staged, 3) == tensors(plain, 3) and rows(staged) == rows(plain)


def test_another_schedule_is_another_run(finished, config):
    finished(**STAGED, steps=7, checkpoint={"every": 2, "keep": 9})
    other = [{"from_tokens": 0, "batch_tokens": 128}]
    with pytest.raises(UserError, match=r"other options: batch_schedule.1.batch_tokens: 320 -> unset"):
        train(config(**STAGED | {"batch_schedule": other}, steps=7, checkpoint={"every": 2, "keep": 9}))


def test_horizon_plan_and_header_count_the_stages(config, run, capsys, tmp_path):
    assert resolve_steps(config(steps=None, tokens=1000, **STAGED), None).steps == 5
    run(steps=None, tokens=1000, **STAGED)
    out = capsys.readouterr().out
    batch = (
        "128 tokens = 4 samples x 32; from 384 tokens (step 4) 320 tokens = 10 samples x 32; "
        "from 1,024 tokens (step 6) 64 tokens = 2 samples x 32, micro-batch 4"
    )
    assert re.sub(r"\s+", " ", out).count(batch) == 1
    assert re.search(r"^steps +5, 1,024 tokens$", out, re.M)
    path = tmp_path / "my.yaml"
    path.write_text(dump_config(config(name="plan", steps=7, **STAGED)))
    assert plan.main(["--config", str(path)]) == 0
    planned = capsys.readouterr().out
    path.write_text(dump_config(config(name="plan", steps=3, schedule={"warmup_steps": 9}, **STAGED)))
    assert plan.main(["--config", str(path)]) == 0
    short = capsys.readouterr().err
    assert (
        "schedule.warmup_steps: 9 does not fit into steps 3; this run uses 1\nbatch_schedule.1: this run ends" in short
    )
    assert batch in planned and re.search(r"^steps +7 = 1,152 tokens", planned, re.M)
    assert max_samples_per_rank(config(**STAGED), 2) == 5
    assert plan.main(["--config", str(path), "--world", "3"]) == 2
    assert "3 ranks are more than the 2 samples of batch_tokens 64" in capsys.readouterr().err
    with pytest.raises(UserError, match=r"^batch_schedule: 64 are 2 samples, fewer than 3 processes"):
        check_mesh(config(**STAGED), 3)


def test_a_stage_without_a_step_is_said(config):
    sizes = [(0, 256), (10, 512), (20, 1024), (10**9, 2048)]
    stages = [{"from_tokens": start, "batch_tokens": size} for start, size in sizes]
    uneven = config(batch_schedule=stages, batch_tokens=None, steps=8)
    assert list(BatchSchedule.of(uneven).describe_unused(uneven)) == [
        "batch_schedule.1: no step has its size: the next stage starts with the same step",
        "batch_schedule.3: this run ends before 1,000,000,000 tokens, where it starts",
    ]


def test_a_comparison_makes_runs_in_stages_equal(config, tmp_path):
    staged, plain = Variant("staged", config(steps=7, **STAGED)), Variant("plain", config(batch_tokens=64, steps=1))
    for equal in ("tokens", "flops"):
        one, other = Runner(tmp_path, [0], equal).equalize([staged, plain])
        assert (one.config.steps, other.config.steps) == (7, 1152 // 64)
        one, other = Runner(tmp_path, [0], equal).equalize([other, staged])
        assert (one.config.steps, other.config.steps) == (18, 7)
    timed = timing_config(staged.config, tmp_path)
    assert (first_batch(timed), timed.batch_tokens, timed.batch_schedule) == (128, 128, ())


def test_the_curves_of_a_comparison_are_by_the_tokens_that_were_read(finished):
    folder = finished(**STAGED, steps=7, checkpoint={"every": 2, "keep": 9})
    track = read_track(RunResult(0, folder, 2.0, 7, 1152, 1.0, 1152.0, None), "val_loss")
    assert {step: (point.tokens, point.flops) for step, point in track.items()} == {
        4: (704, pytest.approx(704)),
        7: (1152, pytest.approx(1152)),
    }


TEXT = "data: {sources: [{type: stdlib}]}\nmodel: {n_positions: 32}\n"


@pytest.mark.parametrize(
    ("text", "line"),
    [
        (
            "batch_tokens: 64\nbatch_schedule: [{from_tokens: 0, batch_tokens: 64}]",
            "my.yaml:4: batch_schedule: batch_tokens is also set, on line 3; set one of batch_tokens, batch_schedule",
        ),
        (
            "batch_schedule: [{from_tokens: 5, batch_tokens: 64}]",
            "my.yaml:3: batch_schedule.0.from_tokens: 5 in the first stage; write 0",
        ),
        (
            "batch_schedule:\n- {from_tokens: 0, batch_tokens: 64}\n- {from_tokens: 0.0, batch_tokens: 64}",
            "my.yaml:5: batch_schedule.1.from_tokens: 0 is not after 0, where the stage before it starts",
        ),
        (
            "batch_schedule:\n- {from_tokens: 0, batch_tokens: 64}\n- {from_tokens: 1e3, batch_tokens: 70}",
            "my.yaml:5: batch_schedule.1.batch_tokens: 70 is not a multiple of model.n_positions 32",
        ),
        (
            "batch_schedule: [{from_tokens: 0}]",
            "my.yaml:3: batch_schedule.0.batch_tokens: missing, and it has no default: tokens per optimizer step, "
            "over all processes",
        ),
        (
            "batch_schedule: [{from_tokens: 1.5, batch_tokens: 64}]",
            "my.yaml:3: batch_schedule.0.from_tokens: 1.5 is not",
        ),
    ],
)
def test_a_wrong_stage_is_one_line(tmp_path, text, line):
    path = tmp_path / "my.yaml"
    path.write_text(TEXT + text)
    with pytest.raises(ConfigErrors) as error:
        load_config(path)
    (message,) = [re.sub(r"^/.*/", "", each) for each in error.value.lines]
    assert message.startswith(line)


def test_a_flag_replaces_the_batch_of_the_file(tmp_path):
    path = tmp_path / "my.yaml"
    path.write_text(TEXT + "batch_tokens: 64")
    config = load_config(path, {"batch_schedule": "[{from_tokens: 0, batch_tokens: 32}]"})
    assert config.batch_tokens is None and BatchSchedule.of(config).sizes() == [32]
    path.write_text(dump_config(config))
    assert load_config(path) == config and not [line for line in notices(config) if "batch" in line]
    assert load_config(path, {"batch_tokens": "96"}).batch_schedule == ()
    assert load_config(path, {"batch_schedule.0.batch_tokens": "96"}).batch_schedule[0].batch_tokens == 96
    assert Config.model_validate({"data": {"sources": [{"type": "stdlib"}]}}).batch_tokens == 524_288
