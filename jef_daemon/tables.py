"""Models of what people write into files: a number is not `true`, which Python takes for 1. Pure."""

from __future__ import annotations

import types
import typing
from collections.abc import Iterator
from typing import Any

from pydantic import BaseModel, ValidationInfo, field_validator
from pydantic_core import PydanticCustomError


class Table(BaseModel):
    """A table of a file. Texts are still taken for numbers: variables of the environment are nothing else."""

    @field_validator("*", mode="before")
    @classmethod
    def _numbers_are_numbers(cls, value: Any, info: ValidationInfo) -> Any:
        if isinstance(value, bool) or (
            isinstance(value, list) and any(isinstance(one, bool) for one in value)
        ):
            wanted = set(_types(cls.model_fields[str(info.field_name)].annotation))
            if wanted & {int, float} and bool not in wanted:
                kind = "a number" if float in wanted else "a whole number"
                raise PydanticCustomError("number_wanted", "Input should be {kind}", {"kind": kind})
        return value


def _types(annotation: Any) -> Iterator[Any]:
    """All that an annotation is made of."""
    if typing.get_origin(annotation) is typing.Annotated:
        yield from _types(typing.get_args(annotation)[0])
    elif typing.get_origin(annotation) in {typing.Union, types.UnionType, list}:
        for part in typing.get_args(annotation):
            yield from _types(part)
    else:
        yield annotation
