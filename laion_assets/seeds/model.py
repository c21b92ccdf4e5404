"""A CLIP model in ONNX Runtime: pixels or tokens in, vectors out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import redirect_stdout
from functools import cached_property
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort

from laion_assets.io.arrays import Floats, Ids
from laion_assets.io.errors import InputError
from laion_assets.io.machine import cores
from laion_assets.io.storage import first_line
from laion_assets.seeds.model_folder import (
    MODEL,
    PREPROCESSOR,
    TEXT,
    VISION,
    ModelFiles,
    find_model,
    published_name,
)
from laion_assets.seeds.preprocessing import Preprocessing, read_preprocessing

DEVICE = "embed_device"  # the setting that errors name
DEVICES = ("auto", "cpu", "cuda")
CUDA, CPU = "CUDAExecutionProvider", "CPUExecutionProvider"
TYPES: Mapping[str, type[np.generic]] = {
    "tensor(float)": np.float32,
    "tensor(float16)": np.float16,
    "tensor(int64)": np.int64,
    "tensor(int32)": np.int32,
}
NO_DIRECTION = "gets a vector without a direction (NaN, infinite or zero) from the model"
LFS_POINTER = b"version https://git-lfs"
ONLY_FATAL = 4  # errors are raised, so ONNX Runtime need not log them


class Model:
    """An open CLIP model. Its text model is opened at first use.

    Attributes:
        files: the files of the model.
        preprocessing: how an image is prepared for the model.
        device: "cpu" or "cuda".
        dimension: the dimension of its vectors.

    """

    def __init__(self, folder: Path, device: str = "auto", threads: int | None = None) -> None:
        """Open the model in a local folder.

        Args:
            folder: a folder in the layout of `model_folder`.
            device: "cpu", "cuda", or "auto", which uses CUDA if ONNX Runtime supports it.
            threads: number of compute threads; all cores by default.

        Raises:
            InputError: a part is missing or damaged, or the device is not available.

        """
        self.files: ModelFiles = find_model(folder)
        self.preprocessing: Preprocessing = read_preprocessing(self.files.path(PREPROCESSOR))
        self._threads = threads or cores()
        self._providers = _providers(device)
        self._images = self._session(self.files.vision, ("pixel_values",), "image_embeds")
        self._check_image_size()
        self.device: str = self._images.device
        if device == "cuda" and self.device != "cuda":
            raise InputError(
                "the GPU cannot be used, ONNX Runtime fell back to the CPU: install the CUDA and cuDNN "
                "that it needs, as `pip install 'onnxruntime-gpu[cuda,cudnn]'` does, or choose cpu",
                DEVICE,
            )
        self.dimension: int = self._images.width or self._probed_dimension()

    @property
    def fingerprint(self) -> str:
        """A hash of everything that the vectors depend on."""
        return self.files.fingerprint

    @cached_property
    def name(self) -> str | None:
        """The name under which the model was published, if its config.json records one."""
        return published_name(self.files)

    @cached_property
    def text(self) -> TextModel:
        """The part that embeds texts.

        Raises:
            InputError: the model has no text model, or it is damaged.

        """
        if self.files.text is None:
            raise InputError(
                f"the model {self.files.folder} has no onnx/{TEXT}.onnx and embeds images only: use a "
                "model that has one, or remove the prompts",
                MODEL,
            )
        session = self._session(self.files.text, ("input_ids",), "text_embeds", ("attention_mask",))
        if session.width not in (None, self.dimension):
            raise InputError(
                f"the model {self.files.folder} gives texts {session.width} dimensions and images "
                f"{self.dimension}: use a text model and an image model that belong together",
                MODEL,
            )
        return TextModel(session)

    def embed_pixels(self, pixels: Floats) -> Floats:
        """Embed preprocessed images (n, 3, height, width) as vectors (n, d)."""
        return self._images.run({"pixel_values": pixels})

    def _session(
        self, name: str, required: Sequence[str], output: str, optional: Sequence[str] = ()
    ) -> Session:
        return Session(self.files.path(name), self._providers, self._threads, required, optional, output)

    def _check_image_size(self) -> None:
        takes = self._images.shape("pixel_values")
        given = (3, *self.preprocessing.size)
        fits = len(takes) == 4 and all(
            not isinstance(want, int) or want == have for want, have in zip(takes[1:], given, strict=True)
        )
        if not fits:
            raise InputError(
                f"{self.files.path(self.files.vision)} takes images of {_times(takes[1:])} and "
                f"{PREPROCESSOR} makes {_times(given)}: use the configuration that belongs to the model",
                MODEL,
            )

    def _probed_dimension(self) -> int:
        """Embed a blank image to find the dimension, which the file does not declare."""
        blank = np.zeros((1, 3, *self.preprocessing.size), np.float32)
        return len(self.embed_pixels(blank)[0])


class TextModel:
    """The part of a model that embeds texts.

    Attributes:
        context_length: number of tokens per text; None if the file does not declare it.
        takes_mask: whether it takes a mask of the padding tokens.

    """

    def __init__(self, session: Session) -> None:
        self._session = session
        length = session.shape("input_ids")[-1]
        self.context_length: int | None = length if isinstance(length, int) else None
        self.takes_mask: bool = "attention_mask" in session.inputs

    def embed_tokens(self, tokens: Ids, mask: Ids) -> Floats:
        """Embed tokens (n, context length) as vectors (n, d)."""
        given = {"input_ids": tokens}
        return self._session.run(given | {"attention_mask": mask} if self.takes_mask else given)


class Session:
    """An open ONNX file.

    Attributes:
        inputs: the names of its inputs.
        device: "cpu" or "cuda".
        width: dimension of the vectors; None if the file does not declare it.

    """

    def __init__(
        self,
        path: Path,
        providers: Sequence[str],
        threads: int,
        required: Sequence[str],
        optional: Sequence[str],
        output: str,
    ) -> None:
        options = ort.SessionOptions()
        options.intra_op_num_threads = threads
        options.inter_op_num_threads = 1
        options.log_severity_level = ONLY_FATAL
        # Threads that spin while they wait for the next operator would slow the image decoders down.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        self._path = path
        _check_is_no_pointer(path)
        try:
            self._session = ort.InferenceSession(str(path), options, providers=list(providers))
        except Exception as error:  # ONNX Runtime raises many error types
            raise InputError(
                f"{path} cannot be opened as an ONNX model ({first_line(error)}): copy it again, with "
                "the files beside it",
                MODEL,
            ) from error
        self._arguments = {argument.name: argument for argument in self._session.get_inputs()}
        outputs = {argument.name: argument for argument in self._session.get_outputs()}
        self._check("inputs", self._arguments, set(required), {*required, *optional})
        self._check("outputs", outputs, {output}, None)
        self._output = output
        self.inputs: frozenset[str] = frozenset(self._arguments)
        self.device: str = "cuda" if CUDA in self._session.get_providers() else "cpu"
        shape = outputs[output].shape
        self.width: int | None = shape[-1] if shape and isinstance(shape[-1], int) else None

    def _check(
        self, what: str, there: Mapping[str, Any], needed: set[str], known: set[str] | None
    ) -> None:
        odd = [
            name
            for name, argument in there.items()
            if name in (known or needed) and argument.type not in TYPES
        ]
        if not needed <= set(there) or (known is not None and not set(there) <= known) or odd:
            found = ", ".join(f"{name} ({argument.type})" for name, argument in there.items())
            raise InputError(
                f"{self._path} has the {what} {found}, but {' and '.join(sorted(needed))} is needed: "
                f"export the model for transformers.js, as {VISION}.onnx and {TEXT}.onnx",
                MODEL,
            )

    def shape(self, name: str) -> Sequence[int | str | None]:
        """Return the shape of an input; variable dimensions are names or None."""
        shape: Sequence[int | str | None] = self._arguments[name].shape
        return shape

    def run(self, given: Mapping[str, np.ndarray[Any, Any]]) -> Floats:
        """Run the model on a batch and return (n, d) float32.

        Raises:
            InputError: the model fails.

        """
        (rows,) = {len(values) for values in given.values()}
        fixed = self._arguments[next(iter(given))].shape[0]
        step = fixed if isinstance(fixed, int) else rows
        return np.concatenate(
            [
                self._run({name: values[start : start + step] for name, values in given.items()}, step)
                for start in range(0, rows, step)
            ]
        )

    def _run(self, given: Mapping[str, np.ndarray[Any, Any]], batch: int) -> Floats:
        """Run a batch of the model's fixed size: pad it with zero rows, and drop their answers."""
        feed = {}
        for name, values in given.items():
            missing = [(0, batch - len(values))] + [(0, 0)] * (values.ndim - 1)
            padded = np.pad(values, missing) if batch > len(values) else values
            feed[name] = padded.astype(TYPES[self._arguments[name].type], copy=False)
        rows = len(next(iter(given.values())))
        try:
            (answer,) = self._session.run([self._output], feed)
        except Exception as error:
            shapes = ", ".join(f"{name} {_times(values.shape)}" for name, values in feed.items())
            raise InputError(
                f"{self._path} fails on {shapes} ({first_line(error)}): use smaller batches if memory "
                "ran out, or another export of the model",
                MODEL,
            ) from error
        if answer.ndim != 2 or len(answer) != batch:
            raise InputError(
                f"{self._path} returns {self._output} of shape {_times(answer.shape)}, but one vector "
                f"for each of {batch} inputs is needed: use another export of the model",
                MODEL,
            )
        vectors: Floats = answer[:rows].astype(np.float32, copy=False)
        return vectors


def _providers(device: str) -> list[str]:
    """Choose among the providers of this build of ONNX Runtime."""
    there = ort.get_available_providers()
    if device not in DEVICES:
        raise InputError(f"{device!r} is not a device: use one of {', '.join(DEVICES)}", DEVICE)
    if device == "cuda" and CUDA not in there:
        raise InputError(
            f"cuda is requested, but this ONNX Runtime cannot use a GPU (it has {', '.join(there)}): "
            "install onnxruntime-gpu in place of onnxruntime, or choose auto or cpu",
            DEVICE,
        )
    if CUDA not in there or device == "cpu":
        return [CPU]
    with redirect_stdout(StringIO()):  # what is missing is found when the model is opened
        ort.preload_dlls()  # finds CUDA and cuDNN where pip has installed them
    return [CUDA, CPU]


def _check_is_no_pointer(path: Path) -> None:
    with path.open("rb") as file:
        if file.read(len(LFS_POINTER)) == LFS_POINTER:
            raise InputError(
                f"{path} is a Git LFS pointer, not the model: run `git lfs pull` there", MODEL
            )


def _times(shape: Sequence[Any]) -> str:
    return " x ".join(str(edge) for edge in shape)
