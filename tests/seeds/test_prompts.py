"""Prompts are read line by line, tokenized like in CLIP, and embedded."""

import json
from pathlib import Path

import numpy as np
import pytest
from helpers.onnx_models import clip_tokenizer, text_model, write_model
from hypothesis import given
from hypothesis import strategies as st

from laion_assets.io.errors import InputError
from laion_assets.seeds.model import Model
from laion_assets.seeds.prompts import CutPrompt, Prompt, PromptTokens, embed_prompts, read_prompts

TOKENIZER = clip_tokenizer()
WORDS, START, END = (
    TOKENIZER.get_vocab_size(),
    *map(TOKENIZER.token_to_id, ("<|startoftext|>", "<|endoftext|>")),
)
LONG = "word " * 100


def model_of_texts(folder: Path, **options: object) -> Model:
    return Model(write_model(folder, text=text_model(WORDS, **options)))  # type: ignore[arg-type]


# --- the file -------------------------------------------------------------------------------------


def test_a_prompt_is_a_line_that_is_neither_empty_nor_a_comment():
    data = "\ufeff a cat \r\n# a dog\n\n\t\r  # more\nÉté 😀 #3".encode()
    assert read_prompts(data) == (Prompt(1, "a cat"), Prompt(6, "Été 😀 #3"))
    assert read_prompts(b"") == ()


@given(st.lists(st.text(st.characters(exclude_characters="\r\n", exclude_categories=["Cc", "Cs"]))))
def test_every_line_keeps_its_number(lines):
    prompts = read_prompts("\n".join(lines).encode())
    assert all(lines[prompt.line - 1].removeprefix("\ufeff").strip() == prompt.text for prompt in prompts)
    left_out = set(range(1, len(lines) + 1)) - {prompt.line for prompt in prompts}
    assert all(not (line := lines[n - 1].lstrip("\ufeff").strip()) or line[0] == "#" for n in left_out)


@pytest.mark.parametrize(
    ("data", "told"),
    [
        (b"a cat\r\ncaf\xe9\nmore", r"prompts.txt line 2 is not UTF-8 \(byte 0xe9\)"),
        ("a cat".encode("utf-16"), "prompts.txt is UTF-16: save it as UTF-8"),
        ("# x\na cat".encode("utf-16-le"), r"prompts.txt line 2 .*U\+0000.* save the file as UTF-8"),
        ("a cat".encode("utf-16-be"), r"prompts.txt line 1 .*U\+0000"),
        (b"a cat\n\ta\tdog \n\x1b[31mred", r"prompts.txt line 3 .*U\+001B: remove it"),
    ],
)
def test_what_is_no_plain_utf_8_is_named_with_its_line(data, told):
    with pytest.raises(InputError, match=told):
        read_prompts(data)


# --- tokens ---------------------------------------------------------------------------------------


def test_a_prompt_begins_ends_and_is_filled_up_as_clip_does(tmp_path):
    ids, mask, lengths = PromptTokens(model_of_texts(tmp_path)).of(["Ab", ""])
    assert ids.shape == mask.shape == (2, 77)
    assert ids.dtype == np.int64
    a, b = TOKENIZER.token_to_id("a"), TOKENIZER.token_to_id("b</w>")
    assert ids[0].tolist() == [START, a, b] + 74 * [END]
    assert ids[1].tolist() == [START] + 76 * [END]
    assert mask.sum(axis=1).tolist() == lengths == [4, 2]


def test_a_long_prompt_is_cut_and_still_ends(tmp_path):
    ids, mask, lengths = PromptTokens(model_of_texts(tmp_path)).of([LONG])
    (whole,) = TOKENIZER.encode_batch([LONG])
    assert ids[0].tolist() == [*whole.ids[:76], END]
    assert mask.all()
    assert lengths == [402]


@pytest.mark.parametrize(
    ("files", "length"),
    [
        ({}, 77),
        ({"config.json": {"text_config": {"max_position_embeddings": 64}}}, 64),
        ({"tokenizer_config.json": {"model_max_length": 32}}, 32),
        ({"tokenizer_config.json": {"model_max_length": 1e30}}, 77),
    ],
    ids=str,
)
def test_the_context_length_is_what_the_model_or_its_files_say(files, length, tmp_path):
    model = model_of_texts(tmp_path)
    for name, content in files.items():
        (tmp_path / name).write_text(json.dumps(content))
    assert PromptTokens(model).context_length == length
    fixed = model_of_texts(tmp_path, length=16)
    assert PromptTokens(fixed).context_length == 16


@pytest.mark.parametrize("token", ["!", {"content": "!", "lstrip": False}], ids=str)
def test_another_token_may_fill_up(token, tmp_path):
    model = model_of_texts(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"pad_token": token}))
    ids, _, _ = PromptTokens(model).of(["a"])
    assert ids[0, -1] == TOKENIZER.token_to_id("!") != END


# --- vectors --------------------------------------------------------------------------------------


def test_prompts_become_unit_vectors_and_those_that_were_cut_are_told(tmp_path):
    prompts = [Prompt(1, "a cat"), Prompt(3, LONG), Prompt(4, "a dog")]
    embedded = embed_prompts(model_of_texts(tmp_path), prompts, batch=2)
    assert embedded.vectors.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(embedded.vectors, axis=1), 1, rtol=1e-6)
    assert embedded.cut == (CutPrompt(3, 402, 77),)
    assert str(embedded.cut[0]) == "line 3 has 402 tokens, but the model reads only 77"


def test_a_vector_does_not_depend_on_the_batch_or_on_what_else_is_in_it(tmp_path):
    prompts = [Prompt(n, text) for n, text in enumerate(["a cat", LONG, "a dog", "Été 😀"], 1)]
    model = model_of_texts(tmp_path, mask=True)
    whole = embed_prompts(model, prompts).vectors
    alone = [embed_prompts(model, [prompt]).vectors[0] for prompt in prompts]
    np.testing.assert_allclose(whole, alone, rtol=1e-6)


def test_a_model_that_asks_for_padding_is_told_of_it(tmp_path):
    short = [Prompt(1, "a cat")]
    masked = embed_prompts(model_of_texts(tmp_path / "masked", mask=True), short).vectors
    unmasked = embed_prompts(model_of_texts(tmp_path / "unmasked"), short).vectors
    assert abs(float((masked @ unmasked.T)[0, 0])) < 0.99


def test_no_prompts_are_no_vectors(tmp_path):
    assert embed_prompts(model_of_texts(tmp_path), []).vectors.shape == (0, 4)


def test_prompts_need_a_model_of_texts_and_its_tokenizer(tmp_path):
    with pytest.raises(InputError, match=r"has no onnx/text_model\.onnx and embeds images only"):
        embed_prompts(Model(write_model(tmp_path)), [Prompt(1, "a cat")])
    model = Model(write_model(tmp_path, text=text_model(WORDS), tokenizer=False))
    with pytest.raises(InputError, match=r"has no tokenizer\.json"):
        embed_prompts(model, [Prompt(1, "a cat")])
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(InputError, match=r"tokenizer\.json is damaged"):
        embed_prompts(Model(tmp_path), [Prompt(1, "a cat")])
