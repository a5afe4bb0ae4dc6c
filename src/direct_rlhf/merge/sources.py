"""From the names in a merge file to folders: paths, the embedded base, hub models, adapters with their bases.

Of a hub model the small files come first; its weights are fetched only when all checks have passed, which see the
headers of the weights through the hub.
"""

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from direct_rlhf.data.tokens import TOKENIZER_FILES
from direct_rlhf.errors import ConfigError, MergeError
from direct_rlhf.merge.adapters import CONFIG, WEIGHTS, is_adapter, read_adapter_config, with_adapter
from direct_rlhf.merge.checkpoints import INDEX, Checkpoint, TensorPlace, places_in, read_config, read_tensors
from direct_rlhf.recipe.merge_file import LoadedMerge
from direct_rlhf.recipe.references import HubReference, resolve_model

SMALL = ("config.json", "generation_config.json", INDEX, CONFIG, WEIGHTS, *TOKENIZER_FILES)

Place = Path | HubReference


@dataclass(frozen=True)
class Source:
    """A model of the merge file, its small files at hand."""

    ref: str
    folder: Path
    adapter: Path | None
    hub: HubReference | None  # pinned to a commit
    config: Mapping[str, Any]

    @cached_property
    def _weights(self) -> list[str]:
        """The hub model's files of weights."""
        if not (self.folder / INDEX).is_file():
            return ["model.safetensors"]
        return sorted({place.file.name for place in self._remote().values()})

    @property
    def is_here(self) -> bool:
        """Whether nothing is left to fetch."""
        return self.hub is None or all((self.folder / name).is_file() for name in self._weights)

    def checkpoint(self) -> Checkpoint:
        """The model with the places of its tensors; those of a file that is still at the hub cannot be read."""
        tensors = read_tensors(self.folder, self.ref) if self.is_here else self._remote()
        commit = self.hub.revision if self.hub else None
        base = Checkpoint(self.ref, self.folder, self.config, tensors, commit)
        return with_adapter(base, self.adapter, self.ref) if self.adapter else base

    def fetch(self) -> None:
        """Fetch the weights."""
        if self.hub is not None and not self.is_here:
            _snapshot(self.hub, self._weights, self.ref)

    def _remote(self) -> dict[str, TensorPlace]:
        assert self.hub is not None
        return _remote_headers(self.hub, self.folder, self.ref)


def open_sources(merge: LoadedMerge) -> dict[str, Source]:
    """The models of a merge file by their names there.

    Errors: ConfigError if one is not to be found or fetched; MergeError if it is no model or an adapter without a base.
    """
    refs = dict.fromkeys([*([merge.base] if merge.base else []), *(expert.ref for expert in merge.experts)])
    return {ref: _open(ref, merge.folder, list(refs)) for ref in refs}


def _open(ref: str, folder: Path, named: list[str]) -> Source:
    model_ref, adapter_ref = _split(ref, folder)
    place, hub = _small_files(_locate(model_ref, folder), ref)
    adapter: Path | None = None
    if adapter_ref is not None:
        adapter, _ = _small_files(_locate(adapter_ref, folder), ref)
        if not (adapter / CONFIG).is_file():
            raise MergeError(f"{ref}: {adapter} is no adapter (it has no {CONFIG}).")
    elif is_adapter(place):
        adapter = place
        place, hub = _small_files(_base_of(adapter, ref, folder, named), ref)
    return Source(ref, place, adapter, hub, read_config(place, ref))


def _split(ref: str, folder: Path) -> tuple[str, str | None]:
    """(model, adapter) of `MODEL+ADAPTER`; a folder whose name has a + is a model."""
    model, plus, adapter = ref.partition("+")
    if not plus or any(os.path.isdir(place / ref) for place in (folder, Path())):
        return ref, None
    if not model or not adapter:
        raise ConfigError(f"{ref}: write an adapter on a model as MODEL+ADAPTER.")
    return model, adapter


def _locate(ref: str, folder: Path) -> Place:
    name, _, revision = ref.partition("@")
    if not revision or any(os.path.isdir(place / ref) for place in (folder, Path())):
        return resolve_model(ref, folder)
    return resolve_model(name, folder, revision=revision)


def _base_of(adapter: Path, ref: str, folder: Path, named: list[str]) -> Place:
    """The model that an adapter says it is for: a local one, or one that the merge file names too."""
    name = read_adapter_config(adapter, ref).get("base_model_name_or_path")
    if isinstance(name, str) and name:
        for place in (adapter / name, folder / name, Path(name)):
            if (place / "config.json").is_file():
                return place
        if name.startswith("world:") or name in [other.partition("@")[0] for other in named]:
            return _locate(next((other for other in named if other.partition("@")[0] == name), name), folder)
    raise MergeError(
        f"{ref}: an adapter for {name!r}, which is no folder here and not named in the merge file. Write MODEL+{ref}."
    )


def _small_files(place: Place, ref: str) -> tuple[Path, HubReference | None]:
    """The folder of a model without its weights, and the commit it is of."""
    if isinstance(place, Path):
        return place, None
    folder = _snapshot(place, list(SMALL), ref)
    return folder, HubReference("model", place.name, revision=folder.name)  # the cache names its folders by commit


def _snapshot(place: HubReference, files: list[str], ref: str) -> Path:
    from huggingface_hub import snapshot_download

    with _hub_errors(ref):
        return Path(snapshot_download(place.name, revision=place.revision, allow_patterns=files))


def _remote_headers(place: HubReference, folder: Path, ref: str) -> dict[str, TensorPlace]:
    from huggingface_hub import get_safetensors_metadata
    from huggingface_hub.errors import NotASafetensorsRepoError

    try:
        with _hub_errors(ref):
            files = get_safetensors_metadata(place.name, revision=place.revision).files_metadata
    except NotASafetensorsRepoError as error:
        raise MergeError(
            f"{ref}: it has no safetensors, and a pickle, which can run code, is not read. Name a revision with "
            "them, or convert the model: load it with transformers and save_pretrained it."
        ) from error
    found: dict[str, TensorPlace] = {}
    for name, file in files.items():
        entries = {
            tensor: {"dtype": info.dtype, "shape": info.shape, "data_offsets": info.data_offsets}
            for tensor, info in file.tensors.items()
        }
        found |= places_in(folder / name, entries, 0, ref)
    return found


@contextmanager
def _hub_errors(ref: str) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError) as error:  # every hub and connection error is one of the two
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ConfigError(
            f"{ref}: cannot be fetched from the Hugging Face hub ({reason}). Check the name and the connection "
            "(`hf auth login` for gated models), or give a folder that holds the model."
        ) from error


def fetch_missing(sources: Mapping[str, Source], say: Callable[[str], None]) -> bool:
    """Fetch what is still at the hub; whether there was anything."""
    missing = [source for source in sources.values() if not source.is_here]
    for source in missing:
        say(f"Fetching {source.ref} from the hub")
        source.fetch()
    return bool(missing)
