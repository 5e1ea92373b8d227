"""Configs from YAML and the command line, and one error line for each wrong option."""

import json
import re
import subprocess
import sys
import time
from pathlib import Path
from types import NoneType
from typing import Annotated, Literal, get_args, get_origin

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from training.config import Config, FileTokenizer, MoEConfig, MuonConfig
from training.files import expand_path
from training.options.cli import ConfigErrors, dump_config, load_config, parse_command_line
from training.options.schema import all_groups, is_list, sections
from training.options.yaml import MAX_BYTES
from training.terminal import printable

DATA = "data: {sources: [{type: stdlib}]}\n"
COMMAND = (
    "import sys; from training.options.cli import parse_command_line\n"
    "parse_command_line(sys.argv[1:], prog='train', doc='Train.', flags={'--resume': 'x'})\n"
    "print('torch' in sys.modules)"
)


@pytest.fixture
def write(tmp_path, monkeypatch):
    """Return a function that writes my.yaml, with the text and a data source, into the working directory."""
    monkeypatch.chdir(tmp_path)

    def write(text: str | bytes, data: str = DATA) -> str:
        Path("my.yaml").write_bytes(text if isinstance(text, bytes) else (text + data).encode())
        return "my.yaml"

    return write


def errors(path: str | Path | None, **overrides: str) -> list[str]:
    with pytest.raises(ConfigErrors) as caught:
        load_config(path, {name.replace("__", "."): value for name, value in overrides.items()})
    return caught.value.lines


# --- reading ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "value"),
    [("3e-4", 3e-4), ("1e-4", 1e-4), ("1", 1.0), (".5", 0.5), ("010", 10.0), ("1E2", 100.0), ("0x10", 16.0)],
)
def test_numbers_are_those_of_yaml_1_2(write, text, value):
    assert load_config(write(f"optim: {{learning_rate: {text}}}\n")).optim.learning_rate == value
    assert load_config(write(""), {"optim.learning_rate": text}).optim.learning_rate == value


@pytest.mark.parametrize("text", ["no", "on", "12:30:45", "2001-01-01", "<<", "=", "1e-x", "-_", "a b"])
def test_values_that_only_older_yaml_converts_are_text(write, text):
    assert load_config(write(f"eval: {{prompts: [{text}]}}\n")).eval.prompts == (text,)


@pytest.mark.parametrize("text", [".inf", "-.inf", ".nan", "1e400", "true", "'1'", "null", "[1]", "x", "9" * 5000])
def test_only_finite_numbers_are_numbers(write, text):
    (line,) = errors(write(f"optim:\n  learning_rate: {text}\n"))
    assert re.fullmatch(r"my.yaml:2: optim.learning_rate: .+ is not (finite: )?a number > 0", line)


@pytest.mark.parametrize(
    "text", ["010", "123", "1e-4", "true", ".inf", "12:30:45", "null", "a #b", "a: b", "*x", "[a", "%"]
)
def test_a_text_option_takes_its_flag_literally(write, text):
    config = load_config(
        write("data: {sources: [{type: stdlib}], tokenizer: {type: file}}\n", ""), {"data.tokenizer.path": text}
    )
    assert config.data.tokenizer == FileTokenizer(path=text)


def test_text_in_a_flag_may_be_quoted_and_nested(write):
    overrides = {"name": "'123'", "eval.prompts": "[010, 'a', \"def \"]", "logging.wandb.entity": "null"}
    config = load_config(write(""), overrides)
    assert (config.name, config.eval.prompts, config.logging.wandb.entity) == ("123", ("010", "a", "def "), None)


@pytest.mark.parametrize(
    "text", [b"\xef\xbb\xbfsteps: 200\n", b"steps: 200\r\n", b"--- # run\nsteps: 200\n...\n", b"{steps: 200}"]
)
def test_byte_order_mark_line_ends_and_document_marks_are_fine(write, text):
    assert load_config(write(text), {"data.sources": "[{type: stdlib}]"}).steps == 200


# --- merging ---------------------------------------------------------------------------------------


def test_flags_are_merged_into_the_file(write):
    path = write(
        "steps: 500\nmodel:\n  n_layer: 4\n  blocks:\n  - {}\n  - ffn: {type: moe, n_experts: 4}\noptim: {beta1: 0.8}\n"
    )
    config = load_config(path, {"model.blocks.1.ffn.n_experts": "16", "optim.type": "muon", "model": "{n_embd: 96}"})
    assert config.model.blocks[1].ffn == MoEConfig(n_experts=16)
    assert config.optim == MuonConfig(beta1=0.8)
    assert (config.steps, config.model.n_layer, config.model.n_embd) == (500, 4, 96)


def test_a_section_is_set_before_its_options_in_any_order_of_flags(write):
    overrides = {"model.blocks.0.ffn.n_experts": "16", "model.blocks": "[{ffn: {type: moe, n_experts: 4}}]"}
    assert load_config(write(""), overrides).model.blocks[0].ffn.n_experts == 16


def test_a_mapping_with_a_type_replaces_the_files_section(write):
    path = write("data: {sources: [{type: stdlib}], tokenizer: {path: x, type: file}}\n", "")
    assert load_config(path, {"data.tokenizer": "{type: byte}"}).data.tokenizer.type == "byte"
    (line,) = errors(path, data__tokenizer="{type: file}")
    assert line.startswith("--data.tokenizer: data.tokenizer.path: missing")


def test_flags_reach_into_defaults(write):
    path = write("logging: {wandb: null}\n")
    config = load_config(path, {"model.blocks.0.ffn.type": "moe", "logging.wandb.project": "x"})
    assert (config.model.blocks[0].ffn.type, config.logging.wandb.project) == ("moe", "x")


# --- one line for each error -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("optim:\n  learning_rte: 1", "2: optim.learning_rte: unknown option; did you mean 'optim.learning_rate'?"),
        (
            "optim.learning_rate: 1",
            "1: optim.learning_rate: unknown option; nest it: `learning_rate:` indented below `optim:`",
        ),
        ("learning_rate: 1", "1: learning_rate: unknown option; did you mean 'optim.learning_rate'?"),
        (
            "eval: {xyz: 1}",
            "1: eval.xyz: unknown option; eval has every, tokens, best, patience, tasks, tasks_every, prompts, sample_tokens, temperature, top_k",  # noqa: E501
        ),
        ("steps: 2.5", "1: steps: 2.5 is not an integer >= 1 or null"),
        ("seed: 5e5", "1: seed: 5e5 is not an integer >= 0 and < 4294967296; write 500000"),
        ("seed: true", "1: seed: true is not an integer >= 0 and < 4294967296"),
        ("seed: -1", "1: seed: -1 is not an integer >= 0 and < 4294967296"),
        ("checkpoint: {every: 0}", "1: checkpoint.every: 0 is not an integer >= 1 or null"),
        ("parallel:\n  compile: 1", "2: parallel.compile: 1 is not true or false"),
        ("precision: bf61", "1: precision: 'bf61' is not one of auto, bf16, fp16, fp32; did you mean 'bf16'?"),
        ("name: 010", "1: name: 010 is not text matching ^[A-Za-z0-9][A-Za-z0-9._-]*$; quote it: '010'"),
        ("name: null", "1: name: null is not text matching ^[A-Za-z0-9][A-Za-z0-9._-]*$"),
        ('name: "a\\n\\x1b[1m"', r"1: name: 'a\n\x1b[1m' is not text matching ^[A-Za-z0-9][A-Za-z0-9._-]*$"),
        ('"a\\nb": 1', r"1: a\nb: unknown option; a run has name, out_dir, "),
        ("out_dir: ''", "1: out_dir: '' is not text that is not empty"),
        ("eval: {prompts: x}", "1: eval.prompts: 'x' is not a list: [first, second]"),
        ("eval: {prompts: [x, 1]}", "1: eval.prompts.1: 1 is not text; quote it: '1'"),
        ("model:", "1: model: null is not a section: write its options indented below it"),
        ("model: 3", "1: model: 3 is not a section: write its options indented below it"),
        ("optim: [1]", "1: optim: a list is not a section: write its options indented below it"),
        ("model:\n  blocks: []", "2: model.blocks: [] is not a list with an entry: [{...}, {...}]"),
        (
            "model:\n  blocks:\n  - {}\n  - ffn: {type: mop}",
            "4: model.blocks.1.ffn.type: 'mop' is not one of mlp, moe; did you mean 'moe'?",
        ),
        ("optim: {type: null}", "1: optim.type: null is not one of adamw, muon"),
        ("optim: {type: [a]}", "1: optim.type: a list is not one of adamw, muon"),
        (
            "model: {blocks: [{ffn: {n_experts: 4}}]}",
            "1: model.blocks.0.ffn.n_experts: unknown option of type mlp; type moe has it",
        ),
        (
            "schedule:\n  type: wsd",
            "1: schedule.decay_steps: missing, and it has no default; set it, or decay",
        ),
        ("model:\n  n_head: 7", "2: model.n_head: 7 heads do not divide n_embd 768"),
        ("model: {blocks: [{ffn: {type: moe, top_k: 9}}]}", "1: model.blocks.0.ffn.top_k: 9 is more than n_experts 8"),
        ("batch_tokens: 0x" + "f" * 5000, "1: batch_tokens: '0xffffffffffffffffffff"),
        ("seed: 1\nseed: 2", "2: seed: given twice, first on line 1"),
        ("seed: &a 1", "1: seed: no anchors here (&a): remove it, or quote the value"),
        ("seed: *a", "1: seed: no aliases here (*a): write the value out, or quote it"),
        (
            "seed: !!python/name:os.system x",
            "1: seed: no tags here (tag:yaml.org,2002:python/name:os.system): remove it",
        ),
    ],
)
def test_one_wrong_option_is_one_line(write, text, line):
    (error,) = errors(write(text + "\n"))
    assert error.startswith(f"my.yaml:{line}")


@pytest.mark.parametrize(
    ("text", "line"),
    [
        (b"", ": data.sources: missing, and it has no default"),
        (b"# nothing\n", ": data.sources: missing, and it has no default"),
        (b"data:\n  tokenizer: {type: byte}\n", ":1: data.sources: missing, and it has no default"),
        (b"- 1\n- 2\n", ":1: not a mapping of options"),
        (b"steps\n", ":1: not a mapping of options"),
        (b"a: 1\n\tb: 2\n", ":2: not YAML: a tab; indent with spaces"),
        (b"a: [1,\n\nb: 2\n", ":4: not YAML: "),
        (b"a: 'x\n", ":2: not YAML: "),
        (b"a: 1\nb: \x00\n", ":2: character 0x00 is not allowed in YAML"),
        (b"\x80\x02}q\x00.", ": not UTF-8 text (byte 0)"),
        (b"a: 1\n---\nb: 2\n", ":2: a second document; a config is one"),
        (b"%YAML 1.1\n---\na: 010\n", ":2: no % directives here: a config is YAML 1.2"),
        (b"? [a]\n: 1\n", ":1: a key has to be a word"),
        (b"[" * 20_000, ":1: nested more than 12 deep"),
        (b"{a: " * 5_000, ":1: nested more than 12 deep"),
        (b"- " * 10_000, ":1: nested more than 12 deep"),
        (b"x" * 10_000_000, f": longer than {MAX_BYTES} bytes, which no config is"),
    ],
)
def test_a_file_that_is_not_a_config_is_one_line_within_a_second(write, text, line):
    path, start = write(text), time.process_time()
    (error,) = errors(path)
    assert error.startswith(f"my.yaml{line}")
    assert time.process_time() - start < 1


def test_thousands_of_errors_are_truncated(write):
    start = time.process_time()
    assert len(errors(write("".join(f"k{n}:\n" for n in range(4000))))) == 51
    assert len(errors(write("a: 1\n" * 5000))) == 51
    assert time.process_time() - start < 2


def test_an_unreadable_path_is_one_line(tmp_path):
    assert errors("nope.yaml") == ["nope.yaml: no such file"]
    assert errors(tmp_path) == [f"{tmp_path}: a folder; give the YAML file"]
    assert errors("a\0b") == [r"a\x00b: cannot be read: embedded null byte"]
    assert errors("x" * 5000)[0].endswith("File name too long")


def test_a_flags_error_names_the_flag(write):
    path = write("model: {n_embd: 96}\n")
    assert errors(path, optim__learning_rte="1") == [
        "--optim.learning_rte: unknown option; did you mean 'optim.learning_rate'?"
    ]
    assert errors(path, optm__learning_rate="1")[0].endswith("did you mean 'optim.learning_rate'?")
    assert errors(path, steps="x") == ["--steps: 'x' is not an integer >= 1 or null"]
    assert errors(path, model__n_head="7") == ["--model.n_head: 7 heads do not divide n_embd 96"]
    assert errors(path, model__n_layer__x="7") == ["--model.n_layer.x: unknown option; model.n_layer has none below it"]
    assert errors(path, model__blocks="[{ffn: {typ: moe}}]") == [
        "--model.blocks: model.blocks.0.ffn.typ: unknown option; did you mean 'model.blocks.0.ffn.type'?"
    ]
    assert errors(path, eval__prompts="[a]", eval__prompts__0__1="b") == [
        "--eval.prompts.0.1: unknown option; eval.prompts.0 has none below it"
    ]
    assert errors(path, steps="&a 300") == ["--steps: no anchors here (&a): remove it, or quote the value"]
    assert errors(path, model__blocks="[{ffn: ")[0].startswith("--model.blocks: not YAML: ")
    assert errors(path, model__blocks__1__repeat="2") == [
        "--model.blocks.1.repeat: model.blocks has no entry '1': its length is 1, counted from 0"
    ]
    assert errors(path, model__blocks__ffn__type="moe") == [
        "--model.blocks.ffn.type: model.blocks has no entry 'ffn': its length is 1, counted from 0"
    ]


def origins(lines: list[str]) -> list[str]:
    """Return the place and option of each error line."""
    return [re.match(r"(?:my.yaml:)?([^:]+: )?[^:]+", line)[0] for line in lines]


def test_all_wrong_options_are_reported_at_once(write):
    path = write(
        "optim:\n  learning_rte: 3e-4\n  beta1: 2\nmodel:\n  n_head: 7\n  blocks:\n  - ffn: {type: moee}\n  - 3\n"
        "batch_tokens: 1000\nschedule: {type: wsd, warmup_steps: 5000}\nnam: x\n"
    )
    assert origins(errors(path, seed="x", stps="3")) == [
        "my.yaml:2: optim.learning_rte",
        "my.yaml:3: optim.beta1",
        "my.yaml:7: model.blocks.0.ffn.type",
        "my.yaml:8: model.blocks.1",
        "my.yaml:10: schedule.decay_steps",
        "my.yaml:11: nam",
        "--stps: unknown option; did you mean 'steps'?",
        "--seed: 'x' is not an integer >= 0 and < 4294967296",
    ]


def test_rules_between_options_are_checked_once_the_options_of_the_section_are_right(write):
    wrong = "eval: {every: 0}\nmodel: {n_head: 7}\nbatch_tokens: 1000\nupcycle_noise: 0.1\n"
    assert origins(errors(write(wrong))) == ["my.yaml:1: eval.every", "my.yaml:2: model.n_head"]
    fixed = wrong.replace("every: 0", "every: 1").replace("7", "4")
    assert origins(errors(write(fixed))) == ["my.yaml:3: batch_tokens", "my.yaml:4: upcycle_noise"]


def test_a_rule_is_not_checked_while_one_of_its_options_is_wrong(write):
    assert len(errors(write("batch_tokens: 1000\nmodel: {n_positions: x}\n"))) == 1
    assert len(errors(write("batch_tokens: 1000\nmodel: {n_position: 500}\n"))) == 1
    assert len(errors(write("steps: 50\nschedule: {warmup_step: 5}\n"))) == 1
    assert (
        len(errors(write("eval: {every: 0}\ndata: {sources: [{type: stdlib, weight: 1}, {type: stdlib}]}\n", ""))) == 2
    )


# --- the command -----------------------------------------------------------------------------------


def run(*argv: str, flags: dict[str, str] | None = None):
    return parse_command_line(
        list(argv), prog="train", doc="Train.", flags=flags or {"--resume": "auto | never | PATH"}
    )


def test_a_command_line_gives_the_config_and_the_commands_own_flags(write):
    config, flags = run("--config", write(""), "--steps=200", "--optim.learning_rate", "3e-4", "--resume", "never")
    assert (config.steps, config.optim.learning_rate, flags) == (200, 3e-4, {"--resume": "never"})
    assert run("--config=my.yaml")[1] == {"--resume": None}


@pytest.mark.parametrize(
    ("argv", "line"),
    [
        ([], "--config: missing; give the run's YAML file, as in --config configs/quickstart.yaml"),
        (["--config"], "--config: a value is missing: --config VALUE"),
        (["--config", "my.yaml", "--steps"], "--steps: a value is missing: --steps VALUE"),
        (
            ["--config", "my.yaml", "--parallel.compile", "--steps=200"],
            "--parallel.compile: a value is missing: --parallel.compile VALUE",
        ),
        (["--config", "my.yaml", "--steps", "5", "--steps=200"], "--steps: given twice"),
        (["--config", "my.yaml", "x\ny"], r"x\ny: not a flag; options are written --section.option VALUE"),
        (["--config", "my.yaml", "--resum", "x"], "--resum: unknown option; did you mean '--resume'?"),
        (["--config", "my.yaml", "--print-config=1"], "--print-config: takes no value"),
        (["--config", "my.yaml", "--", "x"], "--: unknown option; a run has name, "),
    ],
)
def test_a_wrong_command_line_is_one_line_and_status_2(write, capsys, argv, line):
    write("")
    with pytest.raises(SystemExit) as stop:
        run(*argv)
    output = capsys.readouterr()
    assert stop.value.code == 2
    assert output.out == ""
    assert output.err.startswith(f"error: {line}")
    assert output.err.count("\n") == 1


def test_errors_of_the_command_line_and_of_the_file_are_printed_together(write, capsys):
    with pytest.raises(SystemExit):
        run("x", "--config", write("stps: 3\n"), "--seed=x")
    assert [line.split(": ")[1] for line in capsys.readouterr().err.splitlines()] == ["x", "my.yaml:1", "--seed"]


@pytest.mark.parametrize("columns", ["40", "80", "120", "300"])
def test_help_lists_every_option_with_default_unit_and_description(columns, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", columns)
    with pytest.raises(SystemExit) as stop:
        run("--steps", "--help")
    text = capsys.readouterr().out
    words = " ".join(text.split())
    assert stop.value.code == 0
    assert max(map(len, text.splitlines())) <= max(80, min(int(columns), 120))
    for group in all_groups():
        for name, field in group.section.model_fields.items():
            at = ".".join([*group.path, name]).replace("val_sources.N", "sources.N")
            assert name == "type" or (sections(field.annotation) and at in words) or f"--{at} " in words
            assert name == "type" or field.description.replace(" ", "") in "".join(words.split())
    assert "--model.n_layer 12 blocks [layers]" in words
    assert "type: moe. Mixture of experts" in words
    assert "--resume auto | never | PATH" in words


def test_print_config_prints_yaml_that_loads_back(write, capsys, tmp_path):
    path = write("model: {blocks: [{ffn: {type: moe}}]}\n")
    argv = ["--config", path, "--optim.learning_rate", "3e-4", "--eval.prompts", '["def ", "010", "no"]']
    with pytest.raises(SystemExit) as stop:
        run(*argv, "--print-config")
    (tmp_path / "printed.yaml").write_text(capsys.readouterr().out)
    assert stop.value.code == 0
    assert re.findall(r"^\w+", (tmp_path / "printed.yaml").read_text(), re.MULTILINE) == list(Config.model_fields)
    assert load_config(tmp_path / "printed.yaml") == run(*argv)[0]


@pytest.mark.parametrize("argv", [["--help"], ["--config", "my.yaml"], ["--config", "wrong.yaml", "--steps", "x"]])
def test_the_process_ends_at_once_without_torch_or_files(write, tmp_path, argv):
    write("")
    Path("wrong.yaml").write_text("a: 1\nb: 2\n")
    before, start = set(tmp_path.rglob("*")), time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-c", COMMAND, *argv], capture_output=True, text=True, timeout=20, check=False
    )
    assert time.perf_counter() - start < 2  # 0.2 s on an idle machine
    assert set(tmp_path.rglob("*")) == before
    assert (done.returncode, done.stderr.count("\n")) == ((2, 4) if "x" in argv else (0, 0))
    assert all(line.startswith("error: ") for line in done.stderr.splitlines())
    assert argv[0] != "--config" or "x" in argv or done.stdout == "False\n"


def test_help_survives_a_closed_pager():
    process = subprocess.Popen(
        [sys.executable, "-c", COMMAND, "--help"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    process.stdout.close()
    assert process.stderr.read() == ""
    process.stderr.close()
    assert process.wait(20) == 0


def test_wrong_input_is_reported_before_torch_is_imported(write):
    code = "import sys\ntry:\n exec(sys.argv.pop(1))\nexcept SystemExit:\n print('torch' in sys.modules)"
    argv = [sys.executable, "-c", code, COMMAND, "--config", write("a: 1\n")]
    assert subprocess.run(argv, capture_output=True, text=True, timeout=20, check=True).stdout == "False\n"


# --- random input ---------------------------------------------------------------------------------

NAMES = sorted(
    {key for group in all_groups() for key in (*group.path, *group.section.model_fields)} | {"0", "1", "moo", "é\n"}
)
SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-2, 2000),
    st.floats(),
    st.text(max_size=5),
    st.integers(),
    st.sampled_from(["moe", "mlp", "adamw", "muon", "wsd", "stdlib", "files", "rope", "fp16", "010", "1e-4", "switch"]),
)
TREES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(NAMES), inner, max_size=4),
    max_leaves=8,
)
PLAIN = {
    bool: st.booleans(),
    int: st.integers(1, 9),
    float: st.floats(0.1, 0.9),
    str: st.just("x"),
    NoneType: st.none(),
}


def likely(annotation: object) -> st.SearchStrategy:
    """Return mostly valid values for an annotation."""
    if is_list(annotation):
        return st.lists(likely(get_args(annotation)[0]), min_size=1, max_size=2)
    if variants := sections(annotation):
        return st.one_of([likely_section(variant) for variant in variants])
    if get_origin(annotation) is Literal:
        return st.sampled_from(get_args(annotation))
    if get_origin(annotation) is Annotated:
        return likely(get_args(annotation)[0])
    return PLAIN[annotation] if annotation in PLAIN else st.one_of([likely(part) for part in get_args(annotation)])


def likely_section(section: type) -> st.SearchStrategy:
    options = {name: likely(field.annotation) for name, field in section.model_fields.items()}
    required = {name for name, field in section.model_fields.items() if name == "type" or field.is_required()}
    needed = {name: options.pop(name) for name in required}
    return st.fixed_dictionaries(needed, optional=options)


@st.composite
def configs(draw: st.DrawFn) -> dict:
    """Draw a config in which up to three options are overwritten with anything."""
    tree = draw(likely_section(Config)) | {"steps": 1000, "batch_tokens": 2520 * 1024}
    for _ in range(draw(st.integers(0, 3))):
        node, key = tree, draw(st.sampled_from([*tree, "moo"]))
        while isinstance(node.get(key), dict) and draw(st.booleans()):
            node = node[key]
            key = draw(st.sampled_from([*node, "moo"]))
        node[key] = draw(TREES)
    return tree


FUZZ = settings(
    max_examples=100, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


def load_or_check_lines(path: Path, overrides: dict[str, str] | None = None) -> Config | None:
    """Load a config. Returns it, or None if there are error lines that each name their origin."""
    try:
        return load_config(path, overrides)
    except ConfigErrors as error:
        lines = error.lines
    assert lines
    assert len(set(lines)) == len(lines)
    for line in lines:
        assert line == printable(line)
        assert len(line) < 1000
        assert re.match(rf"({re.escape(str(path))}(:\d+)?|--.*?): .", line)
    return None


@settings(FUZZ, max_examples=200)
@given(tree=configs())
def test_any_tree_is_a_config_or_lines(tmp_path, tree):
    path = tmp_path / "fuzz.yaml"
    path.write_bytes(json.dumps(tree).encode())
    config = load_or_check_lines(path)
    if config is not None:
        path.write_text(dump_config(config))
        assert load_config(path) == config


@FUZZ
@given(raw=st.binary(max_size=200) | st.text("ab:-[]{},&*!|>'\"#%@ \n\t?<=\\0.e", max_size=60).map(str.encode))
def test_any_bytes_are_a_config_or_lines(tmp_path, raw):
    path = tmp_path / "fuzz.yaml"
    path.write_bytes(raw)
    load_or_check_lines(path, {"data.sources": "[{type: stdlib}]"})


@FUZZ
@given(
    overrides=st.dictionaries(
        st.lists(st.sampled_from([*NAMES, "2", ""]), min_size=1, max_size=6).map(".".join)
        | st.sampled_from(
            ["model.blocks.0.ffn.type", "data.sources.0", "eval.prompts.0", "optim", "logging.wandb.mode"]
        )
        | st.text(max_size=5),
        st.text(max_size=8)
        | st.sampled_from(["moe", "{type: moe}", "[{}]", "[{ffn: {type: moe}}]", "null", "3", "[1, a]"]),
        max_size=5,
    )
)
def test_any_flags_are_a_config_or_lines(tmp_path, overrides):
    path = tmp_path / "my.yaml"
    path.write_text(DATA)
    load_or_check_lines(path, overrides)


@FUZZ
@given(
    prompts=st.lists(st.text(), max_size=3),
    rate=st.floats(1e-30, 1e30),
    name=st.from_regex(r"\A[A-Za-z0-9][A-Za-z0-9._-]*\Z"),
)
def test_a_dump_loads_back_to_an_equal_config(tmp_path, prompts, rate, name):
    path = tmp_path / "dump.yaml"
    tree = {
        "name": name,
        "data": {"sources": [{"type": "stdlib"}]},
        "eval": {"prompts": prompts},
        "optim": {"learning_rate": rate},
    }
    config = Config.model_validate(tree)
    path.write_text(dump_config(config), encoding="utf-8", newline="")
    assert load_config(path) == config


# --- paths -----------------------------------------------------------------------------------------

PATH_OPTIONS = {
    "out_dir": "{}", "init_from": "{}", "data.cache_dir": "{}", "data.tokenizer": "{{type: file, path: {}}}",
    "data.sources": "[{{paths: [{}]}}]", "data.val_sources": "[{{type: huggingface, name: {}}}]",
}  # fmt: skip
PATH_FLAGS = [
    ("train", ["--config"]), ("prepare", ["--config"]), ("plan", ["--config"]),
    ("train", ["--config", "my.yaml", "--resume"]), ("twin", ["--config", "my.yaml", "--out"]),
    ("evaluate", ["--run"]), ("evaluate", ["--run", "r", "--data", "a.txt"]), ("export", ["--run"]),
    ("export", ["--run", "r", "--out"]), ("generate", ["--run"]), ("generate", ["--run", "r", "--prompts"]),
    ("checkpoints", ["verify"]),
]  # fmt: skip
NO_PATHS = {
    "": "'' is empty; give a path",
    "$NO_SUCH/x": "'$NO_SUCH/x': the environment variable NO_SUCH is not set; set it, or write the path out",
    "a/${BLANK}": "'a/${BLANK}': the environment variable BLANK is not set; set it, or write the path out",
    "~nobody-here/x": "'~nobody-here/x': ~nobody-here is no user's home folder; write the path out, or "
    "./~nobody-here for a folder here",
    "runs ": "'runs ' begins or ends with white space, or has a NUL character; remove it",
    "runs\n": r"'runs\n' begins or ends with white space, or has a NUL character; remove it",
    "ru\0ns": r"'ru\x00ns' begins or ends with white space, or has a NUL character; remove it",
}


@pytest.mark.parametrize(
    ("text", "path"),
    [
        ("~/a", "HOME/a"),
        ("$TILDE/b", "HOME/a/b"),
        ("$HOME/a", "HOME/a"),
        ("a/${NAME}.b", "a/n.b"),
        ("a~/$", "a~/$"),
        ("./~x", "./~x"),
        ("a b/", "a b/"),
    ],
)
def test_the_rule_of_paths(monkeypatch, text, path):
    monkeypatch.setenv("HOME", "HOME")
    monkeypatch.setenv("NAME", "n")
    monkeypatch.setenv("TILDE", "~/a")
    assert expand_path(text) == path == expand_path(path)


@pytest.mark.parametrize("value", ["$NAME", "${NO_SUCH}/x", " x"])
def test_a_path_that_would_change_if_it_were_expanded_again_is_an_error(monkeypatch, value):
    monkeypatch.setenv("NAME", value)
    with pytest.raises(ValueError, match=r"^'\$NAME': becomes .*; write the path out$"):
        expand_path("$NAME")


@pytest.mark.parametrize("option", PATH_OPTIONS)
def test_every_path_option_follows_the_rule_and_the_dump_has_its_result(write, monkeypatch, tmp_path, option):
    monkeypatch.setenv("HOME", str(tmp_path))
    path = write("")
    config = load_config(path, {option: PATH_OPTIONS[option].format("$HOME/x")})
    assert config == load_config(path, {option: PATH_OPTIONS[option].format("~/x")})
    assert f"{tmp_path}/x" in dump_config(config)
    for text in ("$NO_SUCH/x", "~nobody-here/x"):
        (line,) = errors(path, **{option: PATH_OPTIONS[option].format(text)})
        assert line.endswith(f": {NO_PATHS[text]}")


@pytest.mark.parametrize(
    ("name", "arguments"), PATH_FLAGS, ids=lambda value: value if isinstance(value, str) else value[-1]
)
def test_every_path_flag_follows_the_rule(write, call, monkeypatch, name, arguments):
    write("")
    monkeypatch.setenv("BLANK", "")
    flag = "run" if name == "checkpoints" else next(word for word in reversed(arguments) if word.startswith("--"))
    for text, reason in NO_PATHS.items():
        done = call(name, *arguments, text)
        assert (done.returncode, done.stdout, done.stderr) == (2, "", f"error: {flag}: {reason}\n")
