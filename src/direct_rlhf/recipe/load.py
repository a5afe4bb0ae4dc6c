"""From a file or a shipped name to a checked recipe: `load_recipe`.

Every problem of a recipe is reported at once, one per line, each with its place, in one ConfigError.
"""

import difflib
import hashlib
import json
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import yaml

from direct_rlhf.errors import ConfigError
from direct_rlhf.recipe.explain import validate
from direct_rlhf.recipe.schema import Recipe
from direct_rlhf.recipe.source import Document, RecipeDumper, apply_overrides, extend, read_yaml

SHIPPED_FOLDER = Path(__file__).parent / "shipped"


@dataclass(frozen=True)
class LoadedRecipe:
    """A checked recipe, complete with its defaults, and where its relative paths start from."""

    recipe: Recipe
    folder: Path  # that of the recipe file; the working folder for a shipped recipe
    sha256: str  # of the resolved recipe as canonical JSON
    yaml: str  # the resolved recipe: loading it again gives the same recipe

    @property
    def name(self) -> str:
        """Name of the run directory."""
        return self.recipe.name

    @classmethod
    def of(cls, recipe: Recipe, folder: Path) -> "LoadedRecipe":
        """A recipe made in Python, with its hash and text."""
        values = recipe.model_dump(mode="json")
        canonical = json.dumps(values, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
        text = yaml.dump(values, Dumper=RecipeDumper, sort_keys=False, allow_unicode=True, width=100)
        return cls(recipe, folder, hashlib.sha256(canonical.encode()).hexdigest(), text)

    def with_recipe(self, recipe: Recipe) -> "LoadedRecipe":
        """Another recipe in the same place."""
        return LoadedRecipe.of(recipe, self.folder)


def load_recipe(ref: str, overrides: Sequence[str] = ()) -> LoadedRecipe:
    """Read the recipe file or shipped recipe ``ref``, with `a.b=c` overrides on top.

    A recipe may say `extends: NAME-or-file`: it is then merged over that one (sections key by key, lists whole).
    Its name and description are its own; the name defaults to that of the file.
    Errors: ConfigError with one line per problem.
    """
    file = find_recipe(ref)
    document = _read(file, _display(file, ref), ())
    apply_overrides(document, overrides, Recipe().model_dump(mode="json"))
    recipe = validate(document) if document.data or not document.problems else None
    if recipe is None:
        raise ConfigError("\n".join(document.problems))
    return LoadedRecipe.of(recipe, Path.cwd() if file.parent == SHIPPED_FOLDER else file.parent)


def shipped_recipes() -> dict[str, Path]:
    """The recipes that come with the package, by name."""
    return {file.stem: file for file in sorted(SHIPPED_FOLDER.glob("*.yaml"))}


def find_recipe(ref: str, folder: Path | None = None) -> Path:
    """The file of a recipe: an existing file wins over a shipped name.

    Errors: ConfigError naming the nearest shipped recipe.
    """
    for place in ([folder / ref] if folder else []) + [Path(ref).expanduser()]:
        if os.path.isfile(place):  # not Path.is_file, which raises for a name that is too long
            return place
    shipped = shipped_recipes()
    if ref in shipped:
        return shipped[ref]
    near = difflib.get_close_matches(ref.removesuffix(".yaml"), list(shipped), 1)
    raise ConfigError(
        f"{ref}: no such recipe file, and no shipped recipe of that name. "
        + (f"Did you mean {near[0]}? " if near else "")
        + f"Shipped: {', '.join(shipped)}."
    )


def _display(file: Path, ref: str) -> str:
    return file.name if file.parent == SHIPPED_FOLDER else ref


def _read(file: Path, name: str, below: tuple[Path, ...]) -> Document:
    """One file with what it extends; ``below`` are the files that lead here."""
    document = read_yaml(file, name)
    base_ref = document.data.pop("extends", None)
    if not below and not document.problems:
        document.data.setdefault("name", re.sub(r"[^A-Za-z0-9._-]+", "-", file.stem).strip("._-")[:100] or "run")
    if base_ref is None:
        return document
    origin = document.origins[("extends",)]
    if not isinstance(base_ref, str):
        document.problems.append(f"extends ({origin}): must be text, the name or file of one recipe.")
        return document
    try:
        base_file = find_recipe(base_ref, file.parent)
    except ConfigError as error:
        document.problems.append(f"extends ({origin}): {error}")
        return document
    if base_file.resolve() in [place.resolve() for place in (*below, file)]:
        document.problems.append(f"extends ({origin}): {base_ref} is this recipe, or extends it: a circle.")
        return document
    base = _read(base_file, _display(base_file, base_ref), (*below, file))
    for own in ("name", "description"):
        base.data.pop(own, None)
    return extend(base, document)
