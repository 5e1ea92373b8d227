"""The report is one page that opens from disk; the tests parse it and look up its content."""

import ast
import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from conftest import no_file_beyond
from hypothesis import given
from hypothesis import strategies as st

from training.errors import UserError
from training.logging import python_code
from training.logging.charts import COLUMNS, READINGS, Curve, chart, smooth, thin, tick_text, ticks_between, value_range
from training.logging.format import MAX_TOKEN_CHARS, duration_text, token_text
from training.logging.history import MAX_SPANS, History
from training.logging.metrics import Chart
from training.logging.phases import PHASES
from training.logging.python_code import is_python
from training.logging.report import load_table, write_report
from training.logging.sinks import RunInfo
from training.optim.batch_schedule import BatchSchedule
from training.terminal import TEXT, printable

VOID = {"meta", "input", "line", "path", "progress", "br", "img"}


class Page(HTMLParser):
    """The texts by tag and all attributes of a page; fails if its elements do not close in order."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.open: list[str] = []
        self.texts: list[tuple[str, str]] = []
        self.attributes: list[tuple[str, str, str]] = []
        self.feed(path.read_text(encoding="utf-8"))
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.attributes += [(tag, name, value) for name, value in attrs]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.attributes += [(tag, name, value) for name, value in attrs]

    def handle_endtag(self, tag):
        if tag not in VOID:
            assert self.open.pop() == tag

    def handle_data(self, data):
        if data.strip():
            self.texts.append((self.open[-1] if self.open else "", data))

    def of(self, tag: str) -> list[str]:
        return [text for inside, text in self.texts if inside == tag]

    def legends(self) -> list[list[str]]:
        """Return the labels of each chart that has more than one."""
        labels: list[list[str]] = []
        for tag, text in self.texts:
            if tag == "b":
                labels.append([])
            elif tag == "span" and labels and not re.fullmatch(r"[-\d.ekM]+", text):
                labels[-1].append(text)
        return [of_chart[1:] for of_chart in labels if len(of_chart) > 2]

    def values(self, tag: str, name: str) -> list[str]:
        return [value for of, key, value in self.attributes if (of, key) == (tag, name)]


def row(step: int, **more) -> dict:
    return {
        "step": step, "loss": 2 + 7 / step, "learning_rate": 6e-4, "grad_norm": 1.1, "tokens": 32_000 * step,
        "tokens_per_s": 9800.0, "mfu": None, "memory_gib": 1.2, "step_s": 0.5, "time_s": 0.5 * step,
    } | more  # fmt: skip


def with_experts(step: int, **more) -> dict:
    load = [[0.5, 0.3, 0.2], [0.2, 0.4, 0.4]]
    routing = {
        "expert_load": load, "expert_load_max": 1.5, "expert_entropy": 0.93, "dead_experts": 0,
        "router_confidence": 0.4, "router_z_loss": 0.7, "router_bias_range": 0.0, "dropped_share": 0.0,
        "router_layers": {"entropy": [0.93, 0.96], "confidence": [0.3, 0.5], "z_loss": [0.6, 0.8],
                          "bias_range": [0.0, 0.0], "dropped": [0.0, 0.0]},
    }  # fmt: skip
    return row(step, **routing | more)


PREFERENCES = {
    "step": 40, "n_tokens": 65_536, "seen_at_least": 16,
    "layers": [
        {"layer": 1, "n_experts": 3, "liked": [
            [{"text": " def", "lift": 7.3172, "sent": 1266}, {"text": "\n\t</td>", "lift": 2.0, "sent": 16}],
            [{"text": "\x1b\u202e\x00", "lift": 2.0, "sent": 16}],
            [],
        ]},
        {"layer": 4, "n_experts": 70, "liked": [[{"text": "}" * 99, "lift": 2.0, "sent": 16}]] * 64},
    ],
}  # fmt: skip


FINISHED = {
    "steps": 40, "tokens": 1_280_000, "train_loss": 2.2, "val_loss": 2.6, "val_perplexity": 13.46,
    "val_bits_per_byte": 1.25, "best_val_loss": 2.6, "best_step": 10, "time_s": 20.0, "tokens_per_s": 9800.0,
    "parameters": 124_439_808, "active_parameters": 60_000_000, "model_dir": "m",
    "next": ["python -m training.generate --prompt 'a < b'"],
}  # fmt: skip


def validation(text: str = "f(x)") -> dict:
    samples = [{"prompt": "def ", "text": text}]
    of_sources = {"val_sets": {"loss": {"wiki <b>": 2.5, "code": 2.7}}}
    return {"val_loss": 2.6, "val_perplexity": 13.46, "val_bits_per_byte": 1.25, "samples": samples} | of_sources


def history_of(rows: list[dict]) -> History:
    history = History()
    for row in rows:
        history.add(row)
    return history


def report(folder: Path, rows: list[dict], summary: dict | None = None, experts: dict | None = None, **facts) -> Page:
    config = {"data": {"sources": [{"type": "files", "paths": ["a.txt"]}]}}
    facts = {"header": {}, "steps": 40, "moe_layers": [1, 4], "config": config, "config_yaml": ""} | facts
    run = RunInfo(
        dir=folder,
        name="tiny",
        start_step=0,
        batches=BatchSchedule([(0, 1)]),
        facts={},
        hyperparameters={},
        **facts,
    )
    assert write_report(run, history_of(rows), summary, experts) == folder / "report.html"
    assert [path.name for path in folder.iterdir()] == ["report.html"]
    return Page(folder / "report.html")


def titles(page: Page) -> list[str]:
    return [text for text in page.of("b") if text[0].isupper()]


def test_the_page_of_a_finished_moe_run_has_all_sections(tmp_path):
    rows = [with_experts(step, **(validation(f"words {step}") if step % 10 == 0 else {})) for step in range(1, 41)]
    page = report(tmp_path, rows, FINISHED, header={"device": "H < 200"}, config_yaml="steps: 40 # <b>\n")
    assert page.of("title") == page.of("h1") == ["tiny"]
    assert page.of("p")[0].startswith("In 20 seconds this model read 1.28M tokens. Its loss went from 9.00 to ")
    assert "needs 1.25 bits for a byte" in page.of("p")[0]
    assert {"2.600", "13.5", "1.250", "1.28M", "124.4M", "60.0M", "20 seconds"} <= set(page.of("b"))
    assert titles(page) == [
        "Loss", "Compression", "Validation loss by source", "Learning rate", "Gradient norm", "Throughput",
        "Busiest expert", "Router confidence", "Evenness", "Router z-loss",
    ]  # fmt: skip
    assert {"1.50 \N{MULTIPLICATION SIGN}", "0.930", "0 of 6", "40.0 %"} <= set(page.of("b"))
    assert page.of("th") == ["1", "2", "3", "layer 2", "layer 5"]
    assert page.legends() == [
        ["training", "validation"], ["wiki <b>", "code"], ["layer 2", "layer 5"], ["layer 2", "layer 5"],
    ]  # fmt: skip
    assert page.of("td") == ["50.0", "30.0", "20.0", "20.0", "40.0", "40.0"]
    assert page.of("h3") == ["First words, step 10", "Last words, step 40"]
    assert [text for text in page.of("pre") if text.startswith("words")] == ["words 10", "words 40"]
    assert "python -m training.generate --prompt 'a < b'" in page.of("pre")
    assert "steps: 40 # <b>\n" in page.of("pre")
    assert "H < 200" in page.of("dd")


def test_the_time_is_a_bar_of_named_parts_with_the_advice_below(tmp_path):
    seconds = dict.fromkeys(PHASES, 0.0) | {"compute": 3600.0, "data": 1200.0, "start": 1195.0, "idle": 5.0}
    advice = ["memory: fits", "speed: 20 % of the time: a < b"]
    page = report(tmp_path, [row(1)], FINISHED | {"time": seconds, "goodput": 0.8, "advice": advice})
    widths = [float(re.search(r"flex-grow: ([\d.]+)", style)[1]) for style in page.values("i", "style")]
    assert widths == [60.0, 20.0, 19.92]  # five seconds of 6000 round to 0 %
    assert page.values("i", "title") == ["compute: 60 %", "data: 20 %", "start: 20 %"]
    assert [text.strip() for text in page.of("li")] == [
        "compute", "forward and backward, 60 minutes", "data", "waiting for a batch, 20 minutes",
        "start", "start-up, with the first step, 20 minutes", *advice,
    ]  # fmt: skip
    assert "80 % of all the time, restarts included, went into steps that count." in page.of("p")


def test_the_time_of_an_unfinished_run_comes_from_its_rows(tmp_path):
    rows = [row(1, time_start=3.0, time_compute=0.5), row(2, time_compute=0.5)]
    page = report(tmp_path, rows)
    assert page.values("i", "title") == ["start: 75 %", "compute: 25 %"]
    assert page.of("dt") == []
    assert "Where the time went" not in report(tmp_path, [row(1)]).of("h2")


def test_charts_of_problems_appear_only_if_there_were_any(tmp_path):
    wrong = {"dead_experts": 1, "router_bias_range": 0.02, "dropped_share": 0.25}
    rows = [with_experts(1), with_experts(2, **wrong), with_experts(3)]
    page = report(tmp_path, rows)
    assert [title for title in titles(page) if title in ("Dead experts", "Selection bias", "Dropped")] == [
        "Dead experts", "Selection bias", "Dropped"
    ]  # fmt: skip
    assert {"0.000", "0.0 %"} <= set(page.of("b"))
    assert not {"0.000", "0.0 %"} & set(report(tmp_path, [with_experts(step) for step in (1, 2, 3)]).of("b"))


def test_layers_of_different_sizes_share_a_heat_map(tmp_path):
    load = [[1 / 2] * 2, [1 / 4] * 4]
    page = report(tmp_path, [with_experts(1, expert_load=load)])
    assert page.of("th")[:4] == ["1", "2", "3", "4"]
    assert page.of("td") == ["50.0"] * 2 + ["25.0"] * 4
    assert any("An even share is 50.0 % or 25.0 %;" in text for text in page.of("p"))


def test_a_nan_confidence_leaves_a_gap(tmp_path):
    broken = {"confidence": [None, 0.5], "entropy": [None, None]}
    rows = [with_experts(1), with_experts(2, router_confidence=None, router_layers=broken), with_experts(3)]
    assert not re.search("nan|inf|None", " ".join(report(tmp_path, rows).values("path", "d")))


def test_every_character_of_a_preferred_token_is_visible(tmp_path):
    page = report(tmp_path, [with_experts(1)], experts=PREFERENCES)
    assert page.of("summary") == ["layer 2", "layer 5"]
    assert page.of("code")[:3] == ["␣def", "↵⇥</td>", "\\x1b\\u202e\\x00"]
    assert page.of("code")[3:] == ["}" * (MAX_TOKEN_CHARS - 1) + "…"] * 64
    assert page.values("code", "title")[0] == "sent here 1,266 times, 7.3 times as often as the average token"
    assert page.of("dt")[:5] == ["1", "2", "3", "1", "2"]
    assert page.of("span").count("none more than others") == 1
    assert any("after step 40 over 65,536 tokens of validation text" in text for text in page.of("p"))
    assert "and 6 more experts" in page.of("p")


@given(st.text(min_size=1))
def test_a_token_is_never_blank_and_fits_its_cell(text):
    shown = token_text(text)
    assert shown.isprintable() and not re.search(r"\s", shown)
    assert len(re.sub(r"\\(x..|u....|U.{8}|[a-z])", ".", shown)) <= MAX_TOKEN_CHARS


def test_a_dense_run_has_no_charts_of_experts(tmp_path):
    page = report(tmp_path, [row(step, **validation()) for step in range(1, 9)])
    learning = ["Loss", "Compression", "Validation loss by source", "Learning rate", "Gradient norm", "Throughput"]
    assert titles(page) == learning
    assert page.of("td") == []


@pytest.mark.parametrize("rows", [[], [row(1)], [with_experts(1)], [row(1) | validation()], [row(1), row(2)]])
def test_a_run_that_has_just_started_has_a_page(tmp_path, rows):
    page = report(tmp_path, rows)
    assert page.of("h1") == ["tiny"]
    assert bool(page.values("path", "d")) == bool(rows)
    assert page.values("progress", "value") == ([f"{rows[-1]['step'] / 40}"] if rows else [])


def test_a_sample_stays_text(tmp_path):
    text = "</pre></script><script>alert(1)</script><img src=x onerror=alert(1)>\x1b[31m\x00\u202e&amp;"
    page = report(tmp_path, [row(1) | validation(text)])
    assert "".join(page.of("pre")) == printable(text, TEXT)
    assert len(page.of("script")) == 1
    assert page.values("img", "src") == []


SOURCES = [
    ([{"type": "stdlib"}], "1 of 2 parse as Python, up to their last whole line"),
    ([{"type": "stdlib"}, {"type": "files", "paths": ["a.py", "b/*.py"]}], "1 of 2 parse as Python, up to their"),
    ([{"type": "stdlib"}, {"type": "files", "paths": ["a.py", "b.txt"]}], None),
    ([{"type": "huggingface", "name": "some/code"}], None),
]


@pytest.mark.parametrize(("sources", "words"), SOURCES)
def test_the_page_of_a_run_on_source_code_counts_the_samples_that_parse(tmp_path, sources, words):
    samples = [{"prompt": "def ", "text": "f(x):\n    return x +"}, {"prompt": "def ", "text": "f(:\n    pass\n"}]
    page = report(tmp_path, [row(1) | validation() | {"samples": samples}], config={"data": {"sources": sources}})
    assert page.of("h3")[-1].startswith(f"First words, step 1: {words}" if words else "First words, step 1")
    assert ("parse" in page.of("h3")[-1]) == (words is not None)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("def f(a):\n    return a\nx = ", True),  # the last line breaks off
        ("class A:\n    def f(", True),  # a block without a body yet
        ('import os\n"""an open string\n', True),
        ("f(a,\n  b,\n", True),  # an open bracket
        ("x = 1 + \\\n", True),  # a line that goes on
        ("", False),
        ("x = 1", False),  # no whole line
        ("x = 1\nreturn x is 1\n", True),  # wrong, but not in its form; a compiler would warn
        ("x = '\\d'\n", True),  # with a warning
        ("def f(:\n    pass\n", False),
        ("x = 1\n  y = 2\n", False),
        ("a\x00b\n", False),
        ("(" * 100_000 + "\n", False),
        ("The sun rose.\n", False),
    ],
    ids=range(14),
)
def test_whole_lines_of_python_parse_though_they_break_off(text, expected):
    assert is_python(text) == expected


def test_a_sample_is_parsed_to_a_tree_that_nothing_executes(monkeypatch):
    monkeypatch.setattr(python_code, "compile", lambda *args: trees.append(compile(*args)), raising=False)
    trees = []
    assert is_python("import os\n")
    assert isinstance(trees[0], ast.Module)


def test_the_page_fetches_nothing(tmp_path):
    page = report(tmp_path, [with_experts(1, **validation())])
    assert "default-src 'none'" in page.values("meta", "content")[1]
    assert not {name for _, name, _ in page.attributes} & {"src", "href"}
    assert not re.search(r"https?:|//[a-z]|url\(|@import", (tmp_path / "report.html").read_text())


def test_a_nan_loss_leaves_a_gap_in_the_chart(tmp_path):
    page = report(tmp_path, [row(1), row(2, loss=None, grad_norm=None), row(3)])
    paths = " ".join(page.values("path", "d"))
    assert not re.search("nan|inf|None", paths)
    assert report(tmp_path, [row(1, loss=None)]).of("p") == [
        "In 0.5 seconds this model read 32.0k tokens so far, in 1 of 40 steps. Its loss is nan."
    ]


def test_a_long_run_is_still_a_small_page_with_its_extremes(tmp_path):
    rows = [with_experts(step, loss=3 + math.sin(step**2)) for step in range(1, 20_001)]
    rows[12_344]["loss"], rows[7_776]["loss"] = 0.5, 99.0
    history = history_of(rows)
    assert len(history.spans) <= MAX_SPANS and history.n_rows == 20_000
    points = history.points("loss")
    assert points[0] == (1, rows[0]["loss"]) and points[-1] == (20_000, rows[-1]["loss"])
    assert {(12_345, 0.5), (7_777, 99.0)} <= set(points) and len(points) < 2 * MAX_SPANS + 2
    page = report(tmp_path, rows)
    assert (tmp_path / "report.html").stat().st_size < 400_000
    assert all(path.count("L") < 2 * COLUMNS for path in page.values("path", "d"))
    readings = [json.loads(text) for text in page.values("figure", "data-readings")]
    assert all(len(curve["steps"]) <= 2 * READINGS for chart in readings for curve in chart["curves"])
    assert readings[0]["curves"][0]["steps"][-1] == 20_000


def test_the_old_page_stays_if_the_new_one_cannot_be_written(tmp_path):
    report(tmp_path, [row(1)])
    before = (tmp_path / "report.html").read_bytes()
    with no_file_beyond(len(before) // 2), pytest.raises(UserError, match=r"report\.html: File too large"):
        report(tmp_path, [row(1)])
    assert [(path.name, path.read_bytes()) for path in tmp_path.iterdir()] == [("report.html", before)]


# --- geometry --------------------------------------------------------------------------------------

values = st.floats(-1e6, 1e6).filter(lambda x: x == 0 or abs(x) > 1e-9)
curves = st.lists(values, min_size=1, max_size=50).map(lambda ys: list(enumerate(ys, start=1)))


@given(curves, st.booleans(), st.booleans())
def test_every_chart_stays_in_its_frame(points, spikes, zero):
    if spikes or zero:  # used only for numbers that are never negative
        points = [(step, abs(y)) for step, y in points]
    data = chart(Chart("t", "u", spikes=spikes, zero=zero), len(points), [Curve("c", "train", points)])
    assert all(-1e-6 <= tick["at"] <= 100 + 1e-6 for tick in data["y_ticks"])
    assert 1 <= len(data["y_ticks"]) <= 12
    assert all(0 <= tick["at"] <= 100 for scale in data["scales"] for tick in scale["x_ticks"])
    drawn = [float(y) for y in re.findall(r" (-?[\d.]+)", data["scales"][0]["paths"][0]["d"])]
    assert all(y <= 300 for y in drawn)
    assert spikes or all(y >= 0 for y in drawn)


@given(st.lists(st.floats(-5, 5), min_size=1, max_size=100))
def test_thinning_keeps_the_highest_and_the_lowest_point(ys):
    points = list(enumerate(ys, start=1))
    kept = thin(points, lambda step: 0.01 * step / len(points))
    assert kept == sorted(kept)
    assert len(kept) <= 0.02 * COLUMNS + 2
    assert {min(ys), max(ys)} <= {y for _, y in kept}


def test_smoothing_follows_a_steep_start_and_averages_the_noise_of_a_plateau():
    steep = history_of([row(1, loss=10.0), row(2, loss=5.0), row(3, loss=3.0)]).series("loss")
    assert list(smooth(steep, half=100)) == [(1, 10.0), (2, 5.0), (3, 3.0)]
    noisy = history_of([row(step, loss=1.0 + (-1) ** step) for step in range(1, 401)]).series("loss")
    assert all(abs(y - 1) < 0.06 for step, y in smooth(noisy, half=20) if step > 100)


def test_a_spike_does_not_flatten_the_rest():
    assert value_range([1.0] * 99 + [1000.0], spikes=True, zero=True)[1] < 2
    assert value_range([1.0] * 99 + [1000.0], spikes=False, zero=True)[1] > 1000


@pytest.mark.parametrize(
    ("low", "high", "expected"), [(0, 1000, [0, 200, 400, 600, 800, 1000]), (2.1, 2.5, [2.1, 2.2, 2.3, 2.4, 2.5])]
)
def test_ticks_are_round_numbers(low, high, expected):
    assert ticks_between(low, high, 5) == pytest.approx(expected)


@pytest.mark.parametrize(("value", "text"), [(0, "0"), (0.5, "0.5"), (6e-4, "6e-4"), (20_000, "20k"), (1.5e6, "1.5M")])
def test_ticks_are_short(value, text):
    assert tick_text(value) == text


def test_the_load_table_is_the_mean_over_the_end_of_the_run():
    loads = [[[1.0, 0.0]]] * 50 + [[[0.25, 0.75]]] * 50
    recent = history_of([row(step, expert_load=load) for step, load in enumerate(loads, start=1)]).recent
    assert load_table([row["expert_load"] for row in recent]) == [
        [{"text": "25.0", "kind": "under", "by": 50}, {"text": "75.0", "kind": "over", "by": 50}]
    ]


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0 seconds"),
        (1, "1 second"),
        (0.5, "0.5 seconds"),
        (90, "90 seconds"),
        (125, "2.1 minutes"),
        (7200, "2 hours"),
    ],
)
def test_durations_have_a_readable_unit(seconds, text):
    assert duration_text(seconds) == text
