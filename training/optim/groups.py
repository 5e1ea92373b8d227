"""Groups of parameters with options of their own (`optim.groups`): patterns over the names of parameters."""

import difflib
import re
from collections.abc import Iterable, Mapping
from fnmatch import fnmatchcase

import torch
from torch import nn

from training.config import OptimConfig, ParameterGroup
from training.errors import UserError

Groups = Mapping[str, ParameterGroup]  # by name of a parameter: the group that it is in; others are in none


def match_groups(config: OptimConfig, names: Iterable[str]) -> dict[str, ParameterGroup]:
    """Return the group of each parameter that is in one: the first whose pattern matches its name.

    Raises UserError for a pattern that matches no parameter or only those of earlier groups, and if all are frozen.
    """
    names, groups = list(names), {}
    for i, group in enumerate(config.groups):
        matched = [name for name in names if fnmatchcase(name, group.match)]
        if not matched:
            raise UserError(
                f"optim.groups.{i}.match: no parameter matches {group.match!r}; {_near(group.match, names)}"
            )
        new = [name for name in matched if name not in groups]
        if not new:
            earlier = ", ".join(dict.fromkeys(repr(groups[name].match) for name in matched))
            problem = f"earlier groups ({earlier}) have all that {group.match!r} matches, and the first one counts"
            raise UserError(f"optim.groups.{i}.match: {problem}; move it up, or remove it")
        groups |= dict.fromkeys(new, group)
    if len(frozen_names(groups)) == len(names):
        raise UserError("optim.groups: every parameter is frozen, so there is nothing to train; freeze fewer")
    return groups


def _near(pattern: str, names: list[str]) -> str:
    """Return the names that are most like a pattern, as text; the layers of one name are one pattern."""
    if fnmatchcase("head.weight", pattern):
        return "the output projection is wte.weight here (model.tie_head)"
    general = {re.sub(r"^blocks\.\d+\.", "blocks.*.", name) for name in names}
    # Also as patterns with as many parts as this one, so that `blcks.*` is near `blocks.*`.
    n_parts = pattern.count(".")
    beginnings = {".".join(parts[:n_parts]) for name in general if len(parts := name.split(".")) > n_parts + 1}
    patterns = {f"{beginning}.*" for beginning in beginnings if beginning and not beginning.endswith("*")}
    by_lower = {name.lower(): name for name in sorted(general | patterns)}
    nearest = difflib.get_close_matches(pattern.lower(), by_lower, n=3, cutoff=0)
    return f"the nearest names are {', '.join(by_lower[name] for name in nearest)}"


def frozen_names(groups: Groups) -> set[str]:
    """Return the names of the frozen parameters."""
    return {name for name, group in groups.items() if group.freeze}


def freeze(model: nn.Module, groups: Groups) -> None:
    """Turn off the gradients of the frozen parameters, before FSDP2 splits them."""
    frozen = frozen_names(groups)
    for name, parameter in model.named_parameters():
        if name in frozen:
            parameter.requires_grad_(False)


def split_param_groups(optimizer: torch.optim.Optimizer, group_of: Mapping[nn.Parameter, ParameterGroup]) -> None:
    """Move the parameters of each group into a `param_group` of their own, with the rate and decay that it sets.

    Everything else stays that of the `param_group` they came from. "match" is there if the group sets the rate.
    """
    for base in list(optimizer.param_groups):
        for group in dict.fromkeys(group_of[p] for p in base["params"] if p in group_of):
            own = base | {"params": [p for p in base["params"] if group_of.get(p) == group]}
            if group.learning_rate is not None:
                own |= {"lr": group.learning_rate, "match": group.match}
            if group.weight_decay is not None:
                own["weight_decay"] = group.weight_decay
            optimizer.param_groups.append(own)
        base["params"] = [p for p in base["params"] if p not in group_of]
