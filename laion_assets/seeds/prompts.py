"""Prompts become unit vectors: one a line of a text file, cut into tokens as CLIP does."""

from __future__ import annotations

import codecs
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Encoding, Tokenizer

from laion_assets.io.arrays import Floats, Ids, unit_rows
from laion_assets.io.errors import InputError
from laion_assets.io.storage import first_line
from laion_assets.io.text import json_object
from laion_assets.seeds.model import NO_DIRECTION, Model
from laion_assets.seeds.model_folder import CONFIG, MODEL, TOKENIZER, TOKENIZER_CONFIG

PROMPTS_FILE = "prompts.txt"
COMMENT = "#"
CONTROL = re.compile(r"[\0-\x08\x0a-\x1f\x7f-\x9f]")
BATCH = 32
CLIP_CONTEXT = 77  # tokens
CLIP_PADDING = "<|endoftext|>"
MAX_CONTEXT = 1 << 16  # more stands for "no limit"


@dataclass(frozen=True, slots=True)
class Prompt:
    """A prompt.

    Attributes:
        line: of the file, from 1.
        text: without white space around it.

    """

    line: int
    text: str


@dataclass(frozen=True, slots=True)
class CutPrompt:
    """A prompt that is longer than the model reads.

    Attributes:
        line: of the file.
        tokens: that it has.
        read: tokens of them that the model reads.

    """

    line: int
    tokens: int
    read: int

    def __str__(self) -> str:
        return f"line {self.line} has {self.tokens:,} tokens, of which the model reads {self.read}"


@dataclass(frozen=True, eq=False)
class EmbeddedPrompts:
    """Prompts and their vectors.

    Attributes:
        vectors: (n, d) float32 rows of length 1.
        cut: those of which the model reads only the beginning.

    """

    vectors: Floats
    cut: tuple[CutPrompt, ...]


def read_prompts(data: bytes, name: str = PROMPTS_FILE) -> tuple[Prompt, ...]:
    """Read prompts: UTF-8, one a line; empty lines and those that start with "#" are left out.

    Args:
        data: the file.
        name: of the file, for people.

    Raises:
        InputError: it is not UTF-8, or a prompt holds a control character other than a tab.

    """
    if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        raise InputError(f"{name} is UTF-16: save it as UTF-8")
    data = data.removeprefix(codecs.BOM_UTF8)
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        line = len(re.split(rb"\r\n|\r|\n", data[: error.start]))
        raise InputError(
            f"{name} line {line} is not UTF-8 (byte {data[error.start]:#04x}): save the file as UTF-8"
        ) from error
    lines = enumerate(re.split(r"\r\n|\r|\n", text), 1)
    stripped = (Prompt(line, text.strip()) for line, text in lines)
    prompts = tuple(p for p in stripped if p.text and not p.text.startswith(COMMENT))
    for prompt in prompts:
        if control := CONTROL.search(prompt.text):
            raise InputError(
                f"{name} line {prompt.line} holds the control character U+{ord(control[0]):04X}: remove "
                "it, or save the file as UTF-8 if it is UTF-16"
            )
    return prompts


def embed_prompts(
    model: Model, prompts: Sequence[Prompt], *, batch: int = BATCH, name: str = PROMPTS_FILE
) -> EmbeddedPrompts:
    """Embed prompts.

    Args:
        model: that embeds.
        prompts: n of them.
        batch: that the model takes at a time.
        name: of the file that they are from, for people.

    Raises:
        InputError: the model knows no texts, or answers one with NaN, infinity or zeros.

    """
    tokens = PromptTokens(model)
    parts = [np.empty((0, model.dimension), np.float32)]
    cut: list[CutPrompt] = []
    for start in range(0, len(prompts), batch):
        some = prompts[start : start + batch]
        ids, mask, lengths = tokens.of([prompt.text for prompt in some])
        vectors, usable = unit_rows(model.text.embed_tokens(ids, mask))
        for prompt, length, is_usable in zip(some, lengths, usable, strict=True):
            if not is_usable:
                raise InputError(
                    f"{name} line {prompt.line} {NO_DIRECTION}: change it, or use another model"
                )
            if length > tokens.context_length:
                cut.append(CutPrompt(prompt.line, length, tokens.context_length))
        if vectors.shape[1] != model.dimension:
            raise InputError(
                f"the model {model.files.folder} gives texts {vectors.shape[1]} dimensions and images "
                f"{model.dimension}: use a text model and an image model that belong together",
                MODEL,
            )
        parts.append(vectors)
    return EmbeddedPrompts(np.concatenate(parts), tuple(cut))


class PromptTokens:
    """Cuts texts into the tokens that a model takes.

    Attributes:
        context_length: tokens of every row.

    """

    def __init__(self, model: Model) -> None:
        """Read the tokenizer of a model.

        Raises:
            InputError: the model knows no texts, or its tokenizer.json is missing or damaged.

        """
        fixed = model.text.context_length
        folder = model.files.folder
        if TOKENIZER not in model.files.names:
            raise InputError(
                f"the model {folder} has no {TOKENIZER}, which cuts prompts into tokens: copy it from "
                "where the model was published, or remove the prompts",
                MODEL,
            )
        try:
            self._tokenizer = Tokenizer.from_file(str(folder / TOKENIZER))
        except Exception as error:  # tokenizers raises plain Exception
            raise InputError(
                f"{folder / TOKENIZER} is damaged ({first_line(error)}): copy it again from where the "
                "model was published",
                MODEL,
            ) from error
        config = _json(folder / TOKENIZER_CONFIG)
        # Encode without truncation, so that cut prompts can be reported.
        truncation = self._tokenizer.truncation or {}
        self.context_length: int = fixed or _context_length(folder, config, truncation)
        self._padding = _padding(self._tokenizer, config)
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()

    def of(self, texts: Sequence[str]) -> tuple[Ids, Ids, list[int]]:
        """Return ids and mask, (n, context length) int64, and how many tokens each text has in full."""
        encoded = self._tokenizer.encode_batch(list(texts))
        ids = np.full((len(texts), self.context_length), self._padding, np.int64)
        mask = np.zeros_like(ids)
        for row, encoding in enumerate(encoded):
            kept = self._cut(encoding)
            ids[row, : len(kept)], mask[row, : len(kept)] = kept, 1
        return ids, mask, [len(encoding) for encoding in encoded]

    def _cut(self, encoding: Encoding) -> list[int]:
        """Cut as CLIP does: the token that ends a text stays."""
        ids: list[int] = encoding.ids
        if len(ids) <= self.context_length:
            return ids
        end = ids[-1:] if encoding.special_tokens_mask[-1] else []
        return ids[: self.context_length - len(end)] + end


def _context_length(folder: Path, config: Mapping[str, Any], truncation: Mapping[str, Any]) -> int:
    """Return the context length that the model's files declare, else CLIP's."""
    nested = _json(folder / CONFIG).get("text_config")
    text_config = nested if isinstance(nested, dict) else {}
    declared = (
        text_config.get("max_position_embeddings"),
        config.get("model_max_length"),
        truncation.get("max_length"),
    )
    lengths = (
        int(length) for length in declared if isinstance(length, int | float) and length <= MAX_CONTEXT
    )
    return next((length for length in lengths if length > 0), CLIP_CONTEXT)


def _padding(tokenizer: Tokenizer, config: Mapping[str, Any]) -> int:
    """Return the id of the token that fills a row up."""
    if tokenizer.padding:
        return int(tokenizer.padding["pad_id"])
    token = config.get("pad_token") or CLIP_PADDING
    text = token.get("content", "") if isinstance(token, dict) else str(token)
    return tokenizer.token_to_id(text) or 0


def _json(path: Path) -> dict[str, Any]:
    """Read an object that need not be there."""
    if not path.exists():
        return {}
    try:
        return json_object(path.read_bytes())
    except ValueError as error:
        raise InputError(
            f"{path} is not a JSON object ({error}): copy it again from where the model was published",
            MODEL,
        ) from error
