"""Kinds of settings: numbers in a range, free text, and places of files."""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Union, get_args, get_origin

from pydantic import AfterValidator, BaseModel, Field
from pydantic.fields import FieldInfo

from qzo_diffusion import resources

Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NotNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
NoiseLevel = Annotated[float, Field(ge=0, le=1)]
Count = Annotated[int, Field(ge=1)]
Whole = Annotated[int, Field(ge=0)]
Seed = Annotated[int, Field(ge=0, lt=2**63)]


@dataclass(frozen=True)
class Free:
    """Marks text that is read by a model, so that every text is one; `null` is a word as well."""


@dataclass(frozen=True)
class Place:
    """Marks the path of a file or a folder.

    inside: whoever reads it knows where it begins, which is not always the current folder.
    may_be_name: a name that ships with the package, or a Hub id, may stand in its place.
    """

    inside: bool = False
    may_be_name: bool = False


def _unicode(text: str) -> str:
    """YAML leaves the two halves that JSON writes for one character apart; one half alone stands
    for no character, and no file can hold it.
    """
    try:
        return text.encode("utf-16", "surrogatepass").decode("utf-16")
    except UnicodeDecodeError:
        raise ValueError("text without half of a Unicode surrogate pair") from None


def _expanded(text: str) -> str:
    if not text.strip() or "\0" in text:
        raise ValueError("a path, or null for none")
    return resources.expand_home(_unicode(text))


OWN_NAMES = ("auto", "tiny")  # of models, though a folder may be called so

FreeText = Annotated[str, AfterValidator(_unicode), Free()]
PathText = Annotated[str, AfterValidator(_expanded), Place()]
PathOrName = Annotated[str, AfterValidator(_expanded), Place(may_be_name=True)]
PathInside = Annotated[str, AfterValidator(_expanded), Place(inside=True)]


def _parts(annotation: Any) -> Iterator[Any]:
    """The types that a setting may have, and the marks on them."""
    origin = get_origin(annotation)
    if origin is Annotated:
        base, *marks = get_args(annotation)
        yield from _parts(base)
        yield from marks
    elif origin in (Union, UnionType):
        for part in get_args(annotation):
            yield from _parts(part)
    else:
        yield annotation


def fields(model: type[BaseModel], prefix: str = "") -> dict[str, FieldInfo]:
    """Dotted key -> field, for all settings: `data.batch_size`, `train.lr`, ..."""
    found: dict[str, FieldInfo] = {}
    for name, field in model.model_fields.items():
        section = field.annotation
        if isinstance(section, type) and issubclass(section, BaseModel):
            found |= fields(section, f"{prefix}{name}.")
        else:
            found[prefix + name] = field
    return found


def parts(field: FieldInfo) -> list[Any]:
    return [*_parts(field.annotation), *field.metadata]


def is_text(field: FieldInfo) -> bool:
    return str in parts(field)


def may_be_none(field: FieldInfo) -> bool:
    return type(None) in parts(field)


def is_free(field: FieldInfo) -> bool:
    return any(isinstance(part, Free) for part in parts(field))


def place_of(field: FieldInfo) -> Place | None:
    return next((part for part in parts(field) if isinstance(part, Place)), None)


def absolute(text: str, place: Place) -> str:
    """The path from the root, where `text` is one; a name that is none of the current folder stays.

    The last part of a path is kept though it may be a link: where it leads to may have another
    ending.
    """
    path = Path(text)
    if place.may_be_name and text in OWN_NAMES:
        return text
    if place.inside or path.is_absolute() or (place.may_be_name and not path.exists()):
        return text
    if path.name in ("", ".."):
        return str(path.resolve())
    return os.fspath(path.parent.resolve() / path.name)
