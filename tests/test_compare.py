"""Comparisons: paired seeds, equal tokens, time or FLOPs, runs that are used again, kills, and what is printed."""

import json
import shutil
import signal
import time
from pathlib import Path

import pytest
from conftest import rows, tensors, write_config
from scipy.stats import ttest_rel

from training.compare import runner
from training.compare.page import comparison_charts
from training.compare.results import Comparison, RunResult, VariantResult, paired_difference
from training.compare.text import table, verdict_lines
from training.compare.variants import build_variants, differing_options
from training.errors import UserError
from training.files import run_lock
from training.model.stats import model_stats
from training.options import cli
from training.train import train
from training.twin import twin


@pytest.fixture
def write(options, tmp_path):
    """Write a small configuration; return its path."""

    def go(name: str = "small", **changes) -> str:
        changes = {"name": name, "steps": 4, "eval": {"every": 2, "tokens": 256}} | changes
        return str(write_config(tmp_path / f"{name}.yaml", options(**changes)))

    return go


@pytest.fixture
def compare(call):
    return lambda *arguments: call("compare.__main__", *map(str, arguments))


def result_of(folder: Path) -> dict:
    return json.loads((folder / "compare.json").read_text())


def figures(folder: Path) -> list:
    """Return what a comparison computed, without times."""
    content = result_of(folder)
    return [
        (variant["name"], variant["mean"], variant["difference"], [run["value"] for run in variant["runs"]])
        for variant in content["variants"]
    ]


def note_trained_runs(monkeypatch) -> list[str]:
    """Return a list to which each call of `train` adds the name of its run."""
    names = []
    monkeypatch.setattr(runner, "train", lambda config, **kwargs: names.append(config.name) or train(config, **kwargs))
    return names


def steps_of(folder: Path) -> dict[int, dict]:
    """Return the runs of a comparison by their number of steps."""
    return {run["steps"]: run for variant in result_of(folder)["variants"] for run in variant["runs"]}


def test_each_run_has_the_bits_of_the_same_run_alone_and_differences_are_paired(compare, write, tmp_path):
    path = write()
    done = compare(path, "--vary", "optim.learning_rate=1e-3,1e-2", "--seeds", 3)
    assert done.returncode == 0, done.stderr
    folder = tmp_path / "runs/compare/small-by-learning_rate"
    alone = cli.load_config(path, {"optim.learning_rate": "1e-2", "seed": "1", "name": "alone"})
    assert train(alone) == 0
    run = folder / "learning_rate_1e-2-seed-1"
    assert rows(run) == rows(alone.run_dir) and tensors(run, 4) == tensors(alone.run_dir, 4)

    content = result_of(folder)
    values = {variant["name"]: [run["value"] for run in variant["runs"]] for variant in content["variants"]}
    first, second = values["learning_rate=1e-3"], values["learning_rate=1e-2"]
    assert len(set(first)) == 3 and [run["seed"] for run in content["variants"][0]["runs"]] == [0, 1, 2]
    test = ttest_rel(second, first)
    (difference,) = [variant["difference"] for variant in content["variants"] if variant["difference"]]
    assert difference["p"] == pytest.approx(test.pvalue) and difference["n_seeds"] == 3
    assert (difference["low"], difference["high"]) == pytest.approx(tuple(test.confidence_interval(0.95)))
    assert content["baseline"] == "learning_rate=1e-3" and content["test"] == "paired t test"
    assert content["options"] == {"optim.learning_rate": {"learning_rate=1e-3": 0.001, "learning_rate=1e-2": 0.01}}
    best = content["variants"][0]["name"]
    assert best == min(values, key=lambda name: sum(values[name]))
    lines = done.stdout.splitlines()
    assert any(line.startswith(best) for line in lines) and str(folder / "compare.html") in lines[-1]
    page = (folder / "compare.html").read_text()
    assert "Validation loss by tokens" in page and "Validation loss by seconds" in page and "FLOPs" in page


def test_finished_runs_are_used_again_and_seeds_can_be_added(compare, write, tmp_path, monkeypatch):
    arguments = (write(), "--vary", "optim.learning_rate=1e-3,1e-2")
    assert compare(*arguments, "--seeds", 1).returncode == 0
    trained = note_trained_runs(monkeypatch)
    assert compare(*arguments, "--seeds", 2).returncode == 0
    assert [name[-1] for name in trained] == ["1", "1"]
    assert result_of(tmp_path / "runs/compare/small-by-learning_rate")["variants"][0]["difference"] is not None


def test_a_comparison_with_one_seed_says_that_it_may_be_noise(compare, write):
    done = compare(write(), "--vary", "seed_of_nothing=1", "--seeds", 1)
    assert done.returncode == 2
    done = compare(write(), "--vary", "optim.learning_rate=1e-3,1e-2", "--seeds", 1)
    assert "with one seed: it may be noise (--seeds 5)" in done.stdout


def test_the_seeds_of_finished_runs_are_kept_and_filled_up(compare, write, run, tmp_path):
    folder = run(name="seven", seed=7, steps=4, eval={"every": 2, "tokens": 256})
    done = compare(folder, write("other", steps=4, optim={"learning_rate": 1e-2}), "--seeds", 2)
    assert done.returncode == 0, done.stderr
    out = tmp_path / "runs/compare/seven-vs-other"
    assert "seeds 7, 8" in done.stdout
    assert all([run["seed"] for run in variant["runs"]] == [7, 8] for variant in result_of(out)["variants"])
    assert (
        (out / "compare_variants/seven.yaml").exists()
        and (out / "seven-seed-8").exists()
        and not (out / "seven-seed-7").exists()
    )


def test_varied_steps_stay_as_they_are(compare, write, tmp_path):
    assert compare(write(), "--vary", "steps=2,4", "--seeds", 1).returncode == 0
    assert sorted(steps_of(tmp_path / "runs/compare/small-by-steps")) == [2, 4]


def test_a_second_process_does_not_disturb_a_comparison(compare, write, tmp_path):
    with run_lock(tmp_path / "out"):
        done = compare(write(), "--vary", "steps=2,4", "--out", tmp_path / "out")
    assert done.returncode == 2 and "choose another --out" in done.stderr


def test_the_loss_of_a_run_is_that_of_its_final_model(compare, write, tmp_path):
    options = ("--vary", "eval.patience=1,9", "--seeds", 1, "--optim.learning_rate", "0.3", "--steps", "40")
    assert compare(write(checkpoint={"every": 5}), *options).returncode == 0
    for variant in result_of(tmp_path / "runs/compare/small-by-patience")["variants"]:
        (run,) = variant["runs"]
        summary = json.loads((Path(run["folder"]) / "summary.json").read_text())
        log = {row["step"]: row.get("val_loss") for row in rows(Path(run["folder"]))}
        assert run["value"] == pytest.approx(log[summary["model_step"]])
    assert summary["model_step"] <= summary["steps"]


def test_equal_tokens_and_flops_set_the_steps(compare, write, tmp_path):
    path, folder = write(batch_tokens=256), tmp_path / "runs/compare"
    assert compare(path, "--vary", "batch_tokens=256,512", "--seeds", 1).returncode == 0
    runs = steps_of(folder / "small-by-batch_tokens")
    assert sorted(runs) == [2, 4] and {run["tokens"] for run in runs.values()} == {1024}

    done = compare(path, "--vary", "model.n_embd=16,32", "--equal", "flops", "--seeds", 1, "--steps", "40")
    assert done.returncode == 0, done.stderr
    by_steps = {steps: run["flops"] for steps, run in steps_of(folder / "small-by-n_embd").items()}
    configs = [cli.load_config(path, {"model.n_embd": str(n), "model.vocab_size": "320"}) for n in (16, 32)]
    costs = [model_stats(config.resolved().model).flops_per_token for config in configs]
    few = min(by_steps)
    assert few == round(40 * costs[0] / costs[1]) and by_steps[few] == pytest.approx(by_steps[40], rel=0.1)
    assert f"{few} steps instead of 40, for the flops of n_embd=16" in done.stderr


def test_runs_of_equal_time_take_turns_and_compute_the_same(compare, write, tmp_path, monkeypatch):
    monkeypatch.setattr(runner, "TURN_S", 0.0)  # a turn is a step
    schedule = {"type": "wsd", "warmup_steps": 1, "decay_steps": 50}  # shortened to fit the steps
    path, order = write(steps=3, schedule=schedule), note_trained_runs(monkeypatch)
    assert compare(path, "--twin", "--equal", "time", "--seeds", 1).returncode == 0
    folder = tmp_path / "runs/compare/small-vs-small-dense"
    order = [name for name in order if not name.startswith("timing")]
    assert order[:4] == ["small-seed-0", "small_dense_twin-seed-0"] * 2
    assert not list(folder.glob("*timing*"))
    times = json.loads((folder / "step_times.json").read_text())
    steps = result_of(folder)["variants"]
    by_name = {variant["name"]: variant["runs"][0]["steps"] for variant in steps}
    assert by_name["small"] == 3
    assert by_name["small, dense twin"] == max(1, round(3 * times["small"] / times["small, dense twin"]))
    alone = twin(cli.load_config(path, {"steps": str(by_name["small, dense twin"])}))
    assert train(alone) == 0
    assert rows(folder / "small_dense_twin-seed-0") == rows(alone.run_dir)

    before = (folder / "step_times.json").read_text()
    (folder / "step_times.json").write_text('{"small": null}')
    done = compare(path, "--twin", "--equal", "time", "--seeds", 1)
    assert done.returncode == 2 and "step_times.json: damaged" in done.stderr
    (folder / "step_times.json").write_text(before)
    order = note_trained_runs(monkeypatch)
    assert compare(path, "--twin", "--equal", "time", "--seeds", 1).returncode == 0
    assert (folder / "step_times.json").read_text() == before and order == []


def test_a_killed_comparison_goes_on(processes, compare, write, tmp_path):
    arguments = (write(steps=24, checkpoint={"every": 5}), "--vary", "optim.learning_rate=1e-3,1e-2", "--seeds", "2")
    folder = tmp_path / "runs/compare/small-by-learning_rate"
    assert compare(*arguments).returncode == 0
    uninterrupted = figures(folder)
    third = folder / "learning_rate_1e-2-seed-1" / "checkpoints" / "step-00000005"
    for number in (signal.SIGKILL, signal.SIGTERM):
        shutil.rmtree(folder)
        process = processes.start("training.compare.__main__:main", *arguments)
        until = time.monotonic() + 60
        while not third.exists() and time.monotonic() < until:
            time.sleep(0.01)
        assert third.exists()
        process.signal(number)
        done = process.wait()
        assert done.returncode != 0 and not (folder / "compare.json").exists()
        if number == signal.SIGTERM:
            assert done.returncode == 128 + number and "the same command resumes it" in done.stderr
        assert compare(*arguments).returncode == 0
        assert figures(folder) == uninterrupted


def test_a_run_that_diverges_is_named_and_the_others_are_compared(compare, write, tmp_path):
    done = compare(write(steps=30), "--vary", "optim.learning_rate=1e-3,1e12,1e-2", "--seeds", 2)
    assert done.returncode == 1 and "the comparison continues without it" in done.stderr
    content = result_of(tmp_path / "runs/compare/small-by-learning_rate")
    assert {variant["name"] for variant in content["variants"]} == {"learning_rate=1e-3", "learning_rate=1e-2"}
    assert [(each["name"], each["seed"]) for each in content["failures"]] == [
        ("learning_rate=1e12", 0), ("learning_rate=1e12", 1)
    ]  # fmt: skip
    assert "learning_rate=1e12, seed 1, failed: step " in done.stdout and "lower the learning rate" in done.stdout


def test_finished_runs_that_differ_by_the_seed_alone_are_one_variant(compare, run, tmp_path):
    folders = []
    for name, seed, rate in (("a0", 0, 1e-3), ("a1", 1, 1e-3), ("b0", 0, 1e-2), ("b1", 1, 1e-2)):
        changes = {"steps": 4, "seed": seed, "optim": {"learning_rate": rate}, "eval": {"every": 2, "tokens": 256}}
        folders.append(str(run(name=name, **changes)))
    out = tmp_path / "comparison"
    done = compare(*folders, "--out", out)
    assert done.returncode == 0, done.stderr
    content = result_of(out)
    assert {variant["name"]: len(variant["runs"]) for variant in content["variants"]} == {"a0": 2, "b0": 2}
    assert sorted(path.name for path in out.iterdir()) == ["compare.html", "compare.json"]

    done = compare(*folders[:3], "--out", out)  # nothing is trained: one seed is shared
    assert done.returncode == 0 and "training" not in done.stdout
    assert [variant["difference"]["n_seeds"] for variant in result_of(out)["variants"] if variant["difference"]] == [1]
    twice = compare(folders[0], folders[0])
    assert twice.returncode == 2 and "the same options and seed as" in twice.stderr


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        ((), "name configurations or finished runs first"),
        (("small.yaml",), "small is the only configuration: add a second one, --vary or --twin"),
        (("dense.yaml", "--twin"), "dense is the only configuration: it has no experts, so it has no dense twin"),
        (("small.yaml", "small.yaml"), "two configurations have the name small"),
        (("small.yaml", "--vary", "optim.learning_rate"), "--vary optim.learning_rate: not OPTION=VALUE,VALUE"),
        (("small.yaml", "--vary", "optim.learning_rat=1,2"), "did you mean 'optim.learning_rate'?"),
        (("small.yaml", "--vary", "seed=1,2"), "--vary seed: use --seeds"),
        (("small.yaml", "--vary", "steps=1,2", "--steps", "3"), "--vary steps: steps is also set"),
        (("small.yaml", "--vary", "steps=1,2", "--vary", "steps=3,4"), "--vary steps: steps is also set"),
        (("small.yaml", "--vary", "model.n_embd=16,32", "--model", "{}"), "model is also set, and one would replace"),
        (("small.yaml", "--vary", "steps=2,2"), "--vary steps=2,2: a value is there twice"),
        (("small.yaml", "--vary", "steps=1,2", "--equal", "time"), "--equal time: it sets the steps"),
        (("small.yaml", "dense.yaml", "--metric", "tasks_mean"), "--metric tasks_mean: small has no eval.tasks"),
        (("small.yaml", "dense.yaml", "--metric", "averaged_val_loss"), "small has no optim.average"),
        (("small.yaml", "--vary", "steps=2,[", "--seeds", "2"), "not OPTION=VALUE,VALUE"),
        (("small.yaml", "dense.yaml", "--seeds", "0"), "--seeds: 0 is less than 1"),
        (("small.yaml", "dense.yaml", "--equal", "cost"), "--equal: invalid choice: 'cost'"),
        (("small.yaml", "dense.yaml", "--step", "3"), "--step: unknown option"),
        (("small.yaml", "dense.yaml", "--steps", "3", "more.yaml"), "more.yaml: not a flag"),
        (("small.yaml", "none.yaml"), "none.yaml"),
        (("small.yaml", "--vary", "eval.tokens=256,512"), "eval.tokens: 256 and 512; losses over different text"),
        (("small.yaml", "runs"), "runs: no finished run"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_wrong_input_is_one_line_and_trains_nothing(compare, write, tmp_path, monkeypatch, arguments, line):
    write("small")
    write("dense", model={"n_layer": 1, "n_head": 2, "n_embd": 16, "n_positions": 32})
    (tmp_path / "runs").mkdir()
    monkeypatch.chdir(tmp_path)
    done = compare(*arguments)
    assert done.returncode == 2 and done.stdout == ""
    assert len(done.stderr.splitlines()) == 1 and line in done.stderr
    assert list((tmp_path / "runs").iterdir()) == []


def test_another_comparison_is_not_overwritten(compare, write):
    arguments = ("--vary", "optim.learning_rate=1e-3,1e-2", "--seeds", 1)
    assert compare(write(), *arguments).returncode == 0
    done = compare(write(batch_tokens=512), *arguments)
    assert done.returncode == 2 and "batch_tokens: 256 -> 512; choose another --out" in done.stderr


@pytest.mark.parametrize(
    "changes",
    [("--checkpoint.final", "best"), ("--eval.best", "average"), ("--eval.every", "1")],
    ids=lambda changes: changes[0],
)
def test_runs_with_another_final_model_are_not_used_again(compare, write, changes):
    arguments = (write(optim={"average": {"decay": 0.9}}), "--vary", "optim.learning_rate=1e-3,1e-2", "--seeds", 1)
    assert compare(*arguments).returncode == 0
    done = compare(*arguments, *changes)
    assert done.returncode == 2 and f"{changes[0][2:]}: " in done.stderr and "choose another --out" in done.stderr


def test_another_run_in_the_folder_and_the_users_files_are_left_alone(compare, write, run, tmp_path):
    paths = [write("a"), write("b", optim={"learning_rate": 1e-2})]
    before = [Path(path).read_text() for path in paths]
    run(name="a-seed-0", out_dir=str(tmp_path), steps=4)
    done = compare(*paths, "--seeds", 1, "--out", tmp_path)
    assert done.returncode == 2 and "a-seed-0: a run that this comparison did not train" in done.stderr
    shutil.rmtree(tmp_path / "a-seed-0")
    assert compare(*paths, "--seeds", 1, "--out", tmp_path).returncode == 0
    assert [Path(path).read_text() for path in paths] == before


def test_seeds_of_changed_text_are_not_averaged(compare, options, tmp_path):
    text = tmp_path / "text.txt"
    data = options()["data"] | {"sources": [{"paths": [str(text)]}]}
    text.write_text("".join(f"{n} and {n} are {n + n}.\n" for n in range(900)))
    path = str(write_config(tmp_path / "small.yaml", options(steps=4, data=data)))
    arguments = (path, "--vary", "optim.learning_rate=1e-3,1e-2")
    assert compare(*arguments, "--seeds", 1).returncode == 0
    text.write_text("".join(f"{n} or {n} is {n}.\n" for n in range(900)))
    done = compare(*arguments, "--seeds", 2)
    assert done.returncode == 2 and "its runs have different text or tokenizers" in done.stderr


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("summary.json", '{"steps": 4, "tokens": 1024, "time_s": "x", "val_loss": 2.0}'),
        ("summary.json", '{"steps": 0, "tokens": 0, "time_s": 0.0, "val_loss": 2.0}'),
        ("summary.json", '{"steps": 4, "tokens": 1024, "time_s": 1.0, "val_loss": Infinity}'),
        ("summary.json", "[]"),
        ("run.json", '{"facts": {"data": [1], "flops_per_token": "x"}}'),
    ],
)
def test_damaged_files_of_a_finished_run_are_one_line(compare, run, tmp_path, name, content):
    folders = [run(name=each, steps=4, optim={"learning_rate": rate}) for each, rate in (("a", 1e-3), ("b", 1e-2))]
    (folders[1] / name).write_text(content)
    done = compare(*folders, "--out", tmp_path / "out")
    if name == "run.json":  # its FLOPs and text are unknown
        assert done.returncode == 0
    else:
        assert done.returncode == 2 and len(done.stderr.splitlines()) == 1
        assert str(folders[1]) in done.stderr and "summary.json" in done.stderr


def test_names_of_other_values_differ_and_equal_values_are_refused(write):
    variants = build_variants([write()], {}, ["init_from=ä,ö,p q,p_q"], with_twins=False, train_runs=False)
    assert len({variant.name for variant in variants}) == 4
    with pytest.raises(UserError, match="a value is there twice"):
        build_variants([write()], {}, ["optim.learning_rate=1e-3,0.001"], with_twins=False, train_runs=False)


def test_finished_runs_that_differ_by_a_kernel_are_variants(compare, run, tmp_path):
    folders = [run(name=name, steps=4, micro_batch=size) for name, size in (("a", 4), ("b", 2))]
    assert compare(*folders, "--out", tmp_path / "out").returncode == 0
    assert result_of(tmp_path / "out")["options"] == {"micro_batch": {"a": 4, "b": 2}}


def run_of(seed: int, value: float, tokens: int = 100) -> RunResult:
    return RunResult(seed, Path("r"), value, 10, tokens, 1.0, 1e9, "text")


def test_a_difference_needs_shared_seeds_and_some_spread():
    baseline = {0: 0.4, 1: 0.7, 2: 0.2}
    assert paired_difference([run_of(7, 1.0)], baseline) is None
    assert paired_difference([run_of(1, 2.7)], baseline)[:2] == (1, 2.0)
    for shift in (0.0, 0.1):  # equal up to rounding: a t test would be certain
        runs = [run_of(seed, value + shift) for seed, value in baseline.items()]
        assert paired_difference(runs, baseline) == (3, pytest.approx(shift), None, None, None)


def test_a_variant_that_shares_no_seed_is_no_baseline():
    results = [VariantResult(name, (run_of(seed, 1.0),), None) for seed, name in enumerate("ab")]
    comparison = Comparison("val_loss", "tokens", results, {}, {}, [])
    assert [row[4] for row in table(comparison)[1:]] == ["baseline", "no shared seed"]
    assert verdict_lines(comparison) == ["b and a share no seed, so they are not compared."]


def test_variants_are_ranked_by_their_paired_differences():
    """b is better with each shared seed, though its mean over other seeds is higher."""
    a = VariantResult("a", (run_of(0, 1.0), run_of(1, 5.0)), None)
    runs = (run_of(1, 4.9), run_of(2, 9.0))
    b = VariantResult("b", runs, paired_difference(runs, {0: 1.0, 1: 5.0}))
    assert [result.label for result in Comparison("val_loss", "tokens", [a, b], {}, {}, []).ranked] == ["b", "a"]


@pytest.mark.parametrize(("metric", "word"), [("val_loss", "better"), ("tasks_mean", "worse")])
def test_the_verdict_knows_which_direction_is_better(metric, word):
    baseline = VariantResult("a", tuple(run_of(seed, 1.0 + seed / 10) for seed in range(3)), None)
    runs = tuple(run_of(seed, 0.5 + seed / 10 + seed / 1000) for seed in range(3))
    difference = paired_difference(runs, {run.seed: run.value for run in baseline.runs})
    comparison = Comparison(metric, "tokens", [baseline, VariantResult("b", runs, difference)], {}, {}, [])
    (line,) = verdict_lines(comparison)
    assert line.startswith("b is 0.4990 ") and f" {word} than a (95 % interval" in line
    best = "b" if word == "better" else "a"
    assert table(comparison)[1][0] == best


def test_a_difference_within_noise_is_called_so():
    baseline = VariantResult("a", (run_of(0, 1.0), run_of(1, 1.1)), None)
    runs = (run_of(0, 1.1), run_of(1, 1.0))
    difference = paired_difference(runs, {0: 1.0, 1: 1.1})
    comparison = Comparison("val_loss", "tokens", [baseline, VariantResult("b", runs, difference)], {}, {}, [])
    assert "no difference beyond noise" in verdict_lines(comparison)[0]


def test_the_options_of_other_variants_are_empty_and_the_seed_is_none(write):
    adamw, lion = (cli.load_config(write(), {"optim": f"{{type: {name}}}"}) for name in ("adamw", "lion"))
    options = differing_options([adamw, lion.model_copy(update={"seed": 5})])
    assert options["optim.type"] == ["adamw", "lion"] and options["optim.eps"][1] == ""
    assert "seed" not in options and "name" not in options


def test_a_comparison_of_other_tokenizers_uses_bits_per_byte(compare, write):
    paths = [write("byte")]
    data = cli.load_config(paths[0]).data.model_dump(mode="json") | {"tokenizer": {"type": "bpe", "vocab_size": 300}}
    paths.append(write("bpe", data=data))
    done = compare(*paths, "--seeds", 1)
    assert done.returncode == 0, done.stderr
    assert "bits per byte" in done.stdout and "different text or tokenizers" in done.stdout


def test_grids_of_two_options_and_values_that_are_sections(write):
    variants = build_variants(
        [write()], {}, ["batch_tokens=256,512", "optim={type: lion},{type: adamw}"], with_twins=False, train_runs=False
    )
    assert [variant.label for variant in variants] == [
        'batch_tokens=256, optim={"type": "lion"}', 'batch_tokens=256, optim={"type": "adamw"}',
        'batch_tokens=512, optim={"type": "lion"}', 'batch_tokens=512, optim={"type": "adamw"}',
    ]  # fmt: skip
    assert len({variant.name for variant in variants}) == 4
    assert all(set(variant.name) <= set("abcdefghijklmnopqrstuvwxyz0123456789_.-") for variant in variants)


def test_a_band_reaches_from_the_lowest_to_the_highest_seed(run):
    folders = [run(name=f"s{seed}", seed=seed, steps=4, eval={"every": 2, "tokens": 256}) for seed in range(2)]
    values = [[row["val_loss"] for row in rows(folder) if "val_loss" in row] for folder in folders]
    facts = (4, 1024, 1.0, 1e9, "x")
    runs = tuple(RunResult(seed, folder, values[seed][-1], *facts) for seed, folder in enumerate(folders))
    charts = comparison_charts(Comparison("val_loss", "tokens", [VariantResult("a", runs, None)], {}, {}, []))
    assert [chart["title"] for chart in charts] == [f"Validation loss by {x}" for x in ("tokens", "seconds", "GFLOPs")]
    (curve,) = charts[0]["readings"]["curves"]
    means = [sum(pair) / 2 for pair in zip(*values, strict=True)]
    assert curve["steps"] == (512.0, 1024.0) and curve["values"] == pytest.approx(means, rel=1e-3)
