"""The building blocks of `config.py`: `option`, `Section`, `one_of`, `ListOf`, `PathText`, `Count`."""

from collections.abc import Iterator
from typing import Annotated, Any, ClassVar, NamedTuple, TypeVar, Union

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Discriminator, Field, Tag, model_validator
from pydantic_core import PydanticCustomError

from training.files import expand_path

T = TypeVar("T")
MAX_FLOAT32 = 3.4e38
PathText = Annotated[str, AfterValidator(expand_path)]  # the config holds the expanded path
ListOf = Annotated[tuple[T, ...], Field(strict=False)]  # a list in YAML, a tuple in the config


def _to_integer(value: Any) -> Any:
    return int(value) if isinstance(value, float) and value.is_integer() else value


Count = Annotated[int, BeforeValidator(_to_integer)]  # an integer that YAML may write as 1e9


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


class Alternatives(NamedTuple):
    """Options of a section, exactly one of which is set: the others are null or empty."""

    names: tuple[str, ...]
    default: Any = None  # of the first one, if none is set; None: one of them is required


class SectionWithAlternatives(Section):
    """A section in which some options exclude each other. Subclasses extend `alternatives`."""

    alternatives: ClassVar[tuple[Alternatives, ...]] = ()

    @classmethod
    def is_set(cls, name: str, value: Any) -> bool:
        """Return True if an alternative has a value: it is neither null nor, where a list belongs, an empty one."""
        return value is not None and not (cls.model_fields[name].default == () and value in ((), []))

    @model_validator(mode="before")
    @classmethod
    def _set_defaults(cls, values: Any) -> Any:
        for names, default in cls.alternatives if isinstance(values, dict) else ():
            if default is not None and not any(cls.is_set(name, values.get(name)) for name in names):
                values = {**values, names[0]: default}
        return values

    def rules(self) -> Iterator[tuple[str, str]]:
        for names, _ in self.alternatives:
            chosen = [name for name in names if self.is_set(name, getattr(self, name))]
            if len(chosen) > 1:
                yield chosen[1], f"{chosen[0]} is also set; set one of {', '.join(names)}"
            elif not chosen:
                yield names[0], f"missing, and it has no default; set it, or {' or '.join(names[1:])}"


def one_of(*variants: type[Section]) -> Any:
    """Build a union: `type:` selects the variant; without `type`, it is the first."""
    names = [variant.model_fields["type"].default for variant in variants]

    def name_of(value: Any) -> Any:
        return value.get("type", names[0]) if isinstance(value, dict) else getattr(value, "type", None)

    tagged = tuple(Annotated[variant, Tag(name)] for variant, name in zip(variants, names, strict=True))
    return Annotated[Union[tagged], Discriminator(name_of)]  # noqa: UP007 (a tuple of types)
