"""Advice is a pure function of the facts; the tests check both sides of every limit."""

import inspect
import math
import re

import pytest

from training.config import Config
from training.logging import advice as advice_module
from training.logging.advice import LIMITS, Facts, advice
from training.logging.phases import PHASES


def config(**changes) -> Config:
    options = {"data": {"sources": [{"type": "stdlib"}]}, "schedule": {"warmup_steps": 10}}
    return Config.model_validate(options | changes)


def time(**shares: float) -> dict[str, float]:
    """Return the seconds of 100 hours with these shares; the rest is `compute`."""
    return {"compute": 360_000 * (1 - sum(shares.values()))} | {
        phase: 360_000 * shares.get(phase, 0.0) for phase in PHASES if phase != "compute"
    }


def facts(**changes) -> Facts:
    """Return the facts of a healthy run on a GPU, with changes."""
    fine = Facts(
        seconds=time(),
        config=config(),
        on_gpu=True,
        mfu=0.45,
        memory_share=0.8,
        memory_gib=64.0,
        micro_batch=4,
        max_samples_per_rank=16,
        n_out_of_memory=0,
        clipped_share=0.1,
        n_skipped=0,
        losses=[(step, 5 - step / 1000) for step in range(1, 1001)],
        val_losses=[(step, 4.02 - step / 50_000) for step in range(100, 1001, 100)],
        dead_experts=0,
        n_experts=64,
        vocab_size=50_257,
    )
    return fine._replace(**changes)


def ending(last: float, best: float = 4.0) -> list[tuple[int, float]]:
    """Return validation losses with this best and last value."""
    return [(400, 4.01), (800, best), (1000, last)]


def training_losses(rises: bool) -> list[tuple[int, float]]:
    return [(step, 5 + (1 if rises else -1) * step / 1000) for step in range(1, 1001)]


NOTHING = [
    "memory: peak 64.0 GiB, 80 % of the device: nothing to improve",
    "speed: 100 % of the time went into steps: nothing to improve",
    "learning: validation loss ended near its lowest, 10 % of the steps were clipped: nothing to improve",
]
LN = math.log(50_257)
BY_HAND = config(micro_batch=4)
# For each limit: the side with advice (1: above), the changed facts at a value, and the text of the advice.
SIDES = {
    **{
        phase: (1, lambda value, phase=phase: {"seconds": time(**{phase: value})}, text)
        for phase, text in {
            "data": "of the time was spent waiting for data; put data.cache_dir on a faster disk",
            "communication": "of the time was spent waiting for other ranks; raise batch_tokens or use fewer processes",
            "evaluation": "of the time went into evaluation; raise eval.every or lower eval.tokens",
            "checkpoint": "of the time was spent waiting for saves; raise checkpoint.every",
            "idle": "of the time went into rows and logs; raise logging.every",
            "redone": "of the time went into steps done again after kills; lower checkpoint.every",
            "start": "of the time was start-up, with data and the first step; it does not grow with longer runs",
        }.items()
    },
    "mfu": (-1, lambda value: {"mfu": value}, "MFU is 30 %; try parallel.compile or a larger micro_batch"),
    "memory_full": (1, lambda value: {"memory_share": value}, "92 % was in use at the peak; --micro_batch 2 leaves"),
    "memory_empty": (
        -1,
        lambda value: {"memory_share": value, "config": BY_HAND},
        "micro_batch: auto finds 7 samples",
    ),
    "clipped": (
        1,
        lambda value: {"clipped_share": value},
        "50 % of the steps were clipped to optim.grad_clip 1;",
    ),
    "overfit": (1, lambda value: {"val_losses": ending(4 * (1 + value))}, "it overfits; use more text, fewer"),
    "hardly": (1, lambda value: {"val_losses": [(1000, value * LN)]}, "is 75 % of ln(vocabulary), the loss of random"),
    "falling": (1, lambda value: {"val_losses": ending(4 * (1 - value))}, "fell by another 3.0 % after step 800; more"),
}


@pytest.mark.parametrize("name", LIMITS)
def test_advice_appears_exactly_beyond_its_limit(name):
    sign, at, text = SIDES[name]
    limit = LIMITS[name]
    without_advice, with_advice = advice(facts(**at(limit - sign * 1e-6))), advice(facts(**at(limit + sign * 1e-6)))
    assert not any(text in line for line in without_advice)
    assert sum(text in line for line in with_advice) == 1
    assert len(with_advice) == len(without_advice) == 3


def test_every_limit_has_a_reason():
    reasons = re.findall(r'^    "(\w+)": \d\.\d+,  # .{20,}$', inspect.getsource(advice_module), re.MULTILINE)
    assert reasons == list(LIMITS)


def test_a_healthy_run_gets_one_figure_per_question():
    assert advice(facts()) == NOTHING
    on_cpu = advice(facts(on_gpu=False, mfu=None, memory_share=0.01, memory_gib=0.5, config=BY_HAND))
    assert on_cpu == ["memory: peak 0.5 GiB, 1 % of the device: nothing to improve", *NOTHING[1:]]


def test_every_problem_has_a_line_with_its_figure():
    lines = advice(facts(seconds=time(data=0.31, evaluation=0.22), mfu=0.12, clipped_share=0.63, dead_experts=3))
    assert lines == [
        NOTHING[0],
        "speed: 31 % of the time was spent waiting for data; put data.cache_dir on a faster disk",
        "speed: 22 % of the time went into evaluation; raise eval.every or lower eval.tokens",
        "speed: MFU is 12 %; try parallel.compile or a larger micro_batch",
        "learning: 63 % of the steps were clipped to optim.grad_clip 1; lower optim.learning_rate or use "
        "a longer warm-up (schedule.warmup or warmup_steps)",
        "learning: 3 of 64 experts are dead; raise bias_rate or switch_weight of their layers, or use fewer experts",
    ]


def test_skipped_steps_are_reported():
    assert any("learning: 3 steps were skipped because the loss" in line for line in advice(facts(n_skipped=3)))


def test_advice_after_running_out_of_memory():
    once = facts(n_out_of_memory=1, micro_batch=2)
    assert advice(once)[0] == (
        "memory: ran out once; --micro_batch 2 starts with the size that fit, and parallel.recompute: full makes room "
        "for more"
    )
    recomputed = config(parallel={"recompute": "full"})
    line = advice(facts(n_out_of_memory=3, micro_batch=1, config=recomputed))[0]
    assert "ran out 3 times" in line and "parallel.mesh.shard over more processes makes room" in line
    assert "; parallel.recompute: full leaves a margin" in advice(facts(memory_share=0.95, micro_batch=1))[0]


def test_advice_does_not_repeat_the_current_options():
    compiled, blocking = config(parallel={"compile": True}), config(checkpoint={"background": False})
    assert "MFU is 12 %; try a larger micro_batch" in advice(facts(mfu=0.12, config=compiled))[1]
    assert "MFU is 12 %; a wider model" in advice(facts(mfu=0.12, config=compiled, micro_batch=16))[1]
    assert "; parallel.compile pays in longer runs" in advice(facts(seconds=time(start=0.4), config=compiled))[1]
    assert "use checkpoint.background" in advice(facts(seconds=time(checkpoint=0.4), config=blocking))[1]
    sharded = config(parallel={"mesh": {"shard": 2}})
    assert "; raise micro_batch or use fewer" in advice(facts(seconds=time(communication=0.4), config=sharded))[1]
    assert advice(facts(memory_share=0.3))[0].endswith("nothing to improve")  # the size that auto chose
    assert advice(facts(memory_share=0.3, micro_batch=16, config=BY_HAND))[0].endswith("nothing to improve")


def test_a_rising_validation_loss_is_overfitting_only_if_the_training_loss_falls():
    worse = ending(4.5)
    assert advice(facts(val_losses=worse, losses=training_losses(rises=False)))[2] == (
        "learning: validation loss was lowest at step 800, 4.00, and rose to 4.50 while training loss fell: it "
        "overfits; use more text, fewer steps or more optim.weight_decay"
    )
    assert advice(facts(val_losses=worse, losses=training_losses(rises=True)))[2] == (
        "learning: validation loss was lowest at step 800, 4.00, and rose to 4.50 while training loss rose too: it is "
        "unstable; lower optim.learning_rate"
    )


def test_the_fall_is_scaled_to_a_fifth_of_the_run():
    seldom, often = [(500, 4.0), (1000, 3.75)], [(500, 4.0), (800, 3.9), (1000, 3.75)]
    assert advice(facts(val_losses=seldom))[2] == NOTHING[2]  # 6 % in half the run
    assert "fell by another 3.8 % after step 800" in advice(facts(val_losses=often))[2]


@pytest.mark.parametrize("missing", [{"val_losses": []}, {"losses": []}, {"seconds": dict.fromkeys(PHASES, 0.0)}])
def test_a_very_short_run_has_advice(missing):
    assert len(advice(facts(**missing))) == 3
