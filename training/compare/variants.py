"""The variants of a comparison: configurations, finished runs, values of `--vary`, dense twins."""

import glob
import hashlib
import itertools
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from training.config import CHANGEABLE_ON_RESUME, CheckpointConfig, Config, MoEConfig
from training.errors import UserError
from training.files import mkdir_durable, write_atomically, write_errors_as_user_errors
from training.options import cli
from training.options.schema import flatten_options
from training.options.yaml import read_flag_value
from training.twin import twin

MAX_NAME = 80  # characters of a variant in the name of a folder
STORE = "compare_variants"  # folder of the variants' configurations: not where a user keeps files
PLAIN_LABEL = re.compile(r"[\w.+=-]+(, [\w.+=-]+)*", re.ASCII)  # becomes a name that no other one becomes
# Options that change neither a run's final model nor the figures that it is compared by.
NEUTRAL = (
    "seed",
    *(CHANGEABLE_ON_RESUME - {"eval", "checkpoint"}),
    *(f"checkpoint.{name}" for name in CheckpointConfig.model_fields if name != "final"),
    *(f"eval.{name}" for name in ("prompts", "sample_tokens", "temperature", "top_k")),
)


@dataclass(frozen=True)
class Variant:
    """A configuration that is compared with others, over several seeds."""

    label: str  # in the table
    config: Config  # `seed`, `name` and `out_dir` are replaced for each run
    finished: Mapping[int, Path] = field(default_factory=dict)  # folders of finished runs by seed
    is_trained: bool = True  # False: only its finished runs are compared

    @property
    def name(self) -> str:
        """The label as part of the name of a file or run."""
        name = re.sub(r"[^A-Za-z0-9.-]+", "_", self.label).lstrip("._-") or "unnamed"
        if len(name) <= MAX_NAME and PLAIN_LABEL.fullmatch(self.label.removesuffix(", dense twin")):
            return name
        return f"{name[: MAX_NAME - 9].rstrip('_')}-{hashlib.sha256(self.label.encode()).hexdigest()[:8]}"

    def folder(self, comparison: Path, seed: int) -> Path:
        """Return the folder of a run."""
        return self.finished.get(seed, comparison / f"{self.name}-seed-{seed}")

    def with_steps(self, steps: int) -> "Variant":
        return replace(self, config=self.config.with_steps(steps))


def read_settings(words: list[str]) -> dict[str, str]:
    """Return `--option VALUE` words as {option: YAML text}. Raises UserError."""
    values, lines = cli.split_flags(words, {})
    if lines:
        raise UserError(lines[0])
    return {flag[2:]: value for flag, value in values.items()}


def build_variants(
    paths: Sequence[str], settings: Mapping[str, str], vary: Sequence[str], *, with_twins: bool, train_runs: bool
) -> list[Variant]:
    """Return the variants in the order of `paths`. Raises UserError.

    `train_runs`: train more seeds of finished runs, too.
    """
    values = [read_values(text) for text in vary]
    check_distinct([*settings, *(of_option[0][0] for of_option in values)])
    variants: list[Variant] = []
    for path in paths:
        if Path(path).is_dir():
            if settings or vary or with_twins:
                raise UserError(f"{path}: a finished run has its options; give its config.yaml to train with others")
            add_run(variants, Path(path), is_trained=train_runs)
            continue
        for choice in itertools.product(*values):
            config = cli.load_config(path, {**settings, **dict(choice)})
            labels = [f"{option.rpartition('.')[2]}={text}" for option, text in choice]
            if not labels or len(paths) > 1:
                labels.insert(0, config.name)
            label = ", ".join(labels)
            variants.append(Variant(label, config))
            if with_twins and any(isinstance(block.ffn, MoEConfig) for block in config.model.blocks):
                variants.append(Variant(f"{label}, dense twin", twin(config)))
    check_variants(variants, with_twins)
    return variants


def read_values(text: str) -> list[tuple[str, str]]:
    """Return (option, YAML text) for each value of a `--vary`. Raises UserError."""
    option, _, values = text.partition("=")
    node = read_flag_value(f"[{values}]", f"--vary {option}")
    if node.syntax_error or not isinstance(node.value, list) or not node.value:
        raise UserError(f"--vary {text}: not OPTION=VALUE,VALUE as in optim.learning_rate=1e-3,2e-3")
    if option == "seed":
        raise UserError("--vary seed: use --seeds")
    texts = [json.dumps(child.plain()) if child.text is None else child.text for child in node.value]
    if len({json.dumps(child.plain()) for child in node.value}) < len(texts):
        raise UserError(f"--vary {text}: a value is there twice")
    return [(option, each) for each in texts]


def check_distinct(options: Sequence[str]) -> None:
    """Raise UserError if an option is set twice, by itself or by a section around it."""
    for one, other in itertools.combinations(options, 2):
        short, long = sorted((one, other), key=len)
        if f"{long}.".startswith(f"{short}."):
            raise UserError(f"--vary {other}: {one} is also set, and one would replace the other")


def add_run(variants: list[Variant], folder: Path, *, is_trained: bool) -> None:
    """Add a finished run: to the variant that differs from it by the seed alone, else as a new one."""
    if not (folder / "summary.json").is_file() or not (folder / "config.yaml").is_file():
        raise UserError(f"{folder}: no finished run, which has a summary.json; finish it with training.train")
    config = cli.load_config(folder / "config.yaml")
    for i, variant in enumerate(variants):
        if variant.finished and not differing_options([variant.config, config]):
            if config.seed in variant.finished:
                if differing_options([variant.config, config], ("name", "out_dir")):
                    continue  # as with another kernel: a variant of its own
                raise UserError(f"{folder}: the same options and seed as {variant.finished[config.seed]}")
            variants[i] = replace(variant, finished={**variant.finished, config.seed: folder})
            return
    is_taken = any(variant.label == config.name for variant in variants)
    variants.append(Variant(str(folder) if is_taken else config.name, config, {config.seed: folder}, is_trained))


def check_variants(variants: list[Variant], with_twins: bool) -> None:
    """Raise UserError if two variants have one name, if there is only one, or if they have different evaluations."""
    names = [variant.name for variant in variants]
    for name in names:
        if names.count(name) > 1:
            raise UserError(f"two configurations have the name {name}; give one of them another `name`")
    if len(variants) < 2:
        if len(variants[0].finished) > 1:
            raise UserError("these runs differ by their seed alone; name a second configuration")
        remedy = "it has no experts, so it has no dense twin" if with_twins else "add a second one, --vary or --twin"
        raise UserError(f"{names[0]} is the only configuration: {remedy}")
    for variant in variants[1:]:
        first, other = variants[0].config.eval.tokens, variant.config.eval.tokens
        if first != other:
            raise UserError(f"eval.tokens: {first} and {other}; losses over different text cannot be compared")


def comparison_folder(variants: list[Variant], vary: Sequence[str], out: str | None) -> Path:
    """Return the folder of a comparison: `out`, or one beside the first run, such as compare/a-by-learning_rate."""
    if out is not None:
        return Path(out)
    names = list(dict.fromkeys(variant.config.name for variant in variants))
    name = "-vs-".join(names)
    if len(name) > MAX_NAME:
        name = f"{names[0][: MAX_NAME // 2]}-and-{len(names) - 1}-more"
    options = [text.partition("=")[0].rpartition(".")[2] for text in vary]
    runs = next((folder.parent for folder in variants[0].finished.values()), Path(variants[0].config.out_dir))
    return Path(runs, "compare", "-by-".join([name, *options]))


def check_stored(variants: Sequence[Variant], folder: Path, *, with_steps: bool = True) -> None:
    """Raise UserError if the folder holds other options of a variant; `with_steps`: or another number of steps."""
    for variant in variants:
        path = folder / STORE / f"{variant.name}.yaml"
        if not path.is_file():
            for run in folder.glob(f"{glob.escape(variant.name)}-seed-*/metrics.jsonl"):
                raise UserError(f"{run.parent}: a run that this comparison did not train; choose another --out")
            continue
        stored = cli.load_config(path)
        if not with_steps:  # on which a schedule that is resolved depends
            stored = stored.with_steps(variant.config.steps)
        if changes := differing_options([stored, variant.config]):
            lines = "; ".join(f"{option}: {old} -> {new}" for option, (old, new) in changes.items())
            raise UserError(f"{path}: this comparison began with other options: {lines}; choose another --out")


def store_variants(variants: Sequence[Variant], folder: Path) -> None:
    """Write the configuration of each variant. Raises UserError if the folder holds other options of one."""
    check_stored(variants, folder)
    with write_errors_as_user_errors(folder):
        mkdir_durable(folder / STORE)
    for variant in variants:
        write_atomically(folder / STORE / f"{variant.name}.yaml", cli.dump_config(variant.config))


def differing_options(configs: Iterable[Config], ignored: Iterable[str] = NEUTRAL) -> dict[str, list[Any]]:
    """Return the options that differ, with each config's value: "" for an option that only other configs have.

    The `ignored` options and sections are left out.
    """
    flat = [dict(flatten_options(config.resolved().model_dump(mode="json"))) for config in configs]
    options = dict.fromkeys(option for each in flat for option in each)
    rows = {option: [each.get(option, "") for each in flat] for option in options}
    return {
        option: values
        for option, values in rows.items()
        if any(value != values[0] for value in values)
        and not any(f"{option}.".startswith(f"{name}.") for name in ignored)
    }
