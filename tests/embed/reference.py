"""CLIP models with random weights by transformers and torch: exports and answers.

Runs in an environment of its own. Reads `images/`, `prompts.json` and `captions.json` of a folder, and
writes into it the models `small` and `large` (of ViT-L/14's shape) in the layout of transformers.js, and
`answers.npz`. Their vocabulary is CLIP's own, from the package open-clip-torch.
"""

import gzip
import importlib.util
import json
import sys
import types
from importlib.metadata import distribution
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from transformers import CLIPConfig, CLIPModel, CLIPTokenizer
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

START, END, CONTEXT = "<|startoftext|>", "<|endoftext|>", 77
MERGES = 49152 - 256 - 2  # that CLIP uses of the file
LARGE_BATCH = 8
SMALL = {
    "vision_config": {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "patch_size": 16,
        "image_size": 224,
    },
    "text_config": {
        "hidden_size": 48,
        "intermediate_size": 96,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
    },
    "projection_dim": 32,
}
LARGE = {
    "vision_config": {
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "patch_size": 14,
        "image_size": 224,
    },
    "text_config": {
        "hidden_size": 768,
        "intermediate_size": 3072,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
    },
    "projection_dim": 768,
}


class ImageTower(torch.nn.Module):
    """The part of a model that embeds images."""

    def __init__(self, clip: CLIPModel) -> None:
        super().__init__()
        self.clip = clip

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Embed preprocessed images."""
        seen = self.clip.vision_model(pixel_values=pixel_values)
        return self.clip.visual_projection(seen.pooler_output)


class TextTower(torch.nn.Module):
    """The part of a model that embeds texts."""

    def __init__(self, clip: CLIPModel) -> None:
        super().__init__()
        self.clip = clip

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        """Embed tokens."""
        read = self.clip.text_model(input_ids=input_ids)
        return self.clip.text_projection(read.pooler_output)


class MaskedTextTower(TextTower):
    """The same, with a mask of the padding."""

    def forward(  # type: ignore[override]
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor
    ) -> torch.Tensor:
        """Embed tokens."""
        read = self.clip.text_model(input_ids=input_ids, attention_mask=attention_mask)
        return self.clip.text_projection(read.pooler_output)


def packaged(package: str, file: str) -> Path:
    return Path(str(distribution(package).locate_file(file)))


def tokenizer() -> CLIPTokenizer:
    """CLIP's, made of the list of merges that CLIP was published with."""
    file = packaged("open-clip-torch", "open_clip/bpe_simple_vocab_16e6.txt.gz")
    lines = gzip.decompress(file.read_bytes()).decode().split("\n")[1 : MERGES + 1]
    merges = [tuple(line.split()) for line in lines]
    letters = list(original_tokenizer().byte_encoder.values())
    words = [*letters, *(f"{letter}</w>" for letter in letters), *map("".join, merges), START, END]
    vocabulary = {word: number for number, word in enumerate(words)}
    return CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=CONTEXT)


def original_tokenizer() -> Any:
    """OpenAI's own code, as open_clip carries it; the package itself would need much more."""
    return loaded(
        "open_clip_tokenizer", packaged("open-clip-torch", "open_clip/tokenizer.py")
    ).SimpleTokenizer()


def loaded(name: str, file: Path) -> Any:
    spec = importlib.util.spec_from_file_location(name, file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def random_clip(shape: dict[str, Any]) -> CLIPModel:
    """A model whose answers differ between images: weights larger than training begins with."""
    torch.manual_seed(0)
    model = CLIPModel(CLIPConfig(**shape, initializer_factor=1.0)).eval()
    with torch.no_grad():
        for name, weights in model.named_parameters():
            if "embedding" in name or "proj" in name:
                weights.mul_(2)
    return model


def export(model: CLIPModel, folder: Path, *, masked: bool) -> None:
    """Write a model in the layout of transformers.js."""
    (folder / "onnx").mkdir(parents=True)
    pixels, ids = torch.zeros(2, 3, 224, 224), torch.zeros(2, CONTEXT, dtype=torch.int64)
    ids[:, -1] = model.config.text_config.eos_token_id
    texts = ["input_ids", "attention_mask"] if masked else ["input_ids"]
    some = (ids, torch.ones_like(ids)) if masked else (ids,)
    tower = MaskedTextTower(model) if masked else TextTower(model)
    for name, part, given, inputs, output in (
        ("vision_model", ImageTower(model), (pixels,), ["pixel_values"], "image_embeds"),
        ("text_model", tower, some, texts, "text_embeds"),
    ):
        batch = torch.export.Dim("batch", min=1, max=4096)
        torch.onnx.export(
            part.eval(),
            given,
            str(folder / "onnx" / f"{name}.onnx"),
            input_names=inputs,
            output_names=[output],
            dynamic_shapes=tuple({0: batch} for _ in inputs),
            dynamo=True,
            external_data=False,
            verbose=False,
        )
    CLIPImageProcessorPil().save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    model.config.save_pretrained(folder)


def image_vectors(model: CLIPModel, pixels: torch.Tensor) -> np.ndarray[Any, Any]:
    with torch.no_grad():
        return ImageTower(model)(pixels).numpy()


def text_vectors(model: CLIPModel, tokens: dict[str, torch.Tensor]) -> np.ndarray[Any, Any]:
    with torch.no_grad():
        return MaskedTextTower(model)(**tokens).numpy()


def peers_parts(model: CLIPModel) -> tuple[Any, Any]:
    """The reader and the mapper of clip-retrieval's own inference, unchanged.

    Its loader does not know the newest transformers: the model is handed over.
    """
    for name in ("all_clip", "sentence_transformers"):
        stand_in = types.SimpleNamespace(load_clip=None, SentenceTransformer=None)
        sys.modules[name] = stand_in  # type: ignore[assignment]
    reader, mapper = (
        loaded(f"peer_{part}", packaged("clip-retrieval", f"clip_retrieval/clip_inference/{part}.py"))
        for part in ("reader", "mapper")
    )
    made = mapper.ClipMapper.__new__(mapper.ClipMapper)
    vars(made).update(enable_image=True, enable_text=False, enable_metadata=False, device="cpu")
    made.model_img = ImageTower(model)
    return reader, made


def peers_vectors(model: CLIPModel, images: Path) -> tuple[list[str], np.ndarray[Any, Any]]:
    """What clip-retrieval makes of a folder of images."""
    reader, mapper = peers_parts(model)
    processor = CLIPImageProcessorPil()
    dataset = reader.get_image_dataset()(
        lambda image: processor(image, return_tensors="pt").pixel_values[0],
        None,
        str(images),
        enable_text=False,
    )
    names, vectors = [], []
    for item in (dataset[number] for number in range(len(dataset))):
        names.append(str(Path(item["image_filename"]).relative_to(images)))
        answer = mapper({"image_tensor": item["image_tensor"][None], "image_filename": names[-1:]})
        vectors.append(answer["image_embs"])
    return names, np.concatenate(vectors)


def main() -> None:
    """Write models and answers into a folder."""
    folder = Path(sys.argv[1])
    names = json.loads((folder / "images.json").read_text())
    prompts = json.loads((folder / "prompts.json").read_text())
    captions = json.loads((folder / "captions.json").read_text())
    opened = [ImageOps.exif_transpose(Image.open(folder / "images" / name)) for name in names]
    processor, cut = CLIPImageProcessorPil(), tokenizer()
    pixels = torch.cat([processor(image, return_tensors="pt").pixel_values for image in opened])
    options = {"padding": "max_length", "truncation": True, "max_length": CONTEXT, "return_tensors": "pt"}
    tokens = dict(cut(prompts, **options))
    answers: dict[str, Any] = {
        "pixels": pixels.numpy(),
        "caption_tokens": cut(captions, **options)["input_ids"].numpy(),
        "original_tokens": original_tokenizer()(captions).numpy(),
        "prompt_tokens": tokens["input_ids"].numpy(),
    }
    small = random_clip(SMALL)
    export(small, folder / "small", masked=False)
    export(small, folder / "masked", masked=True)
    answers["small_images"] = image_vectors(small, pixels)
    answers["small_prompts"] = text_vectors(small, tokens)
    peer_names, answers["peer_images"] = peers_vectors(small, folder / "images" / "pictures")
    (folder / "peer.json").write_text(json.dumps(peer_names))
    large = random_clip(LARGE)
    export(large, folder / "large", masked=False)
    answers["large_images"] = image_vectors(large, pixels[:LARGE_BATCH])
    answers["large_prompts"] = text_vectors(large, {k: v[:LARGE_BATCH] for k, v in tokens.items()})
    np.savez(folder / "answers.npz", **answers)


if __name__ == "__main__":
    main()
