"""The report and the comparison in a real browser: Debian's chromium, or Chrome. Skipped where there is none."""

import json
import shutil
from contextlib import suppress
from pathlib import Path

import pytest

from training.compare.page import write_page
from training.compare.results import Comparison, Difference, RunResult, VariantResult
from training.logging.history import History
from training.logging.jsonl import JSONLSink
from training.logging.metrics import METRICS
from training.logging.phases import PHASES
from training.logging.report import write_report
from training.logging.sinks import RunInfo
from training.optim.batch_schedule import BatchSchedule

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
HOSTILE = "<script>window.harm = 1</script>\"' &amp; \u202e name-of-80-characters-without-any-blank-" + "x" * 30
CUT_OFF = """
const wide = [...document.querySelectorAll("body *")].filter(element => {
  if (element.closest(".scroll, pre, svg, [hidden]") && !element.matches(".scroll, pre, svg")) return false;
  const box = element.getBoundingClientRect();
  return box.width && (box.right > innerWidth + 1 || box.left < -1);
});
return wide.map(element => element.tagName + "." + element.className + " " + element.textContent.slice(0, 40));
"""


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    program = next(filter(None, map(shutil.which, BROWSERS)), None)
    driver = shutil.which("chromedriver")
    if program is None or driver is None:
        pytest.skip("no chromium with chromedriver is installed")
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = program
    for flag in ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"):
        options.add_argument(flag)
    options.add_argument(f"--user-data-dir={tmp_path_factory.mktemp('browser')}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    browser = webdriver.Chrome(options, webdriver.ChromeService(driver))
    yield browser
    with suppress(OSError):
        browser.quit()


def row(step: int, n_layers: int = 3) -> dict:
    """Return a row with every kind of figure."""
    values = [1.0 / (step + layer) for layer in range(n_layers)]
    row = {
        "step": step, "loss": 5.0 / step**0.1, "learning_rate": 1e-3, "grad_norm": 1.0, "tokens": 32_768 * step,
        "tokens_per_s": 1e5, "memory_gib": 1.0, "step_s": 0.3, "time_s": 0.3 * step, "time_compute": 0.3,
        "expert_load": [[0.5, 0.3, 0.2]] * 2, "expert_load_max": 1.5, "expert_entropy": 0.9, "dead_experts": 0,
        "router_confidence": 0.4, "router_z_loss": 0.7, "router_bias_range": 0.02, "dropped_share": 0.1,
        "router_layers": {name: [0.5, 0.6] for name in ("entropy", "confidence", "z_loss", "bias_range", "dropped")},
    }  # fmt: skip
    if step % 100 == 0 or step < 4:
        names = [metric.key.partition(".")[2] for metric in METRICS if metric.heat_map]
        row["layers"] = dict.fromkeys(names, values)
        row |= {
            "val_loss": 5.1 / step**0.1, "val_perplexity": 99.0, "val_bits_per_byte": 1.5,
            "val_sets": {"loss": {HOSTILE: 4.0, "wiki": 3.0}}, "samples": [{"prompt": "def ", "text": HOSTILE}],
        }  # fmt: skip
    return row


def write_run(folder: Path, n_rows: int, name: str) -> RunInfo:
    """Write a run's rows and its report."""
    folder.mkdir(parents=True)
    info = RunInfo(
        dir=folder, name=name, config={"data": {"sources": [{"type": "stdlib"}]}}, config_yaml=f"name: {HOSTILE}\n",
        header={"device": HOSTILE, "loss": "x"},
        start_step=0, steps=n_rows, batches=BatchSchedule([(0, 32_768)]),
        moe_layers=[0, 2], facts={}, hyperparameters={},
    )  # fmt: skip
    history = History()
    if n_rows < 1000:
        sink = JSONLSink(info)
        sink.write([row(step) for step in range(1, n_rows + 1)])
        history = sink.history
    else:
        for step in range(1, n_rows + 1):
            history.add(row(step))
    experts = {
        "step": n_rows, "n_tokens": 1000, "seen_at_least": 5,
        "layers": [{"layer": 0, "n_experts": 3, "liked": [[{"text": HOSTILE, "sent": 3, "lift": 2.0}], [], []]}],
    }  # fmt: skip
    summary = {
        "time": dict.fromkeys(PHASES, 0.0) | {"compute": 3.0},
        "parameters": 9e8,
        "active_parameters": 1e8,
        "advice": [HOSTILE],
        "next": ["python -m training.generate --run runs/r"],
    }
    write_report(info, history, summary, experts)
    return info


@pytest.fixture(scope="module")
def pages(tmp_path_factory) -> dict[str, Path]:
    """Each kind of page, by its name."""
    folder = tmp_path_factory.mktemp("pages")
    runs = {n: write_run(folder / f"run-{n}", n, HOSTILE) for n in (3, 100_000)}
    empty = write_run(folder / "empty", 0, "empty")
    compared = [
        RunResult(seed, write_run(folder / f"{name}-{seed}", 3, name).dir, 3.0 + seed, 3, 98_304, 0.9, 1e15, "x")
        for name in "ab"
        for seed in (0, 1)
    ]
    results = [
        VariantResult(HOSTILE, tuple(compared[:2]), None),
        VariantResult("b", tuple(compared[2:]), Difference(2, 0.1, -0.1, 0.3, 0.07)),
    ]
    options = {"optim.learning_rate": [1e-3, HOSTILE]}
    write_page(Comparison("val_loss", "tokens", results, options, {(HOSTILE, 2): HOSTILE}, []), folder)
    return {
        "3 rows": runs[3].dir / "report.html",
        "100,000 rows": runs[100_000].dir / "report.html",
        "no rows": empty.dir / "report.html",
        "comparison": folder / "compare.html",
    }


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [400, 1280])
@pytest.mark.parametrize("name", ["3 rows", "100,000 rows", "no rows", "comparison"])
def test_a_page_is_whole_quiet_and_harmless(browser, pages, name, width, scheme):
    media = {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", media)
    metrics = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    browser.get_log("browser"), browser.get_log("performance")
    browser.get(pages[name].as_uri())
    assert browser.execute_script("return innerWidth") == width
    assert browser.execute_script(CUT_OFF) == []
    assert browser.execute_script("return document.documentElement.scrollWidth") <= width
    assert browser.execute_script("return window.harm") is None
    background = browser.execute_script("return getComputedStyle(document.body).backgroundColor")
    assert (int(background.strip("rgb()").split(",")[0]) > 128) == (scheme == "light")
    if "rows" in name and name != "no rows":
        title = browser.execute_script("return document.querySelector('h1').textContent")
        assert title == HOSTILE.replace("\u202e", "\\u202e")
    events = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    addresses = [e["params"]["request"]["url"] for e in events if e["method"] == "Network.requestWillBeSent"]
    assert all(address.startswith(("file:", "data:")) for address in addresses)
    assert browser.get_log("browser") == []


@pytest.mark.parametrize("name", ["100,000 rows", "comparison"])
def test_the_pointer_shows_values_and_the_axis_can_be_logarithmic(browser, pages, name):
    from selenium.webdriver import ActionChains
    from selenium.webdriver.common.by import By

    browser.get(pages[name].as_uri())
    plot = browser.find_element(By.CSS_SELECTOR, ".chart .plot")
    browser.execute_script("arguments[0].scrollIntoView({block: 'center'})", plot)
    ActionChains(browser).move_to_element_with_offset(plot, 40, 0).perform()
    reading = plot.find_element(By.TAG_NAME, "output").text
    assert reading.startswith("step " if "rows" in name else "tokens ") and any(c.isdigit() for c in reading)
    linear, logarithmic = (plot.find_element(By.CSS_SELECTOR, f"svg g.{name}") for name in ("linear", "log"))
    assert (linear.is_displayed(), logarithmic.is_displayed()) == (True, False)
    browser.find_element(By.ID, "log").click()
    assert (linear.is_displayed(), logarithmic.is_displayed()) == (False, True)
    assert browser.get_log("browser") == []
