"""Locations and other `LAION_*` variables that apply to every run.

`Places` declares each variable once, with type, default and help; the tables in the documentation are
generated from it. Settings that can change for one run are in `settings`; resource requests of pods
(`LAION_NVME_*`) are in `kubernetes.placement`.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from laion_assets.build import SHARD_ROWS
from laion_assets.defs.kubernetes.placement import CombiningPod, NvmeNode
from laion_assets.defs.settings import FIELDS, variable_of
from laion_assets.io.errors import InputError
from laion_assets.io.public_urls import public
from laion_assets.io.storage import on_this_machine
from laion_assets.staging import DEFAULT_BUDGET, parse_size

DATA = Path("data")  # in the project folder; dagster.yaml keeps Dagster's storage there too
OWN_COLUMNS = ("id", "similarity", "rank", "seed", "seed_set", "strategies", "code", "thumbnail")
SIMILAR_NAMES = 0.85  # difflib ratio from which an unknown variable counts as misspelt


def _columns(text: Any) -> Any:
    """Read `url=image_link,caption=alt_text,score`, where a name alone is carried along as it is."""
    if not isinstance(text, str):
        return text
    found = {}
    for part in text.split(","):
        ours, _, theirs = map(str.strip, part.partition("="))
        if ours and theirs and ours not in ("url", "caption"):
            raise ValueError("write it as url=<column>,caption=<column>,<column to carry along>")
        if not theirs and ours in OWN_COLUMNS:
            raise ValueError(f"every table has a column {ours!r} of its own: carry along another")
        if ours:
            found[ours] = theirs or ours
    return found


def _names(text: Any) -> Any:
    return tuple(name.strip() for name in text.split(",")) if isinstance(text, str) else text


def _bytes(text: Any) -> Any:
    if not isinstance(text, str):
        return text
    try:
        return parse_size(text)
    except InputError as error:
        raise ValueError("write it as a number of bytes, or like 300GB") from error


def _owner(text: str) -> str:
    """Accept what Dagster accepts."""
    if not re.fullmatch(r"team:.+|[\w.%+-]+@[A-Za-z0-9.-]+\.[A-Za-z]{2,7}", text):
        raise ValueError("write it as an e-mail address, or like team:image_data")
    return text


def _true_or_false(text: Any) -> Any:
    if not isinstance(text, str):
        return text
    if text not in ("true", "false"):
        raise ValueError("set it to 'false' or 'true'")
    return text == "true"


Location = Annotated[str, AfterValidator(public)]  # a URL without secrets, which nothing then can show


def _place(default: str, help_text: str) -> Any:
    """Declare a folder that defaults to one below `DATA` in the working directory."""
    return Field(
        default_factory=lambda: str((DATA / default).absolute()),
        description=help_text,
        json_schema_extra={"shown": f"`{DATA / default}`"},
    )


class Places(BaseModel):
    """The platform's locations, and choices that apply to every run."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    index_uri: Location = _place("index", "Folder of the index, a local path or a URL")
    metadata_uri: Location | None = Field(
        None,
        description="Folder of the metadata, if not `metadata` in the index folder",
        json_schema_extra={"shown": "`metadata` in the index folder"},
    )
    metadata_columns: Annotated[Mapping[str, str], BeforeValidator(_columns)] = Field(
        {},
        description="Names of the URL and caption columns, if they are unusual, and further columns to "
        "carry along: `url=<column>,caption=<column>,<column>`",
        json_schema_extra={"example": "url=image_link,caption=alt_text,nsfw_score"},
    )
    cache_dir: str = _place(
        "cache",
        "Local directory for the staged index, on a fast disk with room for all of it or for the budget. "
        "Holds one index; staging another replaces it",
    )
    staging: Literal["full", "sparse", "in-place"] | None = Field(
        None,
        description="`full` copies the index to the cache, `sparse` reads only what requests need, "
        "`in-place` uses a local index without copying it",
        json_schema_extra={
            "shown": "`full` from a folder, `sparse` from elsewhere (on Kubernetes: `full`)",
            "example": "full",
        },
    )
    sparse_budget: Annotated[int, BeforeValidator(_bytes)] = Field(
        DEFAULT_BUDGET,
        gt=0,
        description="Disk space that sparse staging may use",
        json_schema_extra={"shown": "100GB", "example": "100GB"},
    )
    lost_index: Literal["restage", "fail"] = Field(
        "restage",
        description="What a step does if the disk lacks the index or holds another one: `restage` it or "
        "`fail`",
    )
    block_list: Location | None = Field(
        None,
        description="File of ids, URLs and hosts to exclude from every table: one per line, or with "
        "columns as CSV or Parquet",
    )
    model: Location | None = Field(
        None,
        description="Folder of the model that embeds images and prompts, a local path or a URL: "
        "ONNX files in the layout of transformers.js",
        json_schema_extra={"shown": "the demo's with the demo's index, none with any other"},
    )
    embed_device: Literal["auto", "cpu", "cuda"] = Field(
        "auto",
        description="Where the model runs: `cuda` needs onnxruntime-gpu, `auto` uses the GPU if "
        "available",
    )
    embeddings_uri: Location | None = Field(
        None,
        description="Folder of published embeddings, a local path or a URL. If set, the index "
        "at LAION_INDEX_URI is built from them",
    )
    embeddings_layout: Literal["clip-retrieval", "laion", "datacomp", "parquet"] | None = Field(
        None,
        description="Layout of the embeddings",
        json_schema_extra={"shown": "detected", "example": "datacomp"},
    )
    embeddings_key: str | None = Field(
        None,
        description="Which vectors to use if a file holds several: an array in DataComp's `.npz`, or "
        "a column",
        json_schema_extra={"shown": "`l14_img`, or the only column of vectors", "example": "l14_img"},
    )
    embeddings_columns: Annotated[tuple[str, ...] | None, BeforeValidator(_names)] = Field(
        None,
        description="Columns of the metadata that the index keeps, comma-separated",
        json_schema_extra={"shown": "all", "example": "url,text,original_width"},
    )
    embeddings_model: str | None = Field(
        None,
        description="Name of the model that made the embeddings, written to `model.json`",
        json_schema_extra={"shown": "known for DataComp", "example": "openai/clip-vit-large-patch14"},
    )
    build_uri: Location | None = Field(
        None,
        description="Workspace of a build, for intermediate results: a local path or a URL",
        json_schema_extra={"shown": "`<LAION_INDEX_URI>.build`"},
    )
    index_key: str | None = Field(
        None,
        description="faiss factory key of the index",
        json_schema_extra={
            "shown": "chosen by the number of rows",
            "example": "OPQ128_896,IVF16384_HNSW32,PQ128x8",
        },
    )
    bytes_per_row: int | None = Field(
        None,
        gt=8,
        description="Most bytes per row of the index, used to choose the key",
        json_schema_extra={"shown": "136 if codes are compressed", "example": "136"},
    )
    shard_rows: int = Field(
        SHARD_ROWS, gt=0, description="Approximate rows per shard; a shard holds whole input files"
    )
    min_recall: float = Field(
        0.5, ge=0, le=1, description="The check of a built index warns below this recall@100"
    )
    seeds_uri: Location = _place(
        "seeds", "Folder of the seed sets, one subfolder each: a local path or a URL"
    )
    output_uri: Location = _place("output", "Folder of the tables, a local path or a URL")
    max_images: int | None = Field(
        10_000_000,
        gt=0,
        description="Most images that one run may request, `nb_images_knn` for each seed and "
        "`nb_images_centroid` together, or have to keep for its target. No search counts for more "
        "images than the index has",
    )
    max_images_per_day: int | None = Field(
        None,
        gt=0,
        description="Most images that the finished searches of the last 24 hours and a run may request "
        "together",
        json_schema_extra={"shown": "no limit", "example": "50000000"},
    )
    show_remote_pictures: Annotated[bool, BeforeValidator(_true_or_false)] = Field(
        False,
        description="If the index has no thumbnails, `true` lets steps and `laion-assets look` fetch the "
        "images that they show from their hosts, and the check `urls_alive` request 200 URLs. Rows "
        "marked as unsafe are left out, but not all unsafe images are marked. Each host sees this "
        "machine's IP address",
        json_schema_extra={"shown": "`false`", "example": "false"},
    )

    ui_hosts: Annotated[tuple[str, ...], BeforeValidator(_names)] = Field(
        (),
        description="Further names under which browsers may open the UI, comma-separated, for example "
        "behind your own authentication",
        json_schema_extra={"shown": "`127.0.0.1`, `localhost`", "example": "dagster.example.org"},
    )
    owner: Annotated[str, AfterValidator(_owner)] = Field(
        "team:image_data",
        description="Owner of every asset in the UI: an e-mail address, or `team:` and a name",
    )

    @property
    def staging_mode(self) -> str:
        """The staging mode. By default folders are copied; buckets, which may hold terabytes, are not."""
        return self.staging or ("full" if on_this_machine(self.index_uri) else "sparse")

    @classmethod
    def from_environment(cls, environment: Mapping[str, str]) -> Places:
        """Read and check the variables.

        Raises:
            InputError: a value is wrong; the message names the variable, its value and what is allowed.

        """
        _refuse_misspelt(environment)
        given = {name: environment.get(variable_of(name)) for name in cls.model_fields}
        try:
            return cls.model_validate({name: text for name, text in given.items() if text})
        except ValidationError as error:
            problem = error.errors()[0]
            name, context = str(problem["loc"][0]), problem.get("ctx", {})
            choices = f"set it to {context['expected']}" if "expected" in context else None
            remedy = choices or context.get("error") or problem["msg"]
            raise InputError(f"{variable_of(name)} is {given[name]!r}: {remedy}") from error


def _refuse_misspelt(environment: Mapping[str, str]) -> None:
    """Raise an error for unknown variables that resemble a known one or are a prefix of one.

    A silently ignored setting could be the one that excludes images. Other names with the same prefix may
    belong to others, such as those that Kubernetes derives from service names.
    """
    known = {variable_of(name) for name in (*Places.model_fields, *FIELDS)}
    known.update(variable for of in (NvmeNode, CombiningPod) for variable in of.variables().values())
    for name in environment:
        if name.startswith("LAION_") and name not in known:
            longer = [each for each in sorted(known) if each.startswith(f"{name}_")]
            near = longer or difflib.get_close_matches(name, known, n=1, cutoff=SIMILAR_NAMES)
            if near:
                raise InputError(
                    f"{name} is set, but it is not a setting: did you mean {' or '.join(near)}?"
                )
