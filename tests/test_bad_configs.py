"""Configs with planted mistakes: one line for each, with its place, value and reason, and no run is started."""

import io
import math
import os
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import redirect_stderr, redirect_stdout
from itertools import combinations
from pathlib import Path
from types import NoneType
from typing import Annotated, Any, Literal, NamedTuple, get_args, get_origin

import pytest
from conftest import ROOT, minimal_value, rows
from hypothesis import HealthCheck, Phase, assume, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from training.config import Config, Section
from training.options import cli
from training.options.schema import all_groups, is_list, sections, type_name
from training.options.yaml import OptionPath
from training.train import FLAGS, train

# --- planted mistakes ------------------------------------------------------------------------------

# (text, its value in YAML 1.2)
VALUES = [
    ("x y", "x y"), ("3", 3), ("-7", -7), ("0", 0), ("2.5", 2.5), ("1e-4", 1e-4), ("010", 10), ("no", "no"),
    ("12:30:45", "12:30:45"), ("true", True), ("null", None), ("[]", []), ("[1, 2]", [1, 2]), ("{a: 1}", {"a": 1}),
    (".nan", math.nan), ("-.inf", -math.inf), ("1e999", math.inf), ("''", ""), ("9" * 30, int("9" * 30)),
    ("2001-01-01", "2001-01-01"), ("$(id)", "$(id)"), ("'{0.__class__}'", "{0.__class__}"), ("../../x", "../../x"),
]  # fmt: skip
BOUNDS = {
    "ge": lambda x, limit: x >= limit, "gt": lambda x, limit: x > limit,
    "le": lambda x, limit: x <= limit, "lt": lambda x, limit: x < limit,
    "min_length": lambda x, limit: len(x) >= limit, "pattern": lambda x, limit: re.search(limit, x) is not None,
}  # fmt: skip


def is_valid(annotation: Any, limits: list, value: Any) -> bool:
    """Return True if an option may have a value; independent of pydantic, and slow."""
    if get_origin(annotation) is Annotated and not sections(annotation):
        annotation, *more = get_args(annotation)
        limits = [*limits, *(part for one in more for part in getattr(one, "metadata", [one]))]
    if sections(annotation):
        if is_list(annotation):
            return type(value) is list and is_within(limits, value)
        return isinstance(value, dict) or (value is None and NoneType in get_args(annotation))
    if is_list(annotation):
        return type(value) is list and is_within(limits, value)
    if get_origin(annotation) is Literal:
        return type(value) is str and value in get_args(annotation)
    if parts := get_args(annotation):
        return any(is_valid(part, limits, value) for part in parts)
    if annotation is NoneType:
        return value is None
    if annotation is float:
        return type(value) in (int, float) and math.isfinite(value) and is_within(limits, value)
    return type(value) is annotation and is_within(limits, value)


def is_within(limits: list, value: Any) -> bool:
    return all(
        test(value, getattr(limit, name)) for limit in limits for name, test in BOUNDS.items()
        if getattr(limit, name, None) is not None
    )  # fmt: skip


class Mistake(NamedTuple):
    """The text at a path, and the start of the reason in its error line."""

    section: type[Section]
    at: OptionPath
    text: str
    reason: str
    by_flag: bool


def as_shown(text: str, value: Any) -> str:
    """Return a value as errors show it."""
    if isinstance(value, list | dict):
        return ("a section" if isinstance(value, dict) else "a list") if value else text
    return f"'{value}'" if isinstance(value, str) else text


GROUPS = [(tuple(0 if key == "N" else key for key in group.path), group.section) for group in all_groups()]
ALTERNATIVES = [(at, names) for at, section in GROUPS for names, _ in getattr(section, "alternatives", ())]
NAMES = sorted({name for _, section in GROUPS for name in section.model_fields} - {"type"})


@st.composite
def mistakes(draw: st.DrawFn) -> Mistake:
    """Draw a misspelt or misplaced option, an invalid value or an unknown type."""
    at, section = draw(st.sampled_from(GROUPS))
    name = draw(st.sampled_from(sorted(section.model_fields)))
    kind = draw(st.sampled_from(["value", "value", "value", "misspelt", "elsewhere"]))
    by_flag = draw(st.booleans())
    if name == "type":
        types = type_name(section)
        return Mistake(section, (*at, "type"), f"{types}x", f"'{types}x' is not one of ", False)
    field = section.model_fields[name]
    if kind == "value":
        text, value = draw(st.sampled_from(VALUES))
        assume(not is_valid(field.annotation, field.metadata, value))
        assume(not (is_list(field.annotation) and value == [1, 2]))  # each wrong entry has its own line
        assume(not (sections(field.annotation) and isinstance(value, dict)))
        by_flag = by_flag and "str" not in repr(field.annotation) and not sections(field.annotation)
        return Mistake(section, (*at, name), text, f"{as_shown(text, value)} is not ", by_flag)
    if kind == "misspelt":
        n = draw(st.integers(0, len(name) - 1))
        edited = {name[:n] + name[n + 1 :], name[:n] + name[n] + name[n:], name[:n] + name[n:].swapcase()}
        name = draw(st.sampled_from(sorted(edited)))
    else:
        name = draw(st.sampled_from(NAMES))
    known = {option for place, one in GROUPS if place == at for option in one.model_fields}
    assume(name and name not in known and dotted((*at, name)) not in ("config", "resume", "help"))
    return Mistake(section, (*at, name), "1", "unknown option", by_flag)


def are_independent(chosen: list[Mistake]) -> bool:
    """Return True if no mistake hides another."""
    for one, other in combinations(chosen, 2):
        short, long = sorted((one.at, other.at), key=len)
        same_place = one.at[:-1] == other.at[:-1]
        hides = "type" in (one.at[-1], other.at[-1]) or one.section is not other.section
        is_below = short[-1] == "type" and long[: len(short) - 1] == short[:-1]  # an unknown type has no options
        are_alternatives = any(
            {one.at[: len(place) + 1], other.at[: len(place) + 1]} <= {(*place, name) for name in names}
            for place, names in ALTERNATIVES
        )
        if long[: len(short)] == short or (same_place and hides) or is_below or are_alternatives:
            return False
    return True


def config_with(chosen: list[Mistake]) -> dict:
    """Return the smallest config with the mistakes, whose sections are otherwise complete."""
    tree: dict = {"data": {"sources": [{"type": "stdlib"}]}}
    for mistake in chosen:
        *parents, name = mistake.at
        if mistake.by_flag and mistake.reason == "unknown option":
            continue
        node: Any = tree
        for key, following in zip(parents, mistake.at[1:], strict=True):
            empty = [{}] if isinstance(following, int) else {}
            node = node[key] if isinstance(key, int) else node.setdefault(key, empty)
            if key == 0 and "sources" in str(parents[1]) and isinstance(following, str) and following != name:
                node.setdefault("type", "stdlib")  # a section of a source, which has to be complete
        if kind := type_name(mistake.section):
            node["type"] = kind
        node |= {key: value for key, value in minimal_value(mistake.section).items() if key not in node}
        if mistake.by_flag:
            node.pop(name, None)
        else:
            node[name] = mistake.text
    return tree


def to_yaml(tree: Any, indent: int = 0, at: OptionPath = ()) -> Iterator[tuple[OptionPath, str]]:
    """Yield (path, line of YAML) of a tree."""
    items = tree.items() if isinstance(tree, dict) else enumerate(tree)
    for key, value in items:
        start = " " * indent + (f"{key}:" if isinstance(tree, dict) else "-")
        if isinstance(value, dict | list) and value:
            yield (*at, key), start
            yield from to_yaml(value, indent + 2, (*at, key))
        else:
            yield (*at, key), f"{start} {value}"


def dotted(at: OptionPath) -> str:
    return ".".join(map(str, at))


def errors_of(*argv: str) -> list[str]:
    """Run the train command, which must exit with status 2 in time and create nothing. Returns its error lines."""
    before, took = set(Path().iterdir()), math.inf
    for _ in range(3):  # retry: a garbage collection may cost a second
        start, out, err = time.process_time(), io.StringIO(), io.StringIO()
        with pytest.raises(SystemExit) as stop, redirect_stdout(out), redirect_stderr(err):
            cli.parse_command_line(list(argv), prog="train", doc="Train.", flags=FLAGS)
        if (took := time.process_time() - start) < 1:  # CPU time, because other processes may be busy
            break
    lines = err.getvalue().splitlines()
    assert (stop.value.code, out.getvalue()) == (2, "")
    assert set(Path().iterdir()) == before
    assert took < 1
    assert lines and len(set(lines)) == len(lines)
    assert all(line.startswith("error: ") and line.isprintable() and len(line) < 1000 for line in lines), lines
    return [line.removeprefix("error: ") for line in lines]


def check_each_mistake_has_its_line(chosen: list[Mistake]) -> None:
    lines = list(to_yaml(config_with(chosen)))
    Path("my.yaml").write_text("\n".join(text for _, text in lines) + "\n")
    numbers = {at: number for number, (at, _) in enumerate(lines, 1)}
    flags = [f"--{dotted(mistake.at)}={mistake.text}" for mistake in chosen if mistake.by_flag]
    expected = [
        f"--{dotted(mistake.at)}: {mistake.reason}"
        if mistake.by_flag
        else f"my.yaml:{numbers[mistake.at]}: {dotted(mistake.at)}: {mistake.reason}"
        for mistake in chosen
    ]
    lines = errors_of("--config", "my.yaml", *flags)
    reported = [next((start for start in expected if line.startswith(start)), line) for line in lines]
    assert sorted(reported) == sorted(expected), (lines, Path("my.yaml").read_text())


FUZZ = settings(
    derandomize=True, database=None, deadline=None, phases=[Phase.explicit, Phase.generate],
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.filter_too_much, HealthCheck.too_slow],
)  # fmt: skip
MISTAKES = st.lists(mistakes(), min_size=1, max_size=3).filter(are_independent)


@pytest.fixture(autouse=True)
def work_in_tmp_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@settings(FUZZ, max_examples=1000)
@given(chosen=MISTAKES)
def test_every_mistake_has_one_line_with_its_place_value_and_reason(chosen):
    check_each_mistake_has_its_line(chosen)


@pytest.mark.soak
@settings(FUZZ, max_examples=100_000)
@given(chosen=MISTAKES)
def test_100_000_configs_with_mistakes(chosen):
    check_each_mistake_has_its_line(chosen)


def test_swapped_sections_are_reported_option_by_option():
    below = [(at[0], section) for at, section in GROUPS if len(at) == 1 and at != ("data",)]
    for (one, section), (other, another) in combinations(below, 2):
        if one != other:
            swapped = [(one, section, another), (other, another, section)]
            check_each_mistake_has_its_line([
                Mistake(into, (at, name), "1", "unknown option", by_flag=False)
                for at, into, source in swapped
                for name in source.model_fields
                if name not in {known for place, each in GROUPS if place == (at,) for known in each.model_fields}
            ])  # fmt: skip


# --- attacks with YAML -----------------------------------------------------------------------------

BOMB = "a: &a [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{name}: &{name} [{', '.join(['*' + before] * 10)}]\n" for before, name in zip("abcdefgh", "bcdefghi", strict=True)
)
DATA = "data: {sources: [{type: stdlib}]}\n"
ATTACKS = {
    "a tag that runs": (b"name: !!python/object/apply:os.system ['touch made']\n", "my.yaml:1: name: no tags"),
    "a tag at the top": (b"!!python/object/new:os.system ['touch made']\n", "my.yaml:1: not a mapping of options"),
    "aliases that explode": (BOMB.encode(), "my.yaml:1: a: no anchors here"),
    "an alias of itself": (b"model: &a {blocks: *a}\n", "my.yaml:1: model: no anchors here"),
    "a merge key": (b"model: {<<: {n_layer: 3}}\n", "my.yaml:1: model.<<: unknown option"),
    "20,000 brackets": (b"[" * 20_000, "my.yaml:1: nested more than 12 deep"),
    "10 MB": (b"# " + b"x" * 10_000_000, "my.yaml: longer than 32768 bytes"),
    "binary": (bytes(range(256)), "my.yaml: not UTF-8 text (byte 128)"),
    "a tab": (b"model:\n\tn_layer: 3\n", "my.yaml:2: not YAML: a tab; indent with spaces"),
    "UTF-16": ("\ufeffsteps: 3\n".encode("utf-16-le"), "my.yaml: not UTF-8 text (byte 0)"),
    "a byte order mark in the middle": ("steps: 3\n\ufeffseed: 1\n".encode(), "my.yaml:2: "),
    "empty": (b"", "my.yaml: data.sources: missing"),
    "a list at the top": (b"- steps: 3\n", "my.yaml:1: not a mapping of options"),
    "a time": (b"optim: {learning_rate: 12:30:45}\n", "my.yaml:1: optim.learning_rate: '12:30:45' is not a number > 0"),
    "a no": (b"parallel: {compile: no}\n", "my.yaml:1: parallel.compile: 'no' is not true or false"),
    "an octal": (b"name: 010\n", "my.yaml:1: name: 010 is not text matching"),
    "a key twice": (b"steps: 200\nsteps: 300\n", "my.yaml:2: steps: given twice, first on line 1"),
}  # fmt: skip


@pytest.mark.parametrize("kind", ATTACKS)
def test_an_attack_is_reported_in_lines(kind):
    raw, start = ATTACKS[kind]
    Path("my.yaml").write_bytes(raw)
    lines = errors_of("--config", "my.yaml")
    assert any(line.startswith(start) for line in lines), lines
    assert not Path("made").exists()


def test_a_byte_order_mark_and_yaml_1_2_numbers_are_accepted():
    Path("my.yaml").write_bytes(b"\xef\xbb\xbfsteps: 0200\r\noptim: {learning_rate: 1e-4}\n" + DATA.encode())
    config = cli.load_config("my.yaml")
    assert (config.steps, config.optim.learning_rate) == (200, 1e-4)


# --- the commands themselves -----------------------------------------------------------------------

OK = ["--config", str(ROOT / "configs" / "quickstart.yaml")]
COMMANDS = [
    ("train --config wrong.yaml", "wrong.yaml:1: steps: 'x' is not an integer >= 1"),
    ("train --config /dev/zero", "/dev/zero: longer than 32768 bytes"),
    ("train OK --optim.learning_rte=1 --seed -1", "--optim.learning_rte: unknown option"),
    ("train OK --model.blocks.3.ffn.n_experts 4", "--model.blocks.3.ffn.n_experts: model.blocks has no entry '3'"),
    ("train OK --model {n_layer:", "--model: not YAML: "),
    ("train OK steps=3", "steps: not a flag"),
    ("train OK --resume", "--resume: a value is missing"),
    ("prepare OK --data.tokenizer '{type: &a byte}'", "--data.tokenizer: no anchors here (&a)"),
    ("plan OK --world 0", "--world: '0' is not a number of ranks, 1 or more"),
    ("plan OK --mfu 1e9", "--mfu: '1e9' is not above 0"),
    ("twin --config wrong.yaml --out made.yaml", "wrong.yaml:1: steps: "),
    ("generate --run x --prompt a --temperature nan", "--temperature: nan is not a number"),
    ("evaluate --run x --nope 3", "unrecognized arguments: --nope"),
    ("export --run x --dtype int8", "--dtype: invalid choice: 'int8'"),
    ("checkpoints remove x", "action: invalid choice: 'remove'"),
    ("checkpoints prune x --keep many", "--keep: invalid int value: 'many'"),
]  # fmt: skip


@pytest.mark.parametrize(("line", "start"), COMMANDS)
def test_a_wrong_command_line_is_one_line_before_torch_is_imported(tmp_path, line, start):
    Path("wrong.yaml").write_text("steps: x\n" + DATA)
    trap = tmp_path / "trap"
    trap.mkdir()
    (trap / "torch.py").write_text("raise AssertionError('torch was imported')\n")
    module, *words = shlex.split(line)
    argv = [part for word in words for part in (OK if word == "OK" else [word])]
    before = set(tmp_path.rglob("*"))
    environment = os.environ | {"PYTHONPATH": f"{trap}{os.pathsep}{ROOT}", "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run(
        [sys.executable, "-m", f"training.{module}", *argv], env=environment, capture_output=True, text=True, timeout=60
    )
    lines = done.stderr.splitlines()
    assert (done.returncode, done.stdout) == (2, ""), done.stderr
    assert all(each.startswith("error: ") for each in lines) and len(lines) == 1 + (" -1" in line), done.stderr
    assert lines[0].startswith(f"error: {start}")
    assert set(tmp_path.rglob("*")) == before


# --- accepted configs run --------------------------------------------------------------------------

# Options to leave unchanged, so that sizes stay small and nothing outside this machine is used.
LEFT = {
    "n_layer",
    "n_head",
    "n_embd",
    "n_positions",
    "vocab_size",
    "window",
    "steps",
    "batch_tokens",
    "name",
    "out_dir",
}
LEFT |= {"init_from", "upcycle_noise", "wandb", "type", "repeat", "ns_steps", "histogram_every", "blocks"}
CHANGED = [
    (at, section, name, field)
    for at, section in GROUPS
    for name, field in section.model_fields.items()
    if at[:1] not in [("data",), ("parallel",)] and at[:2] != ("logging", "wandb") and name not in LEFT
    if not sections(field.annotation)
]


@st.composite
def accepted_configs(draw: st.DrawFn, options: dict) -> Config:
    """Draw a small run with up to eight other options set to valid values."""
    tree = options | {"steps": 1, "schedule": {"type": "constant", "warmup_steps": 0}, "precision": "fp32"}
    model = tree["model"] = options["model"] | {"blocks": [{"mixer": {}, "ffn": {}}]}
    block = model["blocks"][0]
    for parent, name in ((block, "mixer"), (block, "ffn"), (tree, "optim")):
        kinds = [section for at, section in GROUPS if at[-1:] == (name,)]
        parent[name] = {"type": type_name(draw(st.sampled_from(kinds)))}
    for at, section, name, field in draw(st.lists(st.sampled_from(CHANGED), max_size=8, unique_by=lambda one: one[2])):
        node: Any = tree
        for key in at:
            node = node[key] if isinstance(node, list) else node.setdefault(key, {})
        candidates = [*VALUES, *((word, word) for word in get_args(field.annotation) if isinstance(word, str))]
        values = [value for _, value in candidates if is_valid(field.annotation, field.metadata, value)]
        values = [value for value in values if not isinstance(value, int) or value < 10**9]
        if node.get("type") == type_name(section) and values:
            node[name] = draw(st.sampled_from(values))
    try:
        return Config.model_validate(tree)
    except ValidationError:  # it violates a rule between options
        return assume(False)


@pytest.mark.parametrize("n", [5, pytest.param(25, marks=pytest.mark.soak)])
def test_an_accepted_config_trains_a_finite_step(options, tmp_path, n):
    @settings(FUZZ, max_examples=n)
    @given(data=st.data())
    def runs(data: st.DataObject) -> None:
        config = data.draw(accepted_configs(options(out_dir=str(tmp_path / f"{time.monotonic_ns()}"))))
        assert train(config) == 0, config
        (row,) = rows(Path(config.out_dir, config.name))
        assert math.isfinite(row["loss"]) and math.isfinite(row["grad_norm"])
        ran.append(config)

    ran: list[Config] = []
    runs()
    assert len(ran) >= n
