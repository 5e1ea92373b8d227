"""The building blocks of `config.py`: `option`, `Section`, `one_of`, `ListOf`, `PathText`."""

from collections.abc import Iterator
from typing import Annotated, Any, TypeVar, Union

from pydantic import AfterValidator, BaseModel, ConfigDict, Discriminator, Field, Tag, model_validator
from pydantic_core import PydanticCustomError

from training.files import expand_path

T = TypeVar("T")
MAX_FLOAT32 = 3.4e38
PathText = Annotated[str, AfterValidator(expand_path)]  # the config holds the expanded path
ListOf = Annotated[tuple[T, ...], Field(strict=False)]  # a list in YAML, a tuple in the config


def option(default: Any, doc: str, *, unit: str | None = None, **limits: Any) -> Any:
    """Declare an option: default, one-line help text, unit and limits (`ge`, `gt`, `le`, ...)."""
    return Field(default, description=doc, json_schema_extra={"unit": unit} if unit else None, **limits)


class Section(BaseModel):
    """A group of options: frozen; unknown keys and values of another type are errors."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)

    def rules(self) -> Iterator[tuple[str, str]]:
        """Yield (option of this section, problem) for each combination of values that is not allowed."""
        yield from ()

    def _size_rules(self) -> Iterator[tuple[str, str]]:
        """Yield a problem for each number that tensors cannot hold: torch raises errors of many kinds for them."""
        for name, value in self:
            if type(value) is int and value >= 2**63:
                yield name, f"{value:.3g} is more than an integer of 64 bits holds"
            elif type(value) is float and abs(value) > MAX_FLOAT32:
                yield name, f"{value:g} is more than a float32 holds"

    @model_validator(mode="after")
    def _check_rules(self) -> "Section":
        if problems := list(self._size_rules()) or list(self.rules()):
            text = "; ".join(f"{path}: {message}" for path, message in problems)
            raise PydanticCustomError("rules", "{text}", {"text": text, "problems": problems})
        return self


def one_of(*variants: type[Section]) -> Any:
    """Build a union: `type:` selects the variant; without `type`, it is the first."""
    names = [variant.model_fields["type"].default for variant in variants]

    def name_of(value: Any) -> Any:
        return value.get("type", names[0]) if isinstance(value, dict) else getattr(value, "type", None)

    tagged = tuple(Annotated[variant, Tag(name)] for variant, name in zip(variants, names, strict=True))
    return Annotated[Union[tagged], Discriminator(name_of)]  # noqa: UP007 (a tuple of types)
