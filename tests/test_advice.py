"""Advice: a pure function of what was measured, on both sides of every limit."""

from __future__ import annotations

import math

import pytest

from training.config import Config
from training.logging.advice import LIMITS, Facts, advice
from training.logging.phases import PHASES


def config(**changes) -> Config:
    made = {"data": {"sources": [{"type": "stdlib"}]}, "schedule": {"warmup_steps": 10}}
    return Config.model_validate(made | changes)


def time(**shares: float) -> dict[str, float]:
    """100 hours, of which what is not said is computing."""
    return {"compute": 360_000 * (1 - sum(shares.values()))} | {
        phase: 360_000 * shares.get(phase, 0.0) for phase in PHASES if phase != "compute"
    }


def facts(**changes) -> Facts:
    """A run on a GPU that nothing is wrong with, but for the changes."""
    fine = Facts(
        seconds=time(),
        config=config(),
        on_gpu=True,
        mfu=0.45,
        memory=0.8,
        memory_gib=64.0,
        micro_batch=4,
        most=16,
        back_offs=0,
        clipped=0.1,
        skipped=0,
        losses=[(step, 5 - step / 1000) for step in range(1, 1001)],
        val_losses=[(step, 4.02 - step / 50_000) for step in range(100, 1001, 100)],
        dead_experts=0,
        n_experts=64,
        vocabulary=50_257,
    )
    return fine._replace(**changes)


def ending(last: float, best: float = 4.0) -> list[tuple[int, float]]:
    """Validation losses that end so."""
    return [(400, 4.01), (800, best), (1000, last)]


def of_training(rises: bool) -> list[tuple[int, float]]:
    return [(step, 5 + (1 if rises else -1) * step / 1000) for step in range(1, 1001)]


NOTHING = [
    "memory: 64.0 GiB at the peak, 80 % of what there is: nothing to be gained here",
    "speed: 100 % of the time went into steps: nothing to be gained here",
    "learning: validation loss ended near its lowest, 10 % of the steps were clipped: nothing to be gained here",
]
LN = math.log(50_257)
BY_HAND = config(micro_batch=4)
# What each limit is of; on which side of it there is advice; the facts at a value; what is then said.
SIDES = {
    **{
        phase: (1, lambda value, phase=phase: {"seconds": time(**{phase: value})}, said)
        for phase, said in {
            "data": "of the time waits for data; put data.cache_dir on a faster disk",
            "communication": "of the time waits for other ranks; batch_tokens: more of them a step, or fewer processes",
            "evaluation": "of the time is evaluation; raise eval.every or lower eval.tokens",
            "checkpoint": "of the time waits for saves; raise checkpoint.every",
            "idle": "of the time is rows and logs; raise logging.every",
            "redone": "of the time was lost to kills or going back, and done again; lower checkpoint.every",
            "start": "of the time is start-up, with data and the first step; a longer run pays no more of it",
        }.items()
    },
    "mfu": (-1, lambda value: {"mfu": value}, "MFU is 30 %; try parallel.compile or a larger micro_batch"),
    "memory_full": (1, lambda value: {"memory": value}, "92 % of it was in use at the peak; --micro_batch 2 leaves"),
    "memory_empty": (-1, lambda value: {"memory": value, "config": BY_HAND}, "micro_batch: auto finds 7 samples or mo"),
    "clipped": (1, lambda value: {"clipped": value}, "50 % of the steps were clipped to optim.grad_clip 1; lower"),
    "overfit": (1, lambda value: {"val_losses": ending(4 * (1 + value))}, "it overfits; more text, fewer steps"),
    "hardly": (1, lambda value: {"val_losses": [(1000, value * LN)]}, "is 75 % of ln(vocabulary), which is knowing no"),
    "falling": (1, lambda value: {"val_losses": ending(4 * (1 - value))}, "fell by another 3.0 % after step 800; more"),
}


@pytest.mark.parametrize("name", LIMITS)
def test_each_limit_is_where_a_line_begins(name):
    sign, at, said = SIDES[name]
    limit = LIMITS[name].value
    on_this_side, on_that_side = advice(facts(**at(limit - sign * 1e-6))), advice(facts(**at(limit + sign * 1e-6)))
    assert not any(said in line for line in on_this_side)
    assert sum(said in line for line in on_that_side) == 1
    assert len(on_that_side) == len(on_this_side) == 3


def test_every_limit_has_a_reason():
    assert all(len(limit.why) > 20 for limit in LIMITS.values())


def test_where_nothing_is_wrong_each_question_is_answered_by_a_figure():
    assert advice(facts()) == NOTHING
    on_cpu = advice(facts(on_gpu=False, mfu=None, memory=0.01, memory_gib=0.5, config=BY_HAND))
    assert on_cpu == ["memory: 0.5 GiB at the peak, 1 % of what there is: nothing to be gained here", *NOTHING[1:]]


def test_all_that_is_wrong_is_said_with_its_figures():
    lines = advice(facts(seconds=time(data=0.31, evaluation=0.22), mfu=0.12, clipped=0.63, dead_experts=3))
    assert lines == [
        NOTHING[0],
        "speed: 31 % of the time waits for data; put data.cache_dir on a faster disk",
        "speed: 22 % of the time is evaluation; raise eval.every or lower eval.tokens",
        "speed: MFU is 12 %; try parallel.compile or a larger micro_batch",
        "learning: 63 % of the steps were clipped to optim.grad_clip 1; lower optim.learning_rate or raise "
        "schedule.warmup_steps",
        "learning: 3 of 64 experts are dead; raise bias_rate or switch_weight of their layers, or use fewer experts",
    ]


def test_skipped_steps_are_told():
    assert any("learning: 3 steps were skipped, of a loss or gradient" in line for line in advice(facts(skipped=3)))


def test_memory_that_ran_out_is_answered_by_what_fitted_and_what_makes_room():
    once = facts(back_offs=1, micro_batch=2)
    assert advice(once)[0] == (
        "memory: it ran out once; --micro_batch 2 begins with what fitted, and parallel.recompute: full makes room for "
        "more"
    )
    recomputed = config(parallel={"recompute": "full"})
    line = advice(facts(back_offs=3, micro_batch=1, config=recomputed))[0]
    assert "ran out 3 times" in line and "parallel.mesh.shard over more processes makes room" in line
    assert "; parallel.recompute: full leaves a margin" in advice(facts(memory=0.95, micro_batch=1))[0]


def test_what_is_advised_is_not_what_is_done_already():
    compiled, blocking = config(parallel={"compile": True}), config(checkpoint={"background": False})
    assert "MFU is 12 %; try a larger micro_batch" in advice(facts(mfu=0.12, config=compiled))[1]
    assert "MFU is 12 %; a wider model" in advice(facts(mfu=0.12, config=compiled, micro_batch=16))[1]
    assert "; parallel.compile pays in longer runs" in advice(facts(seconds=time(start=0.4), config=compiled))[1]
    assert "use checkpoint.background" in advice(facts(seconds=time(checkpoint=0.4), config=blocking))[1]
    sharded = config(parallel={"mesh": {"shard": 2}})
    assert "; a larger micro_batch, or fewer" in advice(facts(seconds=time(communication=0.4), config=sharded))[1]
    assert advice(facts(memory=0.3))[0].endswith("nothing to be gained here")  # found by auto
    assert advice(facts(memory=0.3, micro_batch=16, config=BY_HAND))[0].endswith("nothing to be gained here")


def test_a_validation_loss_that_rises_is_overfitting_only_where_the_training_loss_falls():
    worse = ending(4.5)
    assert advice(facts(val_losses=worse, losses=of_training(rises=False)))[2] == (
        "learning: validation loss was lowest at step 800, 4.00, and rose to 4.50 while training loss fell: it "
        "overfits; more text, fewer steps or more optim.weight_decay"
    )
    assert advice(facts(val_losses=worse, losses=of_training(rises=True)))[2] == (
        "learning: validation loss was lowest at step 800, 4.00, and rose to 4.50 while training loss rose too: it is "
        "unstable; lower optim.learning_rate"
    )


def test_a_fall_is_that_of_a_fifth_of_the_run_however_seldom_it_was_evaluated():
    seldom, often = [(500, 4.0), (1000, 3.75)], [(500, 4.0), (800, 3.9), (1000, 3.75)]
    assert advice(facts(val_losses=seldom))[2] == NOTHING[2]  # 6 % in half the run
    assert "fell by another 3.8 % after step 800" in advice(facts(val_losses=often))[2]


@pytest.mark.parametrize("missing", [{"val_losses": []}, {"losses": []}, {"seconds": dict.fromkeys(PHASES, 0.0)}])
def test_a_run_that_hardly_began_has_advice_too(missing):
    assert len(advice(facts(**missing))) == 3
