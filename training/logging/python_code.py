"""Counts the samples that parse as Python, for the report of a run on source code."""

import ast
import codeop
import warnings
from typing import Any

# Stop at the tree: nothing is compiled. Report code that breaks off as "incomplete input", not as invalid.
FLAGS = ast.PyCF_ONLY_AST | codeop.PyCF_ALLOW_INCOMPLETE_INPUT


def parsed_line(data: dict[str, Any], samples: list[dict[str, str]]) -> str | None:
    """Return how many samples parse as Python; None if the run's `data` section has other text than source code."""
    if not all(is_source_code(source) for source in data["sources"]):
        return None
    n_parsed = sum(is_python(sample["prompt"] + sample["text"]) for sample in samples)
    return f"{n_parsed} of {len(samples)} parse as Python, up to their last whole line"


def is_source_code(source: dict[str, Any]) -> bool:
    """Return True for the standard library, and for files that all end in .py. A folder may hold other files."""
    is_files = source["type"] == "files" and all(path.endswith(".py") for path in source["paths"])
    return is_files or source["type"] == "stdlib"


def is_python(text: str) -> bool:
    """Return True if the whole lines of the text, at least one, are Python that may go on. Runs nothing."""
    lines, newline, _ = text.rpartition("\n")
    try:
        with warnings.catch_warnings(action="ignore"):  # such as those about invalid escapes
            compile(lines + newline, "<sample>", "exec", FLAGS)
    except SyntaxError as error:
        return "incomplete input" in str(error)
    except (ValueError, OverflowError, RecursionError, MemoryError):
        return False
    return newline != ""
