"""Links, files and lengths in the documents are right."""

import re
from pathlib import Path

import pytest

from training.options.schema import all_groups, literals, sections, type_name
from training.options.yaml import to_dotted

ROOT = Path(__file__).parent.parent
PAGES = sorted(
    [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("docs/playbooks/*.md"), *ROOT.glob("training/*.md")]
)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    for link in re.findall(r"\]\(([^)#\s]*)(#[^)\s]*)?\)", page.read_text()):
        target, anchor = link
        if "://" in target:
            continue
        there = (page.parent / target).resolve() if target else page
        assert there.exists(), target
        if anchor:
            titles = re.findall(r"^#+ (.*)$", there.read_text(), flags=re.MULTILINE)
            assert anchor[1:] in [re.sub(r"[^\w\- ]", "", title).strip().lower().replace(" ", "-") for title in titles]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_files_that_a_page_names_exist(page):
    named = re.findall(r"`((?:benchmarks|configs|docs|tests|training)/[\w./]+\.\w+)`", page.read_text())
    missing = [name for name in named if not (ROOT / name).exists() and not (ROOT / "training" / name).exists()]
    assert not missing


def test_the_reading_path_has_the_listed_lengths():
    """The lengths in architecture.md are those of the files, within a tenth, and stay under 2,000 lines together."""
    rows = re.findall(
        r"^\| \d+ \| \[(training/[^]]+)\].*?\| (\d+) \|", (ROOT / "docs/architecture.md").read_text(), re.M
    )
    assert 8 <= len(rows) <= 12
    lengths = {name: (ROOT / name).read_text().count("\n") for name, _ in rows}
    assert sum(lengths.values()) < 2000
    for name, listed in rows:
        assert int(listed) == pytest.approx(lengths[name], rel=0.1), name


def test_the_table_of_options_lists_every_option_and_no_other():
    """Each row names the options and types of its section; `data` and `parallel` leave details to --help."""
    table = (ROOT / "training/README.md").read_text().partition("| section | options |")[2].partition("\n\n")[0]
    rows = dict(re.findall(r"^\| `?([\w.\[\] ]+?)`? \| (.*) \|$", table, re.M))
    groups = {name: [] for name in rows}
    for group in all_groups():
        name = to_dotted(group.path).replace(".N", "[]") or "top level"
        groups[name if name in rows else name.partition(".")[0].partition("[")[0]].append(group)
    for name, row in rows.items():
        quoted = {word for words in re.findall("`([^`]*)`", row) for word in re.findall(r"[a-z]\w*", words)}
        own = [group for group in groups[name] if to_dotted(group.path).replace(".N", "[]") in (name, "")]
        options = {
            option
            for group in own
            for option, field in group.section.model_fields.items()
            if name != "top level" or not sections(field.annotation)
        }
        types = {type_name(group.section) for group in groups[name]} - {None}
        below = {option for group in groups[name] for option in group.section.model_fields}
        words = {
            word
            for group in groups[name]
            for f in group.section.model_fields.values()
            for word in literals(f.annotation)
        }
        assert options - {"type"} <= quoted, name
        assert types <= set(re.findall(r"\w+", row)), name
        assert quoted <= below | types | words, name
