"""Sinks write plain rows; the tests read their output with the tools that a person would use."""

import io
import json
import math
import os
import pty
import re
import select
import struct
import subprocess
import sys
import textwrap
import time
import zlib
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import MOE
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import nn

from training.config import LoggingConfig, WandbConfig
from training.errors import UserError
from training.logging import jsonl, report
from training.logging import metrics as metrics_module
from training.logging.console import open_sink
from training.logging.format import clock, count, share
from training.logging.graph import trace_graph
from training.logging.heat_map import CELL, LEFT, TOP, draw_heat_map
from training.logging.jsonl import JSONLSink, read_rows
from training.logging.metrics import LOAD_IMAGE, METRICS, readme_table, scalars
from training.logging.phases import PHASES
from training.logging.sinks import SINKS, RunInfo, open_sinks
from training.optim.batch_schedule import BatchSchedule

SUMMARY = {
    "steps": 4, "tokens": 128, "train_loss": 2.5, "val_loss": 2.6, "val_perplexity": 13.5, "val_bits_per_byte": 1.25,
    "best_val_loss": 2.6, "best_step": 4, "best_of": None, "model_step": 4, "time_s": 61.0, "tokens_per_s": 9800.0,
    "parameters": 1000, "active_parameters": 500, "model_dir": "runs/r/model",
    "next": ["python -m training.generate --run runs/r"],
    "goodput": 0.95, "time": dict.fromkeys(PHASES, 0.0) | {"compute": 95.0, "start": 5.0},
    "advice": ["memory: enough", "speed: 31 % of the time was spent waiting for data"],
}  # fmt: skip


def row(step: int, **more) -> dict:
    return {
        "step": step, "loss": 4.0 - step / 10, "learning_rate": 6e-4, "grad_norm": 1.1, "tokens": 32 * step,
        "tokens_per_s": 9800.0, "mfu": None, "memory_gib": 1.2, "step_s": 0.5, "time_s": 0.5 * step,
        "expert_load": [[0.5, 0.3, 0.2], [0.2, 0.4, 0.4]], "expert_load_max": 1.5, "expert_entropy": 0.93,
        "dead_experts": 0, "router_confidence": 0.4, "router_z_loss": 0.7, "router_bias_range": 0.02,
        "dropped_share": 0.1, "router_layers": {
            "entropy": [0.93, 0.96], "confidence": [0.3, 0.5], "z_loss": [0.6, 0.8], "bias_range": [0.01, 0.02],
            "dropped": [0.0, 0.2],
        },
        "time_compute": 0.4, "time_data": 0.1,
    } | more  # fmt: skip


def eval_row(step: int, text: str = "f(x):\n\treturn x") -> dict:
    samples = [{"prompt": "def ", "text": text}]
    val_sets = {"loss": {"wiki": 2.5, "code": 2.7}, "perplexity": {"wiki": 12.2, "code": 14.9}}
    return row(step, val_loss=2.6, val_perplexity=13.5, val_bits_per_byte=1.25, val_sets=val_sets, samples=samples)


def run_in(folder: Path, start_step: int = 0, steps: int = 4) -> RunInfo:
    return RunInfo(
        dir=folder, name="tiny",
        config={
            "seed": 0, "model": {"n_layer": 2, "blocks": [{"repeat": 1}], "bias": None},
            "data": {"sources": [{"type": "files", "paths": ["a.txt"]}]},
        },
        config_yaml="seed: 0\nmodel:\n  n_layer: 2\n", header={"device": "cpu", "parameters": "1.0k"},
        start_step=start_step, steps=steps, batches=BatchSchedule([(0, 32)]),
        moe_layers=[1, 3], facts={}, hyperparameters={},
    )  # fmt: skip


def steps_in(folder: Path) -> list[int]:
    return [row["step"] for row in read_rows(folder / "metrics.jsonl")]


# --- metrics.jsonl ---------------------------------------------------------------------------------


def test_a_row_reads_back_as_it_was_written(tmp_path):
    rows = [row(1), eval_row(2, text="\u2028 é \ud800 </script>\x00")]
    JSONLSink(run_in(tmp_path)).write(rows)
    assert list(read_rows(tmp_path / "metrics.jsonl")) == rows


@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(st.lists(st.tuples(st.integers(1, 6), st.integers(0, 6), st.integers(0, 40)), max_size=5))
def test_every_step_has_exactly_one_row_after_any_restarts(tmp_path, processes):
    path = tmp_path / "metrics.jsonl"
    path.write_text("")
    checkpoint = 0
    for n_steps, steps_after_save, n_torn_bytes in processes:
        sink = JSONLSink(run_in(tmp_path, start_step=checkpoint))
        end = checkpoint + n_steps
        sink.write([row(step) for step in range(checkpoint + 1, end + 1)])
        with path.open("ab") as file:
            file.write(json.dumps(row(end + 1)).encode()[:n_torn_bytes])
        checkpoint = max(checkpoint, end - steps_after_save)
    JSONLSink(run_in(tmp_path, start_step=checkpoint))
    assert steps_in(tmp_path) == list(range(1, checkpoint + 1))
    assert path.read_bytes().endswith(b"\n") or not checkpoint


def test_nan_and_inf_become_null_which_every_json_reader_accepts(tmp_path):
    nan = {"expert_load": [[math.inf, 0.5]], "router_layers": {"entropy": [math.nan, 1.0]}}
    JSONLSink(run_in(tmp_path)).write([row(1, loss=math.nan, **nan)])
    text = (tmp_path / "metrics.jsonl").read_text()
    assert "NaN" not in text
    assert "Infinity" not in text
    assert json.loads(text)["expert_load"] == [[None, 0.5]]
    assert json.loads(text)["router_layers"] == {"entropy": [None, 1.0]}


GOOD = [json.dumps(row(step)).encode() + b"\n" for step in range(1, 7)]
BAD = {
    "zeros": bytes(4096) + b"\n", "a flipped bit": GOOD[1].replace(b'"loss"', b'"loss\xa2'), "no JSON": b"{\n",
    "a list": b"[2]\n", "a number": b"3\n", "no step": b'{"loss": 2.0}\n', "a text as step": b'{"step": "2"}\n',
    "NaN as step": b'{"step": NaN}\n', "step 0": b'{"step": 0}\n', "a text as time": b'{"step": 2, "time_s": "x"}\n',
    "a text as loss": b'{"step": 2, "loss": "x"}\n', "a number as load": b'{"step": 2, "expert_load": 3}\n',
    "a text as loss of a source": b'{"step": 2, "val_sets": {"loss": {"wiki": "x"}}}\n',
    "a list of sources": b'{"step": 2, "val_sets": {"loss": [2.0]}}\n', "no sources": b'{"step": 2, "val_sets": 3}\n',
    "a huge loss": b'{"step": 2, "loss": 1' + 400 * b"0" + b"}\n",
    "a number as sample": b'{"step": 2, "samples": [3]}\n',
    "deep": 10_000 * b"[" + b"\n", "the row before": GOOD[0], "a later step": GOOD[3],
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_a_line_that_is_no_row_is_kept_aside_before_the_checkpoint_and_dropped_past_it(tmp_path, capsys, name):
    path, aside, bad = tmp_path / "metrics.jsonl", tmp_path / "metrics.unreadable.jsonl", BAD[name]
    path.write_bytes(b"".join([*GOOD[:4], bad, *GOOD[4:], bad, b'{"step": 7']))
    JSONLSink(run_in(tmp_path, start_step=4))
    assert path.read_bytes() == b"".join(GOOD[:4]) and not aside.exists()
    path.write_bytes(b"".join([GOOD[0], bad, *GOOD[2:]]))
    assert capsys.readouterr().err == ""
    sink = JSONLSink(run_in(tmp_path, start_step=4))
    assert path.read_bytes() == b"".join([GOOD[0], *GOOD[2:4]]) and aside.read_bytes() == bad
    reason = "moved 1 line after step 1, unreadable or out of order, to metrics.unreadable.jsonl; training continues"
    assert capsys.readouterr().err == f"{path}: {reason}\n"
    sink.write([row(5)])
    assert steps_in(tmp_path) == [1, 3, 4, 5] == [span.last for span in sink.history.spans]


def of_curve(step: int) -> dict:
    """A row with a curve that no two windows share, and spikes."""
    return {"step": step, "loss": 1 + 9 / step + math.sin(step**2), "time_compute": 0.5} | (
        {"val_loss": 2.0, "samples": [{"prompt": "a", "text": str(step)}]} if step % 500 == 0 else {}
    )


def in_batches(sink: JSONLSink, first: int, last: int) -> None:
    for start in range(first, last + 1, 100):
        sink.write([of_curve(step) for step in range(start, min(start + 100, last + 1))])


@pytest.mark.parametrize(
    "harm",
    [
        Path.touch,
        Path.unlink,
        lambda curves: curves.write_bytes(curves.read_bytes()[:9000] + bytes(4096)),
        lambda curves: curves.write_text("[]"),
        lambda curves: curves.write_bytes(curves.read_bytes().replace(b'"n":4', b'"n":0', 1)),
        lambda curves: curves.write_bytes(curves.read_bytes().replace(b"0", b"1", 1)),
        lambda curves: (curves.unlink(), curves.mkdir()),
    ],
)
def test_a_resumed_run_has_the_history_of_one_that_was_not_interrupted(tmp_path, monkeypatch, capsys, harm):
    monkeypatch.setattr(jsonl, "TAIL_BYTES", 2**12)
    whole = JSONLSink(run_in(make(tmp_path / "whole"), steps=3000))
    in_batches(whole, 1, 3000)
    folder, saved = make(tmp_path / "parts"), 0
    for killed_at, saved_at in ((800, 700), (2100, 1300), (2700, 2690)):
        in_batches(JSONLSink(run_in(folder, start_step=saved, steps=3000)), saved + 1, killed_at)
        saved = saved_at
    harm(folder / "curves.jsonl")
    sink = JSONLSink(run_in(folder, start_step=saved, steps=3000))
    assert sink.lost_s == pytest.approx(10 * 0.5)
    in_batches(sink, saved + 1, 3000)
    ours, theirs = sink.history, whole.history
    assert (
        rounded(ours) == rounded(theirs)
        and ours.stride == theirs.stride == 4
        and list(ours.recent) == list(theirs.recent)
    )
    assert (ours.first_evaluation["step"], ours.last_evaluation["step"]) == (500, 3000)
    assert "metrics.jsonl: " not in capsys.readouterr().err
    assert (folder / "metrics.jsonl").read_bytes() == (tmp_path / "whole/metrics.jsonl").read_bytes()


def rounded(history) -> list:
    """Return the spans; sums may differ by rounding if only a part comes from curves.jsonl."""
    for span in history.spans:
        for series in span.series.values():
            series.total = float(f"{series.total:.10g}")
    return history.spans


def make(folder: Path) -> Path:
    folder.mkdir()
    return folder


def test_a_start_reads_the_end_of_a_long_log_or_without_curves_a_sample_of_it(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(jsonl, "TAIL_BYTES", 2**12)
    in_batches(JSONLSink(run_in(tmp_path, steps=4000)), 1, 4000)
    path = tmp_path / "metrics.jsonl"
    with path.open("r+b") as file:  # damage that a start which reads all rows would find
        file.write(b"#")
    history = JSONLSink(run_in(tmp_path, start_step=4000)).history
    assert capsys.readouterr().err == "" and history.n_rows == 4000
    (tmp_path / "curves.jsonl").unlink()
    monkeypatch.setattr(jsonl, "MAX_BYTES", 2**14)
    sample = JSONLSink(run_in(tmp_path, start_step=4000)).history
    (line,) = capsys.readouterr().err.splitlines()
    assert re.search(
        r"curves.jsonl is missing or does not fit; the report shows a sample of the rows up to step 3[89]\d\d$", line
    )
    assert sample.n_rows == pytest.approx(4000, abs=5) and sample.newest()["loss"] == history.newest()["loss"]
    assert sample.phase_seconds()["compute"] == pytest.approx(history.phase_seconds()["compute"], rel=0.01)
    assert path.read_bytes()[:1] == b"#"  # rows that are not read are not touched


def test_curves_of_other_rows_are_not_used(tmp_path, monkeypatch):
    monkeypatch.setattr(jsonl, "TAIL_BYTES", 2**12)
    in_batches(JSONLSink(run_in(tmp_path, steps=900)), 1, 900)
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(json.dumps(of_curve(step) | {"loss": 5.0}) + "\n" for step in range(1, 901)))
    series = JSONLSink(run_in(tmp_path, start_step=900)).history.series("loss")
    assert {point[1] for part in series for point in (part.low, part.high)} == {5.0}


def test_the_rows_past_a_step_are_found_in_a_long_log(tmp_path, monkeypatch):
    monkeypatch.setattr(jsonl, "TAIL_BYTES", 2**12)
    in_batches(JSONLSink(run_in(tmp_path, steps=2000)), 1, 2000)
    for step in (0, 1, 777, 1999, 2000):
        assert [row["step"] for row in read_rows(tmp_path / "metrics.jsonl", after=step)] == list(range(step + 1, 2001))


def test_a_missing_folder_is_a_user_error(tmp_path):
    with pytest.raises(UserError, match=r"cannot write .*gone.metrics\.jsonl: No such file"):
        JSONLSink(run_in(tmp_path / "gone"))


def test_a_full_disk_is_a_user_error_and_the_next_start_repairs_the_file(tmp_path):
    script = f"""
        import resource, signal
        from pathlib import Path
        from test_logging import *
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        sink = JSONLSink(run_in(Path({str(tmp_path)!r})))
        sink.write([row(1)])
        resource.setrlimit(resource.RLIMIT_FSIZE, (700, 700))
        try:
            sink.write([row(2), row(3)])
        except UserError as error:
            print(error)
    """
    assert re.fullmatch(r"cannot write .*metrics\.jsonl: File too large\n", python(script))
    assert (tmp_path / "metrics.jsonl").stat().st_size == 700
    JSONLSink(run_in(tmp_path, start_step=2)).write([row(3)])
    assert steps_in(tmp_path)[0] == 1
    assert steps_in(tmp_path)[-1] == 3


def test_an_atomic_write_to_a_full_disk_keeps_the_old_file_and_no_partial_one(tmp_path):
    script = f"""
        import resource, signal
        from test_logging import *
        from training.files import write_atomically
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        path = Path({str(tmp_path)!r}) / "page"
        write_atomically(path, "old")
        resource.setrlimit(resource.RLIMIT_FSIZE, (700, 700))
        try:
            write_atomically(path, 1000 * "new")
        except UserError as error:
            print(error)
    """
    assert re.fullmatch(r"cannot write .*page: File too large\n", python(script))
    assert [path.read_text() for path in tmp_path.iterdir()] == ["old"]


def python(script: str, **options) -> str:
    """Return the output of the script in a new interpreter that can import this file."""
    command = [sys.executable, "-c", textwrap.dedent(script)]
    return subprocess.run(
        command, cwd=Path(__file__).parent, check=True, text=True, stdout=subprocess.PIPE, **options
    ).stdout


# --- console ---------------------------------------------------------------------------------------


def test_plain_lines_have_one_width_and_show_all_fields(tmp_path, capsys):
    sink = open_sink(run_in(tmp_path), LoggingConfig(every=2))
    sink.write([row(1), row(2)])
    sink.write([row(3), eval_row(4)])
    sink.close(SUMMARY)
    lines = capsys.readouterr().out.splitlines()
    assert lines[:4] == ["tiny", "device      cpu", "parameters  1.0k", ""]
    steps = [line for line in lines if line.startswith("step")]
    assert [line.split()[1] for line in steps] == ["2/4", "4/4", "4/4", "4/4"]
    assert all("loss" in line and "MFU unknown" in line and len(line) > 80 for line in steps[:2])
    assert len({len(line) for line in steps[:2]}) == 1
    assert "val loss 2.6000  perplexity 13.50  bits/byte 1.2500" in steps[2]
    assert steps[3] == "step 4/4  val loss by source  wiki 2.5000  code 2.7000"
    assert lines[lines.index(steps[3]) + 1 :][:2] == ["    | def f(x):", "    |     return x"]
    assert lines[-1] == "  python -m training.generate --run runs/r"
    assert any("best 2.6000 at step 4" in line for line in lines)
    time_line = lines.index("time        95 % compute, 5 % start; goodput 95 %")
    assert lines[time_line + 1 : time_line + 3] == [
        "advice      memory: enough",
        "            speed: 31 % of the time was spent waiting for data",
    ]


def test_an_interrupted_run_prints_no_summary(tmp_path, capsys):
    sink = open_sink(run_in(tmp_path), LoggingConfig(every=1))
    capsys.readouterr()
    sink.close(None)
    assert capsys.readouterr().out == ""


def test_the_summary_of_a_run_without_validation_omits_it(tmp_path, capsys):
    unknown = {"val_loss": None, "val_perplexity": None, "val_bits_per_byte": None, "best_val_loss": None}
    open_sink(run_in(tmp_path), LoggingConfig(every=1)).close(SUMMARY | unknown | {"best_step": None, "next": []})
    output = capsys.readouterr().out
    assert "validation" not in output
    assert "next" not in output


def test_a_nan_loss_prints_as_nan(tmp_path, capsys):
    open_sink(run_in(tmp_path), LoggingConfig(every=1)).write([row(1, loss=math.nan, grad_norm=math.inf)])
    assert "loss nan" in capsys.readouterr().out


def test_the_eta_follows_the_recent_steps(tmp_path, capsys):
    sink = open_sink(run_in(tmp_path, steps=1000), LoggingConfig(every=1))
    sink.write([{"step": 1}])
    sink.write([row(step, step_s=60.0 if step <= 50 else 2.0) for step in range(1, 101)])
    etas = re.findall(r"ETA (\S+)", capsys.readouterr().out)
    assert (etas[0], etas[1], etas[-1]) == ("unknown", "16:39:00", "0:30:00")


def test_the_eta_counts_tokens_if_batches_change(tmp_path, capsys):
    info = run_in(tmp_path, steps=100)._replace(batches=BatchSchedule([(0, 10), (500, 40)]))  # 50 steps of each size
    sink = open_sink(info, LoggingConfig(every=1))
    sink.write([row(step, step_s=1.0) for step in range(1, 26)])
    sink.write([row(step, step_s=4.0) for step in range(51, 101)])
    etas = re.findall(r"ETA (\S+)", capsys.readouterr().out)
    assert (etas[24], etas[-2], etas[-1]) == ("0:03:45", "0:00:04", "0:00:00")  # 25 x 10 and 50 x 40 tokens are left


def test_training_continues_if_the_reader_of_its_output_is_gone(tmp_path):
    script = f"""
        import time
        from test_logging import *
        sink = open_sink(run_in(Path({str(tmp_path)!r}), steps=3), LoggingConfig(every=1))
        for step in (1, 2, 3):
            time.sleep(0.1)
            sink.write([row(step)])
        print("reached", file=sys.stderr)
    """
    command = [sys.executable, "-c", textwrap.dedent(script)]
    with subprocess.Popen(
        command, cwd=Path(__file__).parent, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        process.stdout.readline()
        process.stdout.close()
        assert process.stderr.read() == "reached\n"
    assert process.returncode == 0


def test_a_sample_that_standard_output_cannot_encode_does_not_stop_training():
    script = """
        from test_logging import *
        open_sink(run_in(Path()), LoggingConfig(every=1)).write([eval_row(1, text="naïve ✓")])
    """
    assert r"na\xefve \u2713" in python(script, env=os.environ | {"PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0"})


@pytest.mark.parametrize("columns", [60, 120])
@pytest.mark.parametrize("color", [True, False])
def test_a_terminal_shows_a_live_bar_that_fits_its_width(processes, tmp_path, columns, color):
    script = f"""
        from test_logging import *
        sink = open_sink(run_in(Path({str(tmp_path)!r})), LoggingConfig(every=1))
        sink.write([row(1), row(2)])
        sink.write([row(3), eval_row(4)])
        sink.close(SUMMARY)
    """
    (tmp_path / "script.py").write_text(textwrap.dedent(script))
    shown = on_a_terminal(processes, tmp_path / "script.py", columns, color)
    plain = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", shown)
    expected = ["step 2/4", "ETA 0:00:01", "━", "loss 3.6000", "9.80k tokens/s", "MFU unknown", "1.2 GiB"]
    expected += ["step 4  val loss 2.6000", "    def f(x):\n        return x", "done", "training.generate"]
    assert all(text in plain for text in expected)
    frames = [line for line in re.split(r"[\r\n]+", plain) if "ETA" in line or "tokens/s" in line]
    assert max(map(len, frames)) <= columns
    assert bool(re.search(r"\x1b\[[0-9;]*3[0-9]", shown)) == color
    assert shown.rindex("\x1b[?25h") > shown.rindex("\x1b[?25l")  # the cursor is visible again


def on_a_terminal(processes, script: Path, columns: int, color: bool) -> str:
    """Return all that the script writes to a terminal of this width."""
    master, slave = pty.openpty()
    variables = {"TERM": "xterm-256color", "COLUMNS": str(columns), "LINES": "40", "FORCE_COLOR": None}
    variables["NO_COLOR"] = None if color else "1"
    process = processes.start(str(script), env=variables, stdout=os.ttyname(slave))
    shown = b""
    while process.poll() is None or select.select([master], [], [], 0)[0]:
        if select.select([master], [], [], 0.05)[0]:
            shown += os.read(master, 65536)
    os.close(slave)  # open until here, so that the terminal keeps what was written
    os.close(master)
    assert process.wait().returncode == 0, process.output("err")
    return re.sub(r" *\r\n", "\n", shown.decode())


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (count(512), "512"), (count(9800), "9.80k"), (count(124_439_808), "124.4M"), (count(1.2e9), "1.20B"),
        (clock(59.6), "0:01:00"), (clock(3723), "1:02:03"), (share(0.314), "31.4 %"), (share(None), "unknown"),
    ],
)  # fmt: skip
def test_numbers_are_short(text, expected):
    assert text == expected


@pytest.fixture(autouse=True, scope="module")
def end_wandb():
    """End W&B's own process, which would outlive these tests."""
    yield
    if "wandb" in sys.modules:
        sys.modules["wandb"].teardown()


# --- TensorBoard -----------------------------------------------------------------------------------


def events(folder: Path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    return EventAccumulator(
        str(folder / "tensorboard"), size_guidance={"tensors": 0, "scalars": 0, "histograms": 0, "images": 0}
    ).Reload()


def tensorboard(run: RunInfo):
    from training.logging.tensorboard import TensorBoardSink

    return TensorBoardSink(run, histogram_every=2)


def test_tensorboard_reads_back_every_number_text_image_and_histogram(tmp_path):
    sink = tensorboard(run_in(tmp_path))
    sink.write([row(1), row(2), row(3, mfu=0.3), eval_row(4, "f(x):\n    x \ud800")])
    sink.write_graph(Toy(), torch.zeros(1, 4, dtype=torch.long))
    sink.close(SUMMARY)
    board = events(tmp_path)
    tags = board.Tags()
    assert set(tags["scalars"]) == set(scalars(eval_row(4, "") | {"mfu": 0.3}, [1, 3]))
    assert [(event.step, round(event.value, 4)) for event in board.Scalars("train/loss")] == [
        (1, 3.9), (2, 3.8), (3, 3.7), (4, 3.6)
    ]  # fmt: skip
    assert [event.step for event in board.Scalars("speed/mfu")] == [3]
    by_source = {"loss": [2.5, 2.7], "perplexity": [12.2, 14.9]}
    for figure, values in by_source.items():
        of_sources = [board.Scalars(f"val/{name}/{figure}")[0] for name in ("wiki", "code")]
        assert [(event.step, round(event.value, 4)) for event in of_sources] == [(4, value) for value in values]
    assert {tag: round(board.Scalars(tag)[0].value, 4) for tag in tags["scalars"] if tag.startswith("time")} == {
        "time/compute": 0.4, "time/data": 0.1,
    }  # fmt: skip
    assert {tag: board.Scalars(tag)[0].value for tag in tags["scalars"] if tag.startswith("router")} == pytest.approx(
        {
            "router/expert_load_max": 1.5, "router/expert_entropy": 0.93, "router/dead_experts": 0,
            "router/confidence": 0.4, "router/z_loss": 0.7, "router/bias_range": 0.02, "router/dropped_share": 0.1,
            "router_layers/max_over_mean/layer_02": 1.5, "router_layers/max_over_mean/layer_04": 1.2,
            "router_layers/entropy/layer_02": 0.93, "router_layers/entropy/layer_04": 0.96,
            "router_layers/confidence/layer_02": 0.3, "router_layers/confidence/layer_04": 0.5,
            "router_layers/z_loss/layer_02": 0.6, "router_layers/z_loss/layer_04": 0.8,
            "router_layers/bias_range/layer_02": 0.01, "router_layers/bias_range/layer_04": 0.02,
            "router_layers/dropped/layer_02": 0.0, "router_layers/dropped/layer_04": 0.2,
        }
    )  # fmt: skip
    assert [event.step for event in board.Histograms("router_layers/load/layer_04")] == [2, 4]
    images = board.Images("router/load_layers_x_experts")
    assert [image.step for image in images] == [2, 4]
    assert_is_the_heat_map(io.BytesIO(images[0].encoded_image_string))
    assert "n_layer: 2" in text_of(board, "config")
    assert "| device | cpu |" in text_of(board, "run")
    assert "    def f(x):" in text_of(board, "samples")
    assert tags["graph"]


def assert_is_the_heat_map(png) -> None:
    """Check the image of `row`: layers downwards, experts to the right, cells blue below their share and red above."""
    image = np.asarray(Image.open(png).convert("RGB")).astype(int)
    assert image.shape == (TOP + 2 * CELL, LEFT + 3 * CELL, 3)
    redder = [
        [int(red - blue) for red, _, blue in (image[TOP + layer * CELL + 3, LEFT + e * CELL + 3] for e in range(3))]
        for layer in range(2)
    ]
    assert np.sign(redder).tolist() == [[1, -1, -1], [-1, 1, 1]]
    assert redder[0][0] > redder[1][1] and redder[0][2] < redder[0][1]


def text_of(board, tag: str) -> str:
    return board.Tensors(f"{tag}/text_summary")[-1].tensor_proto.string_val[0].decode()


def test_a_resumed_run_shows_each_step_once_in_tensorboard(tmp_path):
    first = tensorboard(run_in(tmp_path))
    first.write([row(step) for step in (1, 2, 3)])
    first.close(None)
    second = tensorboard(run_in(tmp_path, start_step=2))
    second.write([row(step, loss=9.0) for step in (3, 4)])
    second.close(SUMMARY)
    values = {event.step: event.value for event in events(tmp_path).Scalars("train/loss")}
    assert len(events(tmp_path).Scalars("train/loss")) == 4
    assert [values[step] == 9.0 for step in (1, 2, 3, 4)] == [False, False, True, True]


def test_the_cards_of_tensorboards_custom_scalars_come_by_importance(tmp_path):
    from tensorboard.plugins.custom_scalar.layout_pb2 import Layout

    tensorboard(run_in(tmp_path)).close(SUMMARY)
    layout = Layout.FromString(events(tmp_path).Tensors("custom_scalars__config__")[0].tensor_proto.string_val[0])
    titles = [category.title for category in layout.category]
    assert (titles[0], titles[-1]) == ("Training", "Experts by layer")
    assert [category.title for category in layout.category if category.closed] == [
        "Time by phase", "By layer", "Experts by layer"
    ]  # fmt: skip
    patterns = [tag for category in layout.category for chart in category.chart for tag in chart.multiline.tag]
    assert patterns[0] == "^train/loss$"
    layers = {"layers": {"grad_norm": [1.0, 2.0]}, "learning_rates": {"matrix": 1e-3}}
    for tag in scalars(eval_row(4, "") | layers, [1, 3]):
        assert sum(re.search(pattern, tag) is not None for pattern in patterns) == 1, tag


def test_tensorboard_has_the_hyperparameters_of_a_run(tmp_path):
    from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

    run = run_in(tmp_path)._replace(hyperparameters={"model.n_layer": 2, "model.blocks.0.repeat": 1})
    tensorboard(run).close(SUMMARY)
    board = events(tmp_path)
    start = HParamsPluginData.FromString(board.SummaryMetadata("_hparams_/session_start_info").plugin_data.content)
    values = start.session_start_info.hparams
    assert values["model.n_layer"].number_value == 2
    assert values["model.blocks.0.repeat"].number_value == 1
    assert board.SummaryMetadata("_hparams_/session_end_info")


def test_the_heat_map_is_blue_without_tokens_white_at_an_even_share_and_red_at_twice_that():
    image = draw_heat_map({1: [0.0, 0.25, 0.25, 0.5], 3: [1.0]})
    cells = image[TOP:, LEFT:]
    assert cells.shape == (48, 96, 3)
    blue, white, red = cells[0, 0].tolist(), cells[0, 30].tolist(), cells[0, 90].tolist()
    assert blue[2] > 2 * blue[0]
    assert white == [247, 247, 247]
    assert red[0] > 2 * red[2]
    assert cells[30, 50].tolist() == [127, 127, 127]


def test_the_heat_map_names_each_layer_beside_its_row_and_each_expert_above_its_column():
    even = [0.5, 0.5]
    image, others = draw_heat_map({1: even, 3: even}), draw_heat_map({1: even, 5: even})
    single = draw_heat_map({1: [1.0]})
    written = (image[:, :LEFT] != 255).any(-1)
    assert written[TOP : TOP + CELL].any() and written[TOP + CELL :].any() and not written[:TOP].any()
    assert np.array_equal(image[: TOP + CELL], others[: TOP + CELL])  # layer 2 in both
    assert not np.array_equal(image[TOP + CELL :, :LEFT], others[TOP + CELL :, :LEFT])  # layer 4 or layer 6
    assert np.array_equal(image[:TOP, : LEFT + CELL], single[:TOP])
    assert (image[:TOP, LEFT + CELL :] != 255).any()


# --- graph -----------------------------------------------------------------------------------------


class Double(torch.autograd.Function):
    """An autograd function that does the work itself, like a kernel."""

    @staticmethod
    def forward(_ctx, x):
        return x * 2


class Kernel(nn.Module):
    def forward(self, x):
        return Double.apply(x)


class Experts(nn.Module):
    """Data-dependent: every expert indexes its own tokens and adds to the output in place."""

    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.randn(2, 8, 8))

    def forward(self, x):
        y = torch.zeros_like(x)
        for expert in (0, 1):
            chosen = torch.arange(len(x)) % 2 == expert
            y[chosen] += x[chosen] @ self.w[expert]
        return y


class Toy(nn.Module):
    def __init__(self):
        super().__init__()
        self.wte = nn.Embedding(16, 8)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(8, 8), nn.Dropout(0.5), Kernel()) for _ in range(2))
        self.experts = Experts()
        self.head = nn.Linear(8, 16, bias=False)

    def forward(self, tokens):
        x = self.wte(tokens)
        for block in self.blocks:
            x = x + block(x)
        y = self.experts(x.view(-1, 8)).view_as(x)
        return {"logits": self.head(F.gelu(y))}


def test_the_graph_has_the_modules_operations_shapes_and_parameters():
    nodes = {node.name: node for node in trace_graph(Toy(), torch.zeros(1, 4, dtype=torch.long)).node}
    edges = {name: list(node.input) for name, node in nodes.items()}
    assert edges["wte"] == ["tokens"]
    assert edges["blocks.0/0"] == ["wte"]
    assert edges["blocks.0/2"] == ["blocks.0/0"]
    assert nodes["blocks.0/2"].op == "mul"
    assert edges["add"] == ["wte", "blocks.0/2"]
    assert edges["blocks.1/0"] == ["add"]
    assert edges["gelu"][0].startswith("experts/")
    assert edges["head"] == ["gelu"]
    assert nodes["head"].attr["parameters"].i == 8 * 16
    assert nodes["blocks.1/0"].attr["parameters"].i == 8 * 8 + 8
    products = [node for name, node in nodes.items() if name.startswith("experts/matmul")]
    assert [node.attr["parameters"].i for node in products] == [64, 64]
    assert [dim.size for dim in nodes["head"].attr["_output_shapes"].list.shape[0].dim] == [1, 4, 16]
    assert all(source in nodes for sources in edges.values() for source in sources)
    assert any(source.startswith("experts/setitem") for source in edges["gelu"])


def test_drawing_the_graph_changes_neither_the_model_nor_the_random_state():
    model = Toy()
    model.blocks[0].eval()
    modes = [module.training for module in model.modules()]
    state, weights = torch.get_rng_state(), [parameter.clone() for parameter in model.parameters()]
    trace_graph(model, torch.zeros(1, 4, dtype=torch.long))
    assert [module.training for module in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), state)
    assert all(map(torch.equal, model.parameters(), weights))
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


# --- Weights & Biases ------------------------------------------------------------------------------


def offline(folder: Path) -> list[Path]:
    return sorted((folder / "wandb").glob("offline-run-*/run-*.wandb"))


def history_rows(path: Path) -> list[dict]:
    """Return the history rows of an offline run from its file, once W&B's process has finished it."""
    until = time.monotonic() + 60
    while not (records := records_in(path.read_bytes())) or not records[-1].HasField("exit"):
        assert time.monotonic() < until, f"{path} is not finished"
        time.sleep(0.05)
    histories = [record.history.item for record in records if record.HasField("history")]
    return [{item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in row} for row in histories]


def records_in(data: bytes) -> list:
    """Return the complete records of LevelDB's log format, each a protobuf."""
    from wandb.proto.wandb_internal_pb2 import Record

    records, at, whole = [], 7, b""
    while at + 7 <= len(data):
        left = 32768 - at % 32768
        if left < 7:
            at += left
            continue
        _, length, kind = struct.unpack_from("<IHB", data, at)
        at += 7 + length
        if at > len(data):
            break
        whole += data[at - length : at]
        if kind in (1, 4):  # a full record, or the last part of one
            records.append(Record.FromString(whole))
            whole = b""
    return records


def test_wandb_keeps_one_run_over_restarts_and_logs_no_step_twice(tmp_path, capfd, monkeypatch):
    """The environment chooses mode, project, name and id; the options tags, group and notes."""
    wandb = pytest.importorskip("wandb")
    from training.logging.wandb import WandbSink

    for name, value in {"MODE": "offline", "PROJECT": "ours", "NAME": "first", "RUN_ID": "id-of-theirs"}.items():
        monkeypatch.setenv(f"WANDB_{name}", value)
    wandb.teardown()  # it reads the environment once a process
    config = WandbConfig(tags=("a b", "c"), group="sweep", notes="why: <b>")
    first = WandbSink(run_in(tmp_path), config, histogram_every=2)
    first.write([row(1), row(2), eval_row(3)])
    first.close(None)
    second = WandbSink(run_in(tmp_path, start_step=2), config, histogram_every=2)
    second.write([row(3), row(4)])
    second.close(SUMMARY)
    line = f"Weights & Biases: offline by WANDB_MODE, project ours, {tmp_path}/wandb\n"
    assert tuple(capfd.readouterr()) == ("", line * 2)
    assert (first.run.id, first.run.name, first.run.project) == ("id-of-theirs", "first", "ours")
    assert second.run.id == first.run.id
    described = [(run.tags, run.group, run.notes) for run in (first.run, second.run)]
    assert described == [(("a b", "c"), "sweep", "why: <b>")] * 2
    histories = [history_rows(path) for path in offline(tmp_path)]
    assert [record["_step"] for history in histories for record in history] == [1, 2, 3, 4]
    assert histories[0][2]["val/loss"] == 2.6 and histories[0][2]["val/wiki/loss"] == 2.5
    assert histories[0][2]["samples/nrows"] == 1
    assert histories[1][0]["train/loss"] == 3.6
    assert histories[0][0]["router/dropped_share"] == 0.1
    assert histories[0][0]["router_layers/confidence/layer_04"] == 0.5
    drawn = [f"{LOAD_IMAGE}/path" in record for history in histories for record in history]
    assert drawn == [False, True, False, True]
    kept = list((tmp_path / "wandb").glob(f"offline-run-*/files/{histories[0][1][f'{LOAD_IMAGE}/path']}"))
    assert len(kept) == 1
    assert_is_the_heat_map(kept[0])
    wandb.teardown()


@pytest.mark.parametrize(
    ("option", "variables", "mode"),
    [
        (None, {}, (None, "")),
        (None, {"WANDB_MODE": "offline"}, ("offline", "WANDB_MODE")),
        (None, {"WANDB_MODE": "online", "WANDB_DISABLED": "true"}, ("disabled", "WANDB_DISABLED")),
        (None, {"WANDB_DISABLED": "false"}, (None, "")),
        ("online", {"WANDB_MODE": "disabled", "WANDB_DISABLED": "1"}, ("online", "logging.wandb.mode")),
        ("disabled", {"WANDB_MODE": "online"}, ("disabled", "logging.wandb.mode")),
    ],
)
def test_the_option_chooses_wandbs_mode_or_else_the_environment(monkeypatch, tmp_path, capfd, option, variables, mode):
    from training.logging import wandb

    for name in ("WANDB_MODE", "WANDB_DISABLED"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    config = WandbConfig(mode=option)
    assert wandb.find_mode(config) == mode
    if mode[0] == "disabled":
        monkeypatch.setitem(sys.modules, "wandb", None)  # not needed for nothing
        sink = wandb.open_sink(run_in(tmp_path), LoggingConfig(wandb=config))
        sink.write([row(1)])
        sink.close(SUMMARY)
        assert not list(tmp_path.iterdir())
        assert capfd.readouterr().err == f"Weights & Biases: disabled by {mode[1]}; nothing is logged to it\n"


def test_an_unknown_wandb_mode_of_the_environment_is_one_line(monkeypatch):
    from training.logging.wandb import find_mode

    monkeypatch.setenv("WANDB_MODE", "banana")
    with pytest.raises(UserError, match=r"^WANDB_MODE: 'banana' is not one of online, offline, disabled,"):
        find_mode(WandbConfig())


def test_after_kill_9_wandb_has_each_row_once(processes, tmp_path, capfd):
    """W&B's process holds rows in memory. The checkpoint is at step 100, W&B's file ends before or after."""
    pytest.importorskip("wandb")
    script = f"""
        import signal
        from test_logging import *
        config = LoggingConfig(tensorboard=False, wandb=WandbConfig(mode="offline"))
        sinks = open_sinks(config, run_in(Path({str(tmp_path)!r}), steps=200))
        for step in range(1, 121):
            for sink in sinks:
                sink.write([row(step, loss=1.0 * step)])
        os.kill(os.getpid(), signal.SIGKILL)
    """
    (tmp_path / "script.py").write_text(textwrap.dedent(script))
    assert (
        processes.start(str(tmp_path / "script.py"), env={"PYTHONPATH": str(Path(__file__).parent)}).wait().returncode
    )
    (killed,) = offline(tmp_path)
    written = steps_of(records_in(killed.read_bytes()))
    assert 0 < len(written) < 120
    sinks = open_sinks(
        LoggingConfig(tensorboard=False, wandb=WandbConfig(mode="offline")), run_in(tmp_path, start_step=118, steps=200)
    )
    for sink in sinks:
        sink.write([row(step, loss=1.0 * step) for step in range(119, 131)])
        sink.close(None)
    (again,) = set(offline(tmp_path)) - {killed}
    logged = history_rows(again)
    assert written + [record["_step"] for record in logged] == list(range(1, 131))
    assert all(record["train/loss"] == record["_step"] for record in logged)
    assert f"logged steps {len(written) + 1} to 118 from metrics.jsonl" in capfd.readouterr().err
    assert json.loads((tmp_path / "wandb.json").read_text())["has_steps_to"] == 130


def steps_of(records: list) -> list[int]:
    return [record.history.step.num for record in records if record.HasField("history")]


@pytest.mark.parametrize("n_rows", [1, 300, 2500])
def test_the_last_step_is_read_from_the_end_of_a_file_of_wandb(tmp_path, monkeypatch, n_rows):
    """Records that span blocks, a torn end, and a tail without a row."""
    pytest.importorskip("wandb")
    from wandb.proto.wandb_internal_pb2 import Record

    from training.logging import wandb as ours

    monkeypatch.setattr(ours, "TAIL_BYTES", 2**15)
    data = bytearray(b":W&B123")
    for step in range(1, n_rows + 1):
        record = Record()
        record.history.step.num = step
        add_record(data, record.SerializeToString() + record.SerializeToString() * (step % 90))
    for filler in range(4):
        add_record(data, Record(num=filler, uuid="x" * 30_000).SerializeToString())
    add_record(data, record.SerializeToString() * 99)
    path = tmp_path / "run-x.wandb"
    path.write_bytes(data[:-1])
    assert ours.last_step(path, limit=n_rows) == n_rows == steps_of(records_in(bytes(data[:-1])))[-1]
    assert ours.last_step(path, limit=n_rows - 1) == n_rows - 1, "a step that the run cannot have is not read"
    path.write_bytes(data[:7])
    assert ours.last_step(path, limit=n_rows) == 0


def test_a_damaged_file_of_wandb_is_read_up_to_the_damage_and_an_unreadable_one_not_at_all(tmp_path, capsys):
    pytest.importorskip("wandb")
    from wandb.proto.wandb_internal_pb2 import Record

    from training.logging import wandb as ours

    data, ends = bytearray(b":W&B123"), []
    for step in (1, 2, 3):
        record = Record()
        record.history.step.num = step
        add_record(data, record.SerializeToString())
        ends.append(len(data))
    data[ends[1] - 1] ^= 1  # step 2 becomes 3
    path = tmp_path / "run-x.wandb"
    path.write_bytes(data[: ends[1]])
    assert ours.last_step(path, limit=9) == 1
    path.unlink()
    path.mkdir()
    assert ours.last_step(path, limit=9) == 0
    assert capsys.readouterr().err == f"{path}: Is a directory; its steps are logged to Weights & Biases again\n"


def add_record(data: bytearray, record: bytes) -> None:
    """Append a record in LevelDB's log format, with W&B's checksum."""
    is_first = True
    while record or is_first:
        left = 32768 - len(data) % 32768
        if left < 7:
            data += bytes(left)
            continue
        part, record = record[: left - 7], record[left - 7 :]
        kind = {(True, False): 1, (True, True): 2, (False, True): 3, (False, False): 4}[is_first, bool(record)]
        data += struct.pack("<IHB", zlib.crc32(bytes([kind]) + part), len(part), kind) + part
        is_first = False


def wandb_error(tmp_path: Path, **environment: str) -> subprocess.CompletedProcess:
    script = f"""
        from test_logging import *
        try:
            sinks = open_sinks(LoggingConfig(tensorboard=False, wandb=WandbConfig()), run_in(Path({str(tmp_path)!r})))
        except UserError as error:
            sys.exit(f"error: {{error}}")
        for sink in sinks:
            sink.write([row(1)])
            sink.close(SUMMARY)
    """
    kept = {key: value for key, value in os.environ.items() if not key.startswith("WANDB")}
    command = [sys.executable, "-c", textwrap.dedent(script)]
    return subprocess.run(
        command, cwd=Path(__file__).parent, env=kept | {"HOME": str(tmp_path)} | environment,
        text=True, capture_output=True, stdin=subprocess.DEVNULL, check=False,
    )  # fmt: skip


@pytest.mark.parametrize("key", [{}, {"WANDB_API_KEY": "short"}])
def test_an_invalid_wandb_key_is_one_line_with_the_remedies(tmp_path, key):
    pytest.importorskip("wandb")
    ended = wandb_error(tmp_path, **key)
    assert ended.stderr.startswith("error: Weights & Biases: ")
    assert "`wandb login`, set WANDB_API_KEY, or pass --logging.wandb.mode offline" in ended.stderr
    assert ended.stderr.count("\n") == 1


def test_without_a_network_wandb_logs_offline(tmp_path):
    pytest.importorskip("wandb")
    ended = wandb_error(tmp_path, WANDB_API_KEY="a" * 40, WANDB_BASE_URL="http://127.0.0.1:9", WANDB_INIT_TIMEOUT="2")
    assert ended.returncode == 0
    assert ended.stderr.startswith("Weights & Biases does not answer")
    assert ended.stderr.count("\n") == 1
    assert [record["_step"] for record in history_rows(offline(tmp_path)[-1])] == [1]


def test_a_missing_wandb_package_is_a_user_error(tmp_path, monkeypatch):
    from training.logging.wandb import WandbSink

    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(UserError, match="pip install wandb"):
        WandbSink(run_in(tmp_path), WandbConfig(), histogram_every=2)


# --- together --------------------------------------------------------------------------------------


def test_open_sinks_opens_the_configured_sinks_and_tensorboard_has_the_graph(tmp_path, capsys):
    sinks = open_sinks(LoggingConfig(every=1), run_in(tmp_path))
    for sink in sinks:
        sink.write_graph(Toy(), torch.zeros(1, 4, dtype=torch.long))
        sink.write([row(1)])
        sink.close(None)
    assert steps_in(tmp_path) == [1]
    assert events(tmp_path).Tags()["graph"]
    assert "step 1/4" in capsys.readouterr().out
    assert json.loads((tmp_path / "run.json").read_text())["header"]["device"] == "cpu"
    assert [type(sink).__name__ for sink in open_sinks(LoggingConfig(tensorboard=False), run_in(tmp_path))] == [
        "JSONLSink", "Console"
    ]  # fmt: skip


def code_of(page: str, start: str) -> list[str]:
    """Return the Python blocks of a playbook that begin with `start`."""
    text = (Path(__file__).parent.parent / "docs/playbooks" / page).read_text()
    blocks = [
        textwrap.dedent(block) for block in re.findall(r"^ *```python\n(.*?)^ *```$", text, re.MULTILINE | re.DOTALL)
    ]
    return [block for block in blocks if block.startswith(start)]


def steps_by_sink(folder: Path, output: str) -> dict[str, list[int]]:
    """Return the steps that each sink shows, for the sinks of `test_the_contract_of_every_sink`."""
    return {
        "jsonl": steps_in(folder),
        "tensorboard": [event.step for event in events(folder).Scalars("train/loss")],
        "wandb": [record["_step"] for path in offline(folder) for record in history_rows(path)],
        "console": [int(step) for step in re.findall(r"^step (\d+)/4 +loss", output, re.MULTILINE)],
        "csv": [int(line.split(",")[0]) for line in (folder / "loss.csv").read_text().splitlines()],
    }


def test_the_contract_of_every_sink(tmp_path, capsys, monkeypatch):
    """Each step once, also after a restart from step 2; closing twice is harmless; rows may lack any key."""
    pytest.importorskip("wandb")
    for name in (*SINKS, "csv"):
        monkeypatch.setitem(SINKS, name, lambda _: True)
    module = ModuleType("training.logging.csv")
    exec("\n".join(code_of("add_a_logging_sink.md", "# training/logging/csv.py")), vars(module))
    monkeypatch.setitem(sys.modules, module.__name__, module)
    config, outputs = LoggingConfig(every=1, wandb=WandbConfig(mode="offline")), []
    for start_step, summary in ((0, None), (2, SUMMARY)):
        sinks = open_sinks(config, run_in(tmp_path, start_step=start_step))
        for sink in sinks:
            sink.write_graph(Toy(), torch.zeros(1, 4, dtype=torch.long))
            sink.write([row(start_step + 1, loss=9.0 - start_step), eval_row(start_step + 2)])
        if summary is None:
            for sink in sinks:
                sink.write([row(3)])  # not in the checkpoint: dropped by the restart
        for sink in sinks:
            sink.close(summary)
            sink.close(summary)
        outputs.append(capsys.readouterr().out)
    shown = steps_by_sink(tmp_path, outputs[0].replace("step 3/4", "") + outputs[1])
    assert shown.keys() == SINKS.keys()
    assert all(steps == [1, 2, 3, 4] for steps in shown.values()), shown
    assert outputs[1].count("done") == 1


def test_every_sink_accepts_rows_without_most_keys(tmp_path):
    pytest.importorskip("wandb")
    sinks = open_sinks(LoggingConfig(every=1, wandb=WandbConfig(mode="offline")), run_in(tmp_path))
    for sink in sinks:
        sink.write([{"step": 1, "loss": 2.0}, {"step": 2}])
        sink.close(None)


# --- the table of metrics --------------------------------------------------------------------------


def keys_of(row: dict) -> set[str]:
    """Return the row's keys, with those of nested values as METRICS writes them."""
    nested = {"router_layers", "val_sets", "tasks", "layers"}
    return {f"{name}.{key}" for name in nested for key in row.get(name, ())} | row.keys() - nested


def test_every_key_of_a_real_run_is_in_the_table_and_every_metric_is_in_a_row(run, tmp_path):
    (tmp_path / "items.jsonl").write_text('{"goal": "g", "sol1": "a", "sol2": "b", "label": 0}\n')
    evaluation = {"every": 4, "tokens": 512, "prompts": ["def "], "sample_tokens": 4}
    evaluation["tasks"] = [{"type": "piqa", "paths": [str(tmp_path / "items.jsonl")]}]
    model = {"n_layer": 2, "n_head": 2, "n_embd": 16, "n_positions": 32, "blocks": [{}, {"ffn": MOE}]}
    folder = run(model=model, eval=evaluation, optim={"average": {"decay": 0.9}})
    keys = set().union(*map(keys_of, read_rows(folder / "metrics.jsonl")))
    metrics = {metric.key for metric in METRICS}
    assert keys - metrics == set(), "add these keys to METRICS in training/logging/metrics.py"
    assert metrics - keys == {"time_redone"}  # only after a kill
    summary = json.loads((folder / "summary.json").read_text())
    assert {metric.key.partition(".")[0] for metric in METRICS if metric.in_summary} <= summary.keys()


def test_keys_and_tags_are_unique_and_every_metric_is_documented():
    for attribute in ("key", "tag"):
        values = [getattr(metric, attribute) for metric in METRICS if getattr(metric, attribute) is not None]
        assert len(values) == len(set(values))
    assert all(len(metric.doc) > 10 and "|" not in metric.doc for metric in METRICS)


def test_the_readme_has_the_table_of_metrics():
    readme = (Path(__file__).parent.parent / "training/README.md").read_text()
    assert readme_table() in readme, "copy the output of python -m training.logging.metrics to training/README.md"


def test_a_metric_is_shown_everywhere_by_its_entry_alone(tmp_path, capsys, request):
    """New entries reach the console, TensorBoard and the report."""
    number, metric, figure, chart = (getattr(metrics_module, name) for name in ("number", "Metric", "Figure", "Chart"))
    metrics = [
        metric(
            "weight_norm",
            "global norm of all weights",
            "train/weight_norm",
            console=lambda value: f"norm {number(value, '.1f')}",
            figure=figure("weight norm", ".1f"),
            chart=chart("Weight norm", zero=True),
        ),
        metric(
            "val_bits_per_token",
            "bits per validation token",
            "val/bits_per_token",
            "validation",
            console=lambda value: f"bits/token {number(value, '.3f')}",
            figure=figure("bits per token", ".3f"),
            chart=chart("Bits per token", label="validation", style="val"),
        ),
    ]
    request.addfinalizer(lambda: METRICS.__delitem__(slice(-len(metrics), None)))
    METRICS.extend(metrics)
    rows = [row(1, weight_norm=12.34), row(2, weight_norm=12.5, val_bits_per_token=0.25)]
    sinks = open_sinks(LoggingConfig(every=1), run_in(tmp_path, steps=2))
    for sink in sinks:
        sink.write(rows)
        sink.close(None)
    output, board = capsys.readouterr().out, events(tmp_path)
    assert "norm 12.3" in output and "bits/token 0.250" in output
    assert [len(board.Scalars(tag)) for tag in ("train/weight_norm", "val/bits_per_token")] == [2, 1]
    page = report.write_report(run_in(tmp_path, steps=2), sinks[0].history).read_text()
    assert all(f"<b>{text}</b>" in page for text in ("12.5", "0.250", "Weight norm", "Bits per token"))


def test_logging_imports_torch_and_wandb_only_for_a_sink_that_needs_them():
    script = """
        import sys
        import training.logging, training.logging.console, training.logging.report, training.logging.wandb
        print(sorted({"torch", "wandb", "tensorboard", "rich", "matplotlib"} & sys.modules.keys()))
    """
    assert python(script) == "[]\n"
