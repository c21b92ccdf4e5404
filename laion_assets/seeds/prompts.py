"""Embed prompts, one per line of a text file, as unit vectors; they are tokenized as CLIP does."""

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
MAX_CONTEXT = 1 << 16  # larger values mean "no limit"


@dataclass(frozen=True, slots=True)
class Prompt:
    """A prompt.

    Attributes:
        line: line number in the file, from 1.
        text: the prompt without leading and trailing white space.

    """

    line: int
    text: str


@dataclass(frozen=True, slots=True)
class CutPrompt:
    """A prompt that is longer than the model reads.

    Attributes:
        line: line number in the file, from 1.
        tokens: number of tokens in the prompt.
        read: number of tokens that the model reads.

    """

    line: int
    tokens: int
    read: int

    def __str__(self) -> str:
        return f"line {self.line} has {self.tokens:,} tokens, but the model reads only {self.read}"


@dataclass(frozen=True, eq=False)
class EmbeddedPrompts:
    """Prompts and their vectors.

    Attributes:
        vectors: (n, d) float32 rows of length 1.
        cut: prompts that are longer than the model reads.

    """

    vectors: Floats
    cut: tuple[CutPrompt, ...]


def read_prompts(data: bytes, name: str = PROMPTS_FILE) -> tuple[Prompt, ...]:
    """Read prompts: UTF-8, one per line; empty lines and lines that start with "#" are skipped.

    Args:
        data: the file's content.
        name: the file's name in messages.

    Raises:
        InputError: the file is not UTF-8, or a prompt contains a control character other than a tab.

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
                f"{name} line {prompt.line} has the control character U+{ord(control[0]):04X}: remove "
                "it, or save the file as UTF-8 if it is UTF-16"
            )
    return prompts


def embed_prompts(
    model: Model, prompts: Sequence[Prompt], *, batch: int = BATCH, name: str = PROMPTS_FILE
) -> EmbeddedPrompts:
    """Embed prompts.

    Args:
        model: embeds the prompts.
        prompts: n prompts.
        batch: number of prompts per call of the model.
        name: the name of their file in messages.

    Raises:
        InputError: the model has no text model, or returns NaN, infinity or zeros for a prompt.

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
    """Tokenizes texts for a model.

    Attributes:
        context_length: number of tokens per row.

    """

    def __init__(self, model: Model) -> None:
        """Read the tokenizer of a model.

        Raises:
            InputError: the model has no text model, or its tokenizer.json is missing or damaged.

        """
        fixed = model.text.context_length
        folder = model.files.folder
        if TOKENIZER not in model.files.names:
            raise InputError(
                f"the model {folder} has no {TOKENIZER}, which tokenizes prompts: copy it from "
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
        # Encode without truncation, so that overlong prompts can be reported.
        truncation = self._tokenizer.truncation or {}
        self.context_length: int = fixed or _context_length(folder, config, truncation)
        self._padding = _padding(self._tokenizer, config)
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()

    def of(self, texts: Sequence[str]) -> tuple[Ids, Ids, list[int]]:
        """Return ids and mask, (n, context length) int64, and each text's full number of tokens."""
        encoded = self._tokenizer.encode_batch(list(texts))
        ids = np.full((len(texts), self.context_length), self._padding, np.int64)
        mask = np.zeros_like(ids)
        for row, encoding in enumerate(encoded):
            kept = self._cut(encoding)
            ids[row, : len(kept)], mask[row, : len(kept)] = kept, 1
        return ids, mask, [len(encoding) for encoding in encoded]

    def _cut(self, encoding: Encoding) -> list[int]:
        """Truncate as CLIP does: keep the token that ends a text."""
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
    """Return the id of the padding token."""
    if tokenizer.padding:
        return int(tokenizer.padding["pad_id"])
    token = config.get("pad_token") or CLIP_PADDING
    text = token.get("content", "") if isinstance(token, dict) else str(token)
    return tokenizer.token_to_id(text) or 0


def _json(path: Path) -> dict[str, Any]:
    """Read a JSON object; empty if the file does not exist."""
    if not path.exists():
        return {}
    try:
        return json_object(path.read_bytes())
    except ValueError as error:
        raise InputError(
            f"{path} is not a JSON object ({error}): copy it again from where the model was published",
            MODEL,
        ) from error
