"""The record of the model that embedded an index: an optional `model.json` beside it."""

from __future__ import annotations

from dataclasses import dataclass

from laion_assets.io.errors import InputError
from laion_assets.io.text import json_object, printable

MODEL_RECORD = "model.json"


@dataclass(frozen=True)
class ModelRecord:
    """The model that embedded an index, as far as it is known.

    Attributes:
        name: name of the model, such as "openai/clip-vit-large-patch14".
        url: where the model is published in the layout of transformers.js.
        dimension: dimension of its vectors.

    """

    name: str | None = None
    url: str | None = None
    dimension: int | None = None

    def check(self, name: str | None, dimension: int) -> None:
        """Check that the model for the seeds is the model of the index.

        Args:
            name: name of the model for the seeds; None if its files do not record one.
            dimension: dimension of its vectors.

        Raises:
            InputError: the dimensions or the names differ.

        """
        remedy = f"use {printable(self.url or self.name or 'the model the index was made with')}"
        if self.dimension not in (None, dimension):
            raise InputError(
                f"the model{f' {name}' if name else ''} makes vectors of {dimension} dimensions, the "
                f"index has {self.dimension}: {remedy}",
                "model",
            )
        if self.name and name and self.name != name:
            raise InputError(
                f"the index was made with {printable(self.name)}, the model is {printable(name)}: "
                f"{remedy}",
                "model",
            )


def read_model_record(content: bytes, where: str) -> ModelRecord:
    """Read `model.json`.

    Args:
        content: content of the file.
        where: location of the file, for messages.

    Raises:
        InputError: the content is not a JSON object, or `name`, `url` or `dimension` has a wrong type.

    """
    try:
        fields = json_object(content)
    except ValueError as error:
        raise InputError(f"{where} is not a JSON object ({error}): correct or remove it") from error
    kinds = {"name": "a text", "url": "a text", "dimension": "a whole number above 0"}
    for field, kind in kinds.items():
        value = fields.get(field)
        whole = type(value) is int and value > 0
        if value is not None and not (whole if field == "dimension" else isinstance(value, str)):
            raise InputError(f"{where} has {field} {value!r}: give {kind}, or remove it")
    return ModelRecord(**{field: fields[field] for field in kinds if field in fields})
