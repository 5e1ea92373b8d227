"""What options are made of: `option`, `Section`, `one_of`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any, Union

from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag, ValidationInfo, model_validator
from pydantic_core import PydanticCustomError


def option(default: Any, doc: str, *, unit: str | None = None, **limits: Any) -> Any:
    """One option: its default, what it does in a line, its unit, its limits (`ge`, `gt`, `le`, ...)."""
    return Field(default, description=doc, json_schema_extra={"unit": unit} if unit else None, **limits)


class Section(BaseModel):
    """A group of options: frozen, no unknown keys, no silent conversion of types."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)

    def rules(self) -> Iterator[tuple[str, str]]:
        """Yield (option below this section, what is wrong with it) for rules between options."""
        yield from ()

    @model_validator(mode="after")
    def _check_rules(self, info: ValidationInfo) -> Section:
        # Who passes a context runs `rules` afterwards: raised here, a section's would hide those of the sections above.
        if info.context is None and (problems := list(self.rules())):
            text = "; ".join(f"{path}: {message}" for path, message in problems)
            raise PydanticCustomError("rules", "{text}", {"text": text, "problems": problems})
        return self


def one_of(*variants: type[Section]) -> Any:
    """A union told apart by `type:`; where that is left out, the first variant is meant."""
    names = [variant.model_fields["type"].default for variant in variants]

    def name_of(value: Any) -> Any:
        return value.get("type", names[0]) if isinstance(value, dict) else getattr(value, "type", None)

    tagged = tuple(Annotated[variant, Tag(name)] for variant, name in zip(variants, names, strict=True))
    return Annotated[Union[tagged], Discriminator(name_of)]  # noqa: UP007 (a tuple of types)
