"""Apply the examples of docs/playbooks to a copy of the package, and train with all of them."""

import json
import re
import shutil
import subprocess
import sys
import textwrap
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import pytest
from conftest import ROOT, environment

PAGES = sorted((ROOT / "docs/playbooks").glob("add_*.md"))
MAX_PLACES = 3  # changed files besides the new component's own
CHECKS = ROOT / "tests/playbook_checks.py"  # runs in a process with the copy


class Block(NamedTuple):
    """A new file, or a change of one."""

    path: str
    text: str
    is_new: bool

    def apply(self, root: Path) -> None:
        """Write the new file, or apply each hunk of the diff, whose old lines must occur once in the file."""
        path = root / self.path
        if self.is_new:
            path.write_text(self.text)
            return
        content = path.read_text()
        for hunk in self.text.split("@@\n"):
            lines = [(line[:1].strip(), f"{line[1:]}\n") for line in hunk.splitlines()]
            old, new = ("".join(text for mark, text in lines if mark in ("", side)) for side in "-+")
            assert content.count(old) == 1, f"{self.path} has {content.count(old)} of: {old}"
            content = content.replace(old, new)
        path.write_text(content)


def blocks(page: Path) -> list[Block]:
    """Return the page's new files and changes."""
    changes = []
    for fence in re.findall(r"^ *```(?:python|diff)\n.*?\n *```$", page.read_text(), flags=re.DOTALL | re.MULTILINE):
        language, first, *lines, _ = textwrap.dedent(fence).split("\n")
        text = "".join(f"{line}\n" for line in lines)
        if language == "```diff":
            changes.append(Block(first.removeprefix("--- "), text, is_new=False))
        elif first.startswith("# training/"):
            changes.append(Block(first.removeprefix("# "), text, is_new=True))
    return changes


def copy_with(pages: list[Path], folder: Path) -> Path:
    """Copy the package and apply the examples of the pages."""
    shutil.copytree(ROOT / "training", folder / "training", ignore=shutil.ignore_patterns("__pycache__"))
    for block in (block for page in pages for block in blocks(page) if block.path.startswith("training/")):
        block.apply(folder)
    return folder


def run_checks(folder: Path, *arguments: str) -> subprocess.CompletedProcess:
    variables = environment() | {"PYTHONPATH": f"{folder}:{ROOT / 'tests'}"}
    return subprocess.run(
        [sys.executable, str(CHECKS), *arguments],
        cwd=folder,
        env=variables,
        capture_output=True,
        text=True,
        timeout=240,
    )


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_a_page_needs_few_places_and_fits_a_screen(page):
    places = [block for block in blocks(page) if not block.is_new and block.path.startswith("training/")]
    assert places, "no example"
    assert len(places) <= MAX_PLACES
    assert len(Counter(block.path for block in places)) == len(places), "two blocks for one file"
    assert page.read_text().count("\n") <= 120


def test_there_is_a_page_for_each_kind_and_the_index_has_them_all():
    index = (ROOT / "docs/playbooks/README.md").read_text()
    assert len(PAGES) == 9 and all(f"({page.name})" in index for page in PAGES)


def test_a_package_with_all_examples_trains_with_them_and_resumes(tmp_path):
    """Every example shows its effect: a row's keys, a file, a kernel's name, weights that no other layer has."""
    done = run_checks(copy_with(PAGES, tmp_path), "train")
    assert done.returncode == 0, done.stdout + done.stderr
    facts = json.loads(done.stdout.splitlines()[-1])
    rows = facts["rows"]
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    assert all(row["weight_norm"] > 0 for row in rows), "metric"
    assert 0 <= rows[-1]["val_accuracy"] <= 1 and facts["summary_has_accuracy"], "validation figure"
    assert facts["csv_steps"] == [1, 2, 3, 4], "sink"
    assert facts["kernels"]["loss"] == "whole", "kernel"
    assert {"blocks.0.mixer.head_weight", "blocks.0.ffn.norm.weight"} <= set(facts["tensors"]), "mixer, feed-forward"
    assert facts["optimizer_state"] == ["momentum_buffer"], "optimizer"
    peak = 1e-2
    assert [row["learning_rate"] for row in rows] == pytest.approx([peak / 2, peak, peak / 4, 0]), "schedule"
    counts = re.findall(r"(\d+) documents", facts["data"])
    assert sum(map(int, counts)) == 40, "data source"


def contracts_of(folder: Path, pages: list[Path], without: Block | None = None) -> subprocess.CompletedProcess:
    """Apply examples to a copy of the repository, regenerate its files, and run the contract tests there."""
    shutil.copytree(ROOT / "training", folder / "training", ignore=shutil.ignore_patterns("__pycache__"))
    others = shutil.ignore_patterns(".*", "__pycache__", "runs", "data_cache", "training")  # training/runs is source
    shutil.copytree(ROOT, folder, ignore=others, dirs_exist_ok=True)
    for page in pages:
        for block in blocks(page):
            if block != without:
                block.apply(folder)
    variables = environment() | {"PYTHONPATH": str(folder)}
    for module, target in (("training.options.cli", "configs/schema.json"), ("training.logging.metrics", None)):
        arguments = ["schema"] if target else []
        done = subprocess.run(
            [sys.executable, "-m", module, *arguments], cwd=folder, env=variables, capture_output=True, text=True
        )
        if done.returncode:
            return done
        if target:
            (folder / target).write_text(done.stdout)
        else:
            readme = folder / "training/README.md"
            table = re.compile(r"\| in a row of .*?\n(?=\n)", re.DOTALL)
            readme.write_text(table.sub(lambda _, text=done.stdout: text, readme.read_text(), count=1))
    names = ("test_optim", "test_model", "test_data_sources", "test_config", "test_kernels", "test_logging")
    paths = [f"tests/{name}.py" for name in names]
    words = "registries or schedule or optimizer or union or reader or schema or table or sink or every_key or readme"
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-k", words, *paths]
    return subprocess.run(command, cwd=folder, env=variables, capture_output=True, text=True)


@pytest.mark.soak
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_a_complete_example_passes_the_contracts_and_a_forgotten_step_does_not(page, tmp_path):
    done = contracts_of(tmp_path / "complete", [page])
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    for number, block in enumerate(block for block in blocks(page) if not block.is_new):
        done = contracts_of(tmp_path / str(number), [page], without=block)
        assert done.returncode != 0, f"no contract test fails without {block.path}"
