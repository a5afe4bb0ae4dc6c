"""What the names of data and models in a recipe point at: the embedded world, a path, or the Hugging Face hub.

    world:base              the embedded base model            world:NAME     a file of the embedded world
    data:NAME               in evaluation.data, the folder of test sets (evaluation only)
    hf:OWNER/NAME[/FOLDER][@REVISION][:SPLIT]                   a hub data set, or one folder of it
    anything else           a path from the recipe's folder, else from the working folder; for models, else a hub id

Nothing here opens a file or a connection.
"""

import difflib
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from direct_rlhf.errors import ConfigError

WORLD_FOLDER = Path(__file__).parents[1] / "world"

_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_HUB_DATASET = re.compile(
    rf"hf:(?P<name>{_HUB_NAME.pattern})(?:/(?P<folder>[\w./-]+))?(?:@(?P<revision>[\w./-]+))?(?::(?P<split>.+))?"
)


@dataclass(frozen=True)
class HubReference:
    """Something on the Hugging Face hub."""

    kind: Literal["dataset", "model"]
    name: str  # OWNER/NAME
    split: str | None = None  # data sets only; None = train
    revision: str | None = None  # None = the newest
    folder: str | None = None  # data sets only: `data_dir`, one folder of the repository

    def __str__(self) -> str:
        return self.name


def resolve_reference(ref: str, folder: Path | None = None) -> Path | HubReference:
    """The existing file or folder that ``ref`` names, or its place on the hub.

    ``folder`` is where relative paths start from; the working folder comes second.
    Errors: ConfigError if a local thing does not exist (with the places looked at) or a reference is malformed.
    """
    if ref.startswith("world:"):
        return _world(ref)
    if ref.startswith("hf:"):
        return _hub_dataset(ref)
    looked = _places(ref, folder)
    for place in looked:
        if os.path.exists(place):  # not Path.exists, which raises for a name that is too long
            return place
    raise ConfigError(
        f"{ref}: no such file or folder. Looked at: {_listing(looked)}. Give an existing path, world:NAME or "
        "hf:OWNER/NAME[:SPLIT]."
    )


def resolve_test_data(ref: str, data: str | None, folder: Path | None) -> Path | HubReference:
    """As ``resolve_reference``, where ``data:NAME`` is in ``data``, the recipe's folder of test sets (evaluation.data).

    Errors: ConfigError too where ``data`` is needed and not set, or is not a local folder.
    """
    if not ref.startswith("data:"):
        return resolve_reference(ref, folder)
    place = test_data_folder(data, folder)
    if place is None:
        raise ConfigError(
            f"{ref}: evaluation.data is not set. Give the folder with the test sets (--data FOLDER), or a path instead."
        )
    name = ref.removeprefix("data:")
    if not os.path.exists(place / name):
        there = ", ".join(sorted(path.name for path in place.iterdir())) or "nothing"
        raise ConfigError(f"{ref}: no such file or folder in {place.absolute()}. It holds: {there}.")
    return place / name


def test_data_folder(data: str | None, folder: Path | None) -> Path | None:
    """The folder that evaluation.data names, if it names one. ConfigError if it is no local folder."""
    if data is None:
        return None
    place = resolve_reference(data, folder)
    if isinstance(place, HubReference) or not place.is_dir():
        raise ConfigError(f"evaluation.data = {data}: it must be a local folder, with one folder for each test set.")
    return place


def resolve_model(ref: str, folder: Path | None = None, *, revision: str | None = None) -> Path | HubReference:
    """The folder of a model, or its hub id: an existing folder wins over a hub id of the same spelling.

    Errors: ConfigError if ``ref`` is neither (with the places looked at), or names a run directory instead of a model.
    """
    if ref.startswith("world:"):
        return _world(ref)
    looked = _places(ref, folder)
    for place in looked:
        if os.path.isdir(place):
            return _model_folder(place)
    hub_name = ref.removeprefix("hf:")
    if _HUB_NAME.fullmatch(hub_name):
        return HubReference("model", hub_name, revision=revision)
    raise ConfigError(
        f"{ref}: no such model. It is no folder (looked at: {_listing(looked)}) and not shaped like a hub id, "
        "OWNER/NAME. Give a folder with config.json, a hub id, or world:base."
    )


def _model_folder(place: Path) -> Path:
    if (place / "config.json").exists() or not (place / "models").is_dir():
        return place
    arms = sorted(str(arm) for arm in (place / "models").iterdir() if arm.is_dir())
    raise ConfigError(
        f"{place}: this is a run directory, not a model. Its models: {', '.join(arms) or 'none yet'}. Name one of them."
    )


def _world(ref: str) -> Path:
    name = ref.removeprefix("world:")
    place = WORLD_FOLDER / "base" if name == "base" else WORLD_FOLDER / "files" / name
    # parents[...] and not a string prefix, so that neither `..` nor an absolute name can leave the folder
    if name and os.path.exists(place) and WORLD_FOLDER.resolve() in place.resolve().parents:
        return place
    known = [
        path.name for path in (WORLD_FOLDER / "base", *sorted((WORLD_FOLDER / "files").glob("*"))) if path.exists()
    ]
    near = difflib.get_close_matches(name, known, 1)
    raise ConfigError(
        f"{ref}: the embedded world has no such file. "
        + (f"Did you mean world:{near[0]}? " if near else "")
        + f"It has: {', '.join(known) or 'nothing'}."
    )


def _hub_dataset(ref: str) -> HubReference:
    match = _HUB_DATASET.fullmatch(ref)
    if not match:
        raise ConfigError(f"{ref}: not a hub data set. Write hf:OWNER/NAME, or hf:OWNER/NAME/FOLDER@REVISION:SPLIT.")
    return HubReference("dataset", match["name"], match["split"], match["revision"], match["folder"])


def _places(ref: str, folder: Path | None) -> list[Path]:
    path = Path(ref).expanduser()
    if path.is_absolute() or folder is None or folder.resolve() == Path.cwd():
        return [path]
    return [folder / path, path]


def _listing(places: list[Path]) -> str:
    return ", ".join(str(place.absolute()) for place in places)
