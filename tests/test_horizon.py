"""The length of a run as steps, tokens, epochs or tokens per parameter, and shares of it."""

import json
import re
from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from training import plan
from training.compare.runner import steps_of_config
from training.config import CosineSchedule, LinearSchedule, WSDSchedule
from training.data import Samples, prepare
from training.errors import UserError
from training.model import model_stats
from training.optim.schedule import DECAY_SHAPES, lr_factor
from training.options.cli import dump_config, load_config
from training.options.yaml import ConfigErrors
from training.planning.horizon import epoch_samples, resolve_steps
from training.train import train
from training.twin import twin

FILE = "data: {sources: [{type: stdlib}]}\nbatch_tokens: 1024\n"


@pytest.fixture
def load(tmp_path):
    """Return a function from YAML text and flags to a config."""

    def load(text, **flags):
        path = tmp_path / "my.yaml"
        path.write_text(FILE + text)
        return load_config(path, {flag.replace("__", "."): value for flag, value in flags.items()})

    return load


def problems(call, *args, **kwargs) -> list[str]:
    with pytest.raises(ConfigErrors) as error:
        call(*args, **kwargs)
    return [re.sub(r"^/.*/", "", line) for line in error.value.lines]


# --- one of several options -------------------------------------------------------------------------------


def test_a_run_has_one_length_and_without_any_1000_steps(load):
    names = ("steps", "tokens", "epochs", "tokens_per_parameter")
    assert [getattr(load(""), name) for name in names] == [1000, None, None, None]
    assert [getattr(load("tokens: null"), name) for name in names] == [1000, None, None, None]
    assert [getattr(load("tokens: 1e9"), name) for name in names] == [None, 10**9, None, None]
    assert [getattr(load("epochs: 2"), name) for name in names] == [None, None, 2, None]
    assert load("steps: 1e3") == load("")


@pytest.mark.parametrize("text", ["tokens: 1e9", "epochs: 0.5", "tokens_per_parameter: 20", "steps: 7", ""])
def test_a_flag_replaces_the_length_of_the_file(load, text):
    assert load(text, steps="3") == load("steps: 3")
    assert load(text, tokens="5000") == load("tokens: 5000")


def test_a_flag_replaces_a_length_of_the_schedule(load):
    text = "schedule: {type: wsd, warmup_steps: 5, decay: 0.2}"
    assert load(text, schedule__warmup=".1").schedule == WSDSchedule(warmup=0.1, decay=0.2)
    assert load(text, schedule__decay_steps="9").schedule == WSDSchedule(warmup_steps=5, decay_steps=9)
    assert load(text, schedule="{warmup: .1}").schedule == WSDSchedule(warmup=0.1, decay=0.2)


def test_two_lengths_are_one_line_with_both_places(load):
    names = "set one of steps, tokens, epochs, tokens_per_parameter"
    assert problems(load, "tokens: 1e9\n\nsteps: 3") == [f"my.yaml:5: steps: tokens is also set, on line 3; {names}"]
    assert problems(load, "steps: 3", epochs="1", tokens="5") == [
        f"--epochs: tokens is also set, with --tokens; {names}"
    ]
    assert problems(load, "schedule:\n  warmup: 0.1\n  warmup_steps: 5") == [
        "my.yaml:5: schedule.warmup_steps: warmup is also set, on line 4; set one of warmup_steps, warmup"
    ]
    with pytest.raises(ValueError, match="warmup: warmup_steps is also set"):
        CosineSchedule(warmup=0.1, warmup_steps=5)


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("tokens: 1.5", "my.yaml:3: tokens: 1.5 is not an integer >= 1 or null"),
        ("tokens: []", "my.yaml:3: tokens: [] is not an integer >= 1 or null"),
        ("schedule: {warmup_steps: {}}", "my.yaml:3: schedule.warmup_steps: {} is not an integer >= 0 or null"),
        ("tokens: 0", "my.yaml:3: tokens: 0 is not an integer >= 1 or null"),
        ("tokens: 1e30", "my.yaml:3: tokens: 1e+30 is more than an integer of 64 bits holds"),
        ("epochs: 0", "my.yaml:3: epochs: 0 is not a number > 0 or null"),
        ("tokens_per_parameter: -1", "my.yaml:3: tokens_per_parameter: -1 is not a number > 0 or null"),
        (
            "schedule: {warmup: 100}",
            "my.yaml:3: schedule.warmup: 100 is not a share of the run, below 1; write warmup_steps: 100",
        ),
        (
            "schedule: {type: wsd, decay: 40}",
            "my.yaml:3: schedule.decay: 40 is not a share of the run, at most 1; write decay_steps: 40",
        ),
        (
            "schedule: {type: wsd, warmup: 0.3, decay: 0.8}",
            "my.yaml:3: schedule.decay: 0.8 and warmup 0.3 are more than the run together; lower one",
        ),
    ],
)
def test_a_wrong_length_is_one_line(load, text, line):
    assert problems(load, text) == [line]


@pytest.mark.parametrize("text", ["tokens: 1e9", "epochs: 0.5", "schedule: {type: wsd, warmup: 0.1, decay: 0.9}"])
def test_a_config_with_a_length_survives_a_round_trip(load, tmp_path, text):
    config, path = load(text), tmp_path / "again.yaml"
    path.write_text(dump_config(config))
    assert load_config(path) == config


# --- shares of the run ------------------------------------------------------------------------------------


def test_a_share_is_rounded_to_steps():
    schedule = WSDSchedule(warmup=0.025, decay=0.6)
    assert schedule.in_steps(400) == schedule.fitted(400) == WSDSchedule(warmup_steps=10, decay_steps=240)
    assert schedule.fitted(3) == WSDSchedule(warmup_steps=0, decay_steps=2)
    assert schedule.fitted(1) == WSDSchedule(warmup_steps=0, decay_steps=1)
    assert [CosineSchedule(warmup=0.1).in_steps(steps).warmup_steps for steps in (4, 5, 15, 30)] == [0, 1, 2, 3]
    assert WSDSchedule(warmup=0.1, decay=1e-9).in_steps(10).decay_steps == 1


@given(
    steps=st.integers(1, 10**6),
    warmup=st.decimals(0, "0.999", places=3).map(float),
    decay=st.decimals("0.001", 1, places=3).map(float),
)
def test_shares_fit_into_any_run(steps, warmup, decay):
    if round(warmup * 1000) + round(decay * 1000) > 1000:
        with pytest.raises(ValueError, match="more than the run"):
            WSDSchedule(warmup=warmup, decay=decay)
        return
    fitted = WSDSchedule(warmup=warmup, decay=decay, final_ratio=0.25).fitted(steps)
    assert fitted.warmup_steps + fitted.decay_steps <= steps and (fitted.warmup, fitted.decay) == (None, None)
    assert abs(fitted.warmup_steps - warmup * steps) <= 1.5
    assert lr_factor(fitted, steps - 1, steps) == (0.25 if steps > 1 else 1.0)


@pytest.mark.parametrize("shape", DECAY_SHAPES)
def test_every_shape_of_the_decay_falls_from_the_peak_to_the_final_ratio(shape):
    config = WSDSchedule(warmup_steps=10, decay_steps=40, final_ratio=0.1, decay_shape=shape)
    factors = [lr_factor(config, step, 100) for step in range(100)]
    assert factors[10] == factors[59] == 1.0 > factors[60] and factors[99] == 0.1
    assert factors == factors[:10] + sorted(factors[10:], reverse=True)
    middle = {"linear": 0.55, "cosine": 0.55, "1-sqrt": 0.1 + 0.9 * (1 - 0.5**0.5)}[shape]
    assert factors[79] == pytest.approx(middle)
    quarter = {"linear": 0.775, "cosine": 0.1 + 0.9 * (2 + 2**0.5) / 4, "1-sqrt": 0.55}[shape]
    assert factors[69] == pytest.approx(quarter)


def test_a_decay_over_the_whole_run_is_a_linear_schedule():
    wsd, linear = WSDSchedule(warmup=0, decay=1.0).fitted(50), LinearSchedule(warmup=0, final_ratio=0.0).fitted(50)
    assert [lr_factor(wsd, step, 50) for step in range(50)] == [lr_factor(linear, step, 50) for step in range(50)]


# --- steps ------------------------------------------------------------------------------------------------


def test_tokens_epochs_and_tokens_per_parameter_round_up_to_whole_steps(config):
    def steps(samples_per_epoch=None, **length):
        resolved = resolve_steps(sized(config(**{"steps": None} | length)), samples_per_epoch)
        assert (resolved.tokens, resolved.epochs, resolved.tokens_per_parameter) == (None, None, None)
        return resolved.steps

    def sized(config):
        return config.model_copy(update={"model": config.model.model_copy(update={"vocab_size": 320})})

    assert [steps(tokens=n) for n in (1, 256, 257, 10**9)] == [1, 1, 2, -(-(10**9) // 256)]  # 8 samples of 32 tokens
    assert [steps(epoch_samples([n], None), epochs=1) for n in (8, 9, 80)] == [1, 2, 10]
    assert steps(epoch_samples([400], None), epochs=1.1) == 55  # 440 samples: in floats, 1.1 x 400 is more
    assert steps(epoch_samples([30, 100], [1, 3]), epochs=2) == 30  # 120 samples read the first source once
    stats = model_stats(sized(config()).model)
    assert stats.n_active_parameters < stats.n_parameters
    assert steps(tokens_per_parameter=20) == -(-20 * stats.n_active_parameters // 256)
    with pytest.raises(UserError, match=r"^tokens_per_parameter: 1e\+30 is .* steps, more than can be counted"):
        steps(tokens_per_parameter=1e30)


def test_an_epoch_reads_every_window_once(config):
    one = config(steps=None, epochs=1, batch_tokens=32)
    steps, samples = steps_of_config(one), Samples(prepare(one.data, quiet=True).train, n_positions=32, seed=0)
    reads = Counter(zip(*(part.tolist() for part in samples.locate(np.arange(steps))), strict=True))
    assert set(reads.values()) == {1} and len(reads) == samples.n_samples


def stored(folder):
    return load_config(folder / "config.yaml")


def test_a_run_of_some_tokens_holds_its_steps_and_goes_on_with_another_spelling(config, capsys, tmp_path):
    folder = tmp_path / "runs" / "small"
    schedule = {"type": "wsd", "warmup": 0.25, "decay": 0.5}
    assert train(config(steps=None, tokens=1025, schedule=schedule)) == 0
    resolved = stored(folder)
    assert (resolved.steps, resolved.tokens) == (5, None)
    assert resolved.schedule == WSDSchedule(warmup_steps=1, decay_steps=3)
    assert json.loads((folder / "summary.json").read_text())["tokens"] == 1280
    assert "steps       5, 1,280 tokens" in capsys.readouterr().out
    rows = (folder / "metrics.jsonl").read_text()
    for length in ({"tokens": 1280}, {"steps": 5}):
        assert train(config(**{"steps": None} | length, schedule=schedule)) == 0
    assert train(config(steps=5, schedule={"type": "wsd", "warmup_steps": 1, "decay_steps": 3})) == 0
    assert (folder / "metrics.jsonl").read_text() == rows
    with pytest.raises(UserError, match=r"schedule.decay_steps: 3 -> 2; .*steps: 5 -> 4|steps: 5 -> 4"):
        train(config(steps=None, tokens=1024, schedule=schedule))


def test_a_schedule_that_does_not_fit_is_told_once_the_steps_are_known(config, capfd):
    assert train(config(steps=None, tokens=512, schedule={"type": "constant", "warmup_steps": 9})) == 0
    assert "schedule.warmup_steps: 9 does not fit into steps 2; this run uses 0\n" in capfd.readouterr().err


def test_the_plan_shows_the_steps(config, tmp_path, capsys):
    path = tmp_path / "my.yaml"

    def lines(**length):
        path.write_text(dump_config(config(**{"steps": None, "name": "planned"} | length)))
        assert plan.main(["--config", str(path)]) == 0
        return capsys.readouterr().out

    prepare(config().data, quiet=True)
    assert re.search(r"^steps +4 = 1,024 tokens, ", lines(tokens=1000), re.M)
    per_parameter = lines(tokens_per_parameter=20)
    assert re.search(r"^steps +\S+ = \S+ tokens, 20 per active parameter$", per_parameter, re.M)
    assert re.search(r" training tokens, 1 epochs", lines(epochs=1))
    path.write_text(dump_config(config(steps=None, epochs=1, data={"sources": [{"paths": ["missing.txt"]}]})))
    assert plan.main(["--config", str(path)]) == 2
    assert capsys.readouterr().err == (
        "error: epochs: the training text is not prepared, so its size is unknown; run training.prepare\n"
    )


def test_a_twin_of_a_run_by_tokens_per_parameter_is_one_line(config):
    with pytest.raises(UserError, match=r"^tokens_per_parameter: the twin has other parameters"):
        twin(config(steps=None, tokens_per_parameter=20))
    assert twin(config(steps=None, tokens=1000)).tokens == 1000


def test_a_comparison_resolves_the_length_before_it_makes_runs_equal(config):
    assert steps_of_config(config(steps=None, tokens=1000)) == 4
    short, long = (steps_of_config(config(steps=None, tokens_per_parameter=n)) for n in (1, 10))
    assert long == pytest.approx(10 * short, abs=10)
