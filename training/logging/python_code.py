"""Whether a sample is Python: a line for the report of a run on source code."""

import codeop
from typing import Any


def parsed_line(data: dict[str, Any], samples: list[dict[str, str]]) -> str | None:
    """Return how many samples parse as Python; None if the run's `data` section has other text than source code."""
    if not all(is_source_code(source) for source in data["sources"]):
        return None
    n_parsed = sum(is_python(sample["prompt"] + sample["text"]) for sample in samples)
    return f"{n_parsed} of {len(samples)} parse as Python, up to their last whole line"


def is_source_code(source: dict[str, Any]) -> bool:
    """Return True for the standard library and for files that all end in .py."""
    return source["type"] == "stdlib" or all(path.endswith(".py") for path in source.get("paths") or [""])


def is_python(text: str) -> bool:
    """Return True if the whole lines of the text are Python that may go on. Compiles the text and runs nothing."""
    lines, _, _ = text.rpartition("\n")
    try:
        codeop.compile_command(lines + "\n", symbol="exec")  # None, and no error, for code that breaks off
    except (SyntaxError, ValueError, OverflowError, RecursionError, MemoryError):
        return False
    return True
