"""Compare the options of two runs by their meaning: which ones change what the run computes."""

from collections.abc import Set
from typing import Any

from training.config import CHANGEABLE_ON_RESUME, Config
from training.data.loader import Mixture
from training.options.schema import flatten_options
from training.weights.hf.architecture import pattern


def changed_options(old: Config | dict[str, Any], new: Config, ignored: Set[str] = frozenset()) -> dict[str, tuple]:
    """Return {option: (old value, new value)} of the options that differ, without those that a restart may change.

    `old` may be the plain options of another version. `ignored` are more options, or sections, that may differ.
    """
    before = dict(flatten_options(comparable(old) if isinstance(old, Config) else old))
    now, ignored = dict(flatten_options(comparable(new))), CHANGEABLE_ON_RESUME | ignored
    return {
        key: (before.get(key, "unset"), now.get(key, "unset"))
        for key in sorted(before.keys() | now.keys())
        if before.get(key) != now.get(key) and not any(f"{key}.".startswith(f"{option}.") for option in ignored)
    }


def comparable(config: Config) -> dict[str, Any]:
    """Return the options, so that options with the same meaning are equal."""
    config = config.resolved()
    options = config.model_dump(mode="json")
    options["model"]["blocks"] = pattern([b.model_dump(mode="json", exclude={"repeat"}) for b in config.model.layers()])
    if weights := [source.weight for source in config.data.sources if source.weight]:
        options["proportions of data.sources"] = Mixture(weights, config.seed).share.tolist()
    for source in options["data"]["sources"]:
        source.pop("weight")
    return options
