"""Small models in the layout of transformers.js."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer, normalizers, pre_tokenizers, processors
from tokenizers.models import BPE

from laion_assets.io import onnx_models
from laion_assets.io.onnx_models import FLOAT, INT64, Shape, node, value

KINDS = {kind: dtype for dtype, kind in onnx_models.TYPES.items()}
EDGE = 8  # pixels of the images that the small model takes
DIMENSION = 4
START, END = "<|startoftext|>", "<|endoftext|>"


def model(
    nodes: Sequence[bytes],
    constants: Mapping[str, np.ndarray[Any, Any]],
    inputs: Sequence[bytes],
    outputs: Sequence[bytes],
) -> bytes:
    return onnx_models.model(onnx_models.graph(nodes, inputs, outputs, constants))


def vision_model(
    *,
    takes: str = "pixel_values",
    gives: str = "image_embeds",
    shape: Shape = ("batch", 3, EDGE, EDGE),
    width: int | str = DIMENSION,
    kind: int = FLOAT,
    extra: Sequence[bytes] = (),
) -> bytes:
    """Every pixel times a constant: an image of zeros becomes a vector of zeros."""
    weights = np.random.default_rng(0).standard_normal((3 * EDGE * EDGE, DIMENSION)).astype(KINDS[kind])
    return model(
        [node("Flatten", [takes], "flat", axis=1), node("MatMul", ["flat", "weights"], gives)],
        {"weights": weights},
        [value(takes, kind, shape), *extra],
        [value(gives, kind, (shape[0], width))],
    )


def text_model(
    vocabulary: int, *, length: int | str = "tokens", mask: bool = False, dimension: int = DIMENSION
) -> bytes:
    """The mean of a vector for each token; with a mask, the sum over those that are no padding."""
    table = np.random.default_rng(1).standard_normal((vocabulary, dimension)).astype(np.float32)
    ids = value("input_ids", INT64, ("batch", length))
    gives = [value("text_embeds", FLOAT, ("batch", dimension))]
    found = node("Gather", ["table", "input_ids"], "found", axis=0)
    if not mask:
        mean = node("ReduceMean", ["found"], "text_embeds", axes=[1], keepdims=0)
        return model([found, mean], {"table": table}, [ids], gives)
    nodes = [
        found,
        node("Cast", ["attention_mask"], "weights", to=FLOAT),
        node("Unsqueeze", ["weights", "second"], "column"),
        node("Mul", ["found", "column"], "real"),
        node("ReduceSum", ["real", "first"], "text_embeds", keepdims=0),
    ]
    constants = {"table": table, "second": np.array([2]), "first": np.array([1])}
    return model(nodes, constants, [ids, value("attention_mask", INT64, ("batch", length))], gives)


PREPROCESSOR = {
    "image_processor_type": "CLIPImageProcessor",
    "size": {"height": EDGE, "width": EDGE},
    "do_center_crop": False,
    "image_mean": [0, 0, 0],
    "image_std": [1, 1, 1],
}


def clip_tokenizer() -> Tokenizer:
    """CLIP's rules with a vocabulary of single bytes, whole and at the end of words."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = [*letters, *(f"{letter}</w>" for letter in letters), START, END]
    bpe = BPE({word: i for i, word in enumerate(words)}, [], unk_token=END, end_of_word_suffix="</w>")
    made = Tokenizer(bpe)
    made.add_special_tokens([START, END])
    made.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])
    made.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.WhitespaceSplit(),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    start, end = made.token_to_id(START), made.token_to_id(END)
    made.post_processor = processors.RobertaProcessing((END, end), (START, start), False, False)
    return made


def write_model(
    folder: Path,
    *,
    vision: bytes | None = None,
    text: bytes | None = None,
    preprocessor: Mapping[str, Any] = PREPROCESSOR,
    tokenizer: bool = True,
) -> Path:
    """Write a model's folder; the image model is the small one by default, and texts are left out."""
    (folder / "onnx").mkdir(parents=True, exist_ok=True)
    (folder / "onnx" / "vision_model.onnx").write_bytes(vision_model() if vision is None else vision)
    (folder / "preprocessor_config.json").write_text(json.dumps(preprocessor))
    if text is not None:
        (folder / "onnx" / "text_model.onnx").write_bytes(text)
        if tokenizer:
            clip_tokenizer().save(str(folder / "tokenizer.json"))
    return folder
