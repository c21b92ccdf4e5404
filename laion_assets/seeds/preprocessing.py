"""Convert RGB images to a model's pixel array, as its preprocessor_config.json specifies.

The results equal those of transformers' image processors bit for bit, except for very long images.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
from PIL import Image

from laion_assets.io.arrays import Floats
from laion_assets.io.errors import InputError
from laion_assets.io.text import json_object, printable
from laion_assets.seeds.model_folder import MODEL

CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
HALF = (0.5, 0.5, 0.5)
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
LONGEST_RESIZED = 16_000_000  # pixels; if an image resizes to more, only the cropped part is resized
MAX_EDGE = 4096  # pixels of a model's input
# Outside these bounds, images become constant or infinite. Means and deviations may be on a 0-255 scale.
FACTORS, MEANS, DEVIATIONS = (1e-6, 1), (-1000, 1000), (1e-3, 1000)

_CLIP = {
    "size": {"shortest_edge": 224},
    "crop_size": 224,
    "do_center_crop": True,
    "resample": Image.Resampling.BICUBIC,
    "image_mean": CLIP_MEAN,
    "image_std": CLIP_STD,
}
_SIGLIP = _CLIP | {
    "size": {"height": 224, "width": 224},
    "do_center_crop": False,
    "image_mean": HALF,
    "image_std": HALF,
}
_VIT = _SIGLIP | {"resample": Image.Resampling.BILINEAR}
_DEIT = _CLIP | {
    "size": {"height": 256, "width": 256},
    "image_mean": IMAGENET_MEAN,
    "image_std": IMAGENET_STD,
}
DEFAULTS: Mapping[str, Mapping[str, Any]] = {
    "CLIP": _CLIP,
    "ChineseCLIP": _CLIP,
    "Bit": _CLIP,
    "Siglip": _SIGLIP,
    "ViT": _VIT,
    "DeiT": _DEIT,
}
"""Defaults for missing entries, by kind of processor. A `size` of one number is the shortest edge if the
default names one, and a square otherwise."""
SUFFIXES = ("ImageProcessorFast", "ImageProcessorPil", "ImageProcessor", "FeatureExtractor")
UNSUPPORTED = ("do_pad", "rescale_offset", "do_color_quantize", "do_flip_channel_order")
SWITCHES = ("do_resize", "do_center_crop", "do_rescale", "do_normalize", *UNSUPPORTED)


@dataclass(frozen=True, eq=False)
class Preprocessing:
    """Resize, centre crop, rescale and normalise.

    Attributes:
        resize: the length of the shortest edge, or (height, width); None keeps the size.
        resample: the resampling filter.
        crop: (height, width); None does not crop.
        values: (3, 256) float32 lookup table with the result for each value of each channel.

    """

    resize: int | tuple[int, int] | None
    resample: Image.Resampling
    crop: tuple[int, int] | None
    values: Floats

    @property
    def size(self) -> tuple[int, int]:
        """(height, width) of the result."""
        size = self.crop or self.resize
        assert isinstance(size, tuple)  # noqa: S101 - checked when it is parsed
        return size

    def resized(self, width: int, height: int) -> tuple[int, int]:
        """Return the (width, height) after resizing, before cropping."""
        if self.resize is None:
            return width, height
        if isinstance(self.resize, tuple):
            return self.resize[1], self.resize[0]
        short, long = sorted((width, height))
        longer = int(self.resize * long / short)
        return (self.resize, longer) if width <= height else (longer, self.resize)

    def __call__(self, image: Image.Image) -> Floats:
        """Return an RGB image as the model's input, (3, height, width) float32."""
        pixels = np.asarray(self._cut(image))
        made = np.empty((3, *self.size), np.float32)
        for channel in range(3):
            np.take(self.values[channel], pixels[:, :, channel], out=made[channel], mode="clip")
        return made

    def _cut(self, image: Image.Image) -> Image.Image:
        width, height = self.resized(*image.size)
        if self.crop is None:
            return image.resize((width, height), self.resample)
        left, top = (width - self.crop[1]) // 2, (height - self.crop[0]) // 2
        box = (left, top, left + self.crop[1], top + self.crop[0])  # pixels outside the image are black
        if width * height > LONGEST_RESIZED:
            return self._resized_part(image, (width, height), box)
        return image.resize((width, height), self.resample).crop(box)

    def _resized_part(
        self, image: Image.Image, size: tuple[int, int], box: tuple[int, int, int, int]
    ) -> Image.Image:
        """Resize only the part that falls into a box of the resized image."""
        inside = (max(box[0], 0), max(box[1], 0), min(box[2], size[0]), min(box[3], size[1]))
        across, down = image.width / size[0], image.height / size[1]
        part = image.resize(
            (inside[2] - inside[0], inside[3] - inside[1]),
            self.resample,
            (inside[0] * across, inside[1] * down, inside[2] * across, inside[3] * down),
        )
        canvas = Image.new("RGB", (box[2] - box[0], box[3] - box[1]))
        canvas.paste(part, (inside[0] - box[0], inside[1] - box[1]))
        return canvas


def read_preprocessing(path: Path) -> Preprocessing:
    """Read a preprocessor_config.json.

    Raises:
        InputError: the file is not JSON, has a wrong value, or needs an unsupported processor or step.

    """
    try:
        config = json_object(path.read_bytes())
    except (OSError, ValueError) as error:
        _refuse(
            path,
            f"is not a JSON object ({error}): copy it again from where the model was published",
            error,
        )
    kind = config.get("image_processor_type") or config.get("feature_extractor_type") or "none"
    defaults = DEFAULTS.get(_kind(str(kind)))
    if defaults is None:
        _refuse(
            path,
            f"is for the image processor {printable(str(kind))}, which is not supported (supported: "
            f"{', '.join(DEFAULTS)}): use another model",
        )
    for switch in SWITCHES:
        if not isinstance(config.get(switch), bool | None):
            _refuse(path, f"has {switch} {config[switch]!r}: it must be true or false")
    for step in UNSUPPORTED:
        if config.get(step):
            _refuse(path, f"requires {step}, which is not supported: use another model")
    return _parsed(path, {**defaults, **{k: v for k, v in config.items() if v is not None}}, defaults)


def _kind(name: str) -> str:
    for suffix in SUFFIXES:
        if name.endswith(suffix):
            return name.removesuffix(suffix)
    return name


def _parsed(path: Path, config: Mapping[str, Any], defaults: Mapping[str, Any]) -> Preprocessing:
    square = "shortest_edge" not in defaults["size"]
    resize = _size(path, "size", config["size"], square) if config.get("do_resize", True) else None
    crop = _size(path, "crop_size", config["crop_size"], True) if config["do_center_crop"] else None
    if isinstance(crop, int) or not isinstance(crop or resize, tuple):
        _refuse(
            path,
            "results in images of different sizes, which cannot be embedded together: it must set "
            "crop_size, or the height and width of size",
        )
    filters: list[Any] = [each.value for each in Image.Resampling]
    resample = config["resample"]
    if isinstance(resample, bool) or resample not in filters:
        _refuse(path, f"has resample {resample!r}, which is not a Pillow filter: correct it")
    return Preprocessing(resize, Image.Resampling(resample), crop, _values(path, config))


def _size(path: Path, name: str, value: Any, square: bool) -> int | tuple[int, int]:
    """Read a size: one number, {"shortest_edge"} or {"height", "width"}."""
    edges: Any = None
    if isinstance(value, dict):
        named = {key for key, edge in value.items() if edge is not None}
        if named == {"height", "width"}:
            edges = (value["height"], value["width"])
        elif named == {"shortest_edge"}:
            edges = (value["shortest_edge"],)
    elif isinstance(value, int):
        edges = (value, value) if square else (value,)
    if edges is None or not all(_is_edge(edge) for edge in edges):
        _refuse(
            path,
            f"has {name} {value!r}: it must be a number of pixels up to {MAX_EDGE:,}, a shortest_edge, "
            "or a height and a width",
        )
    return edges[0] if len(edges) == 1 else tuple(edges)


def _is_edge(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 < value <= MAX_EDGE


def _values(path: Path, config: Mapping[str, Any]) -> Floats:
    """Rescale and normalise each possible value of a channel, as transformers does."""
    values = np.tile(np.arange(256, dtype=np.float64), (3, 1))
    if config.get("do_rescale", True):
        values *= _numbers(path, "rescale_factor", config.get("rescale_factor", 1 / 255), FACTORS)
    made: Floats = values.astype(np.float32)
    if config.get("do_normalize", True):
        mean = _numbers(path, "image_mean", config["image_mean"], MEANS)
        std = _numbers(path, "image_std", config["image_std"], DEVIATIONS)
        made = (made - mean.astype(np.float32)) / std.astype(np.float32)
    return made


def _numbers(
    path: Path, name: str, value: Any, bounds: tuple[float, float]
) -> np.ndarray[Any, np.dtype[np.float64]]:
    """Read one number for all channels or one per channel, as a column of one or three."""
    each = value if isinstance(value, list | tuple) else (value,)
    low, high = bounds
    if len(each) not in (1, 3) or not all(_is_number(n) and low <= n <= high for n in each):
        _refuse(
            path,
            f"has {name} {value!r}: it must be a number from {low:g} to {high:g}, or one for each of 3 "
            "channels",
        )
    return np.array(each, np.float64)[:, None]


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _refuse(path: Path, problem: str, cause: Exception | None = None) -> NoReturn:
    raise InputError(f"{path} {problem}", MODEL) from cause
