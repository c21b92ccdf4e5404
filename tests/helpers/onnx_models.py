"""Small models in the layout of transformers.js, written as ONNX without a library for it."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer, normalizers, pre_tokenizers, processors
from tokenizers.models import BPE

FLOAT, INT64, FLOAT16 = 1, 7, 10
NUMPY = {FLOAT: np.float32, INT64: np.int64, FLOAT16: np.float16}
INT, INTS = 2, 7  # kinds of attributes
EDGE = 8  # pixels of the images that the small model takes
DIMENSION = 4
START, END = "<|startoftext|>", "<|endoftext|>"
Shape = Sequence[int | str]


def varint(number: int) -> bytes:
    made = bytearray()
    while number > 0x7F:
        made.append(number & 0x7F | 0x80)
        number >>= 7
    return bytes([*made, number])


def field(number: int, value: int | bytes | str) -> bytes:
    """A field of a protocol buffer."""
    if isinstance(value, int):
        return varint(number << 3) + varint(value)
    content = value.encode() if isinstance(value, str) else value
    return varint(number << 3 | 2) + varint(len(content)) + content


def argument(name: str, kind: int, shape: Shape) -> bytes:
    dims = [field(1, field(1, edge) if isinstance(edge, int) else field(2, edge)) for edge in shape]
    tensor = field(1, kind) + field(2, b"".join(dims))
    return field(1, name) + field(2, field(1, tensor))


def constant(name: str, values: np.ndarray[Any, Any]) -> bytes:
    (kind,) = (number for number, dtype in NUMPY.items() if dtype == values.dtype)
    dims = b"".join(field(1, edge) for edge in values.shape)
    return dims + field(2, kind) + field(8, name) + field(9, values.tobytes())


def node(kind: str, inputs: Sequence[str], output: str, **attributes: int | Sequence[int]) -> bytes:
    made = b"".join(field(1, name) for name in inputs) + field(2, output) + field(4, kind)
    for name, value in attributes.items():
        whole = (
            field(3, value) + field(20, INT)
            if isinstance(value, int)
            else b"".join(field(8, number) for number in value) + field(20, INTS)
        )
        made += field(5, field(1, name) + whole)
    return made


def model(
    nodes: Sequence[bytes],
    constants: Mapping[str, np.ndarray[Any, Any]],
    inputs: Sequence[bytes],
    outputs: Sequence[bytes],
) -> bytes:
    graph = b"".join(
        [
            *(field(1, each) for each in nodes),
            field(2, "made for a test"),
            *(field(5, constant(name, values)) for name, values in constants.items()),
            *(field(11, each) for each in inputs),
            *(field(12, each) for each in outputs),
        ]
    )
    return field(1, 8) + field(7, graph) + field(8, field(2, 13))  # opset 13


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
    weights = np.random.default_rng(0).standard_normal((3 * EDGE * EDGE, DIMENSION)).astype(NUMPY[kind])
    return model(
        [node("Flatten", [takes], "flat", axis=1), node("MatMul", ["flat", "weights"], gives)],
        {"weights": weights},
        [argument(takes, kind, shape), *extra],
        [argument(gives, kind, (shape[0], width))],
    )


def text_model(
    vocabulary: int, *, length: int | str = "tokens", mask: bool = False, dimension: int = DIMENSION
) -> bytes:
    """The mean of a vector for each token; with a mask, the sum over those that are no padding."""
    table = np.random.default_rng(1).standard_normal((vocabulary, dimension)).astype(np.float32)
    ids = argument("input_ids", INT64, ("batch", length))
    gives = [argument("text_embeds", FLOAT, ("batch", dimension))]
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
    return model(nodes, constants, [ids, argument("attention_mask", INT64, ("batch", length))], gives)


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
