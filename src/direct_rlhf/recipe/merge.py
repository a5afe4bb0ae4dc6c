"""From a merge file, or its content in Python, to a checked one: `load_merge`, `merge_of`.

Every problem of a file is reported at once, one per line, each with its place, in one ConfigError; no model is looked
for.
"""

import difflib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

import yaml
from pydantic import ValidationError

from direct_rlhf.errors import ConfigError
from direct_rlhf.recipe.explain import at, explain, line, validate_as
from direct_rlhf.recipe.fields import KeyPath, is_number, type_words
from direct_rlhf.recipe.merge_file import Expert, LoadedMerge, MergeFile, ModelEntry, SourceEntry
from direct_rlhf.recipe.merge_methods import OTHER_METHODS, PARAMETERS, MethodParameters, OtherMethod
from direct_rlhf.recipe.merge_settings import Setting, read_setting
from direct_rlhf.recipe.source import Document, RecipeDumper, dotted, read_yaml

_DISAPPEARED = {  # keys of mergekit's that are known and refused, and why
    "modules": "models of several modules are not merged",
    "chat_template": "the tokenizer keeps its own; change it in the merged model",
    "tokenizer": "tokens are not mapped; use tokenizer_source",
    "allow_crimes": "models that do not fit together are not merged",
}


def load_merge(ref: str | Path) -> LoadedMerge:
    """Read a merge file. Errors: ConfigError with one line per problem."""
    file = Path(ref).expanduser()
    document = read_yaml(file, str(ref), "merge file")
    text = file.read_bytes().decode("utf-8-sig") if not document.problems else ""
    return _check(document, file.parent, str(ref), text)


def merge_of(values: Mapping[str, Any], folder: Path, *, name: str = "merge") -> LoadedMerge:
    """A merge file made in Python. Errors: ConfigError with one line per problem."""
    text = yaml.dump(dict(values), Dumper=RecipeDumper, sort_keys=False, allow_unicode=True, width=100)
    return _check(Document(dict(values)), folder, name, text)


def _check(document: Document, folder: Path, name: str, text: str) -> LoadedMerge:
    document.problems += _known_elsewhere(document)
    file = None
    if document.data or not document.problems:
        file = validate_as(MergeFile, document) or _without_unknown_keys(document)
    loaded = _Reader(file, document).read(folder, name, text) if file else None
    if loaded is None or document.problems:
        raise ConfigError("\n".join(document.problems))
    return loaded


def _without_unknown_keys(document: Document) -> MergeFile | None:
    """For the other problems of a file with unknown keys; None if more than those is wrong."""
    try:
        return MergeFile.model_validate({k: v for k, v in document.data.items() if k in MergeFile.model_fields})
    except ValidationError:
        return None


def _known_elsewhere(document: Document) -> Iterator[str]:
    for key in _DISAPPEARED.keys() & document.data.keys():
        del document.data[key]
        yield f"{key}: {_DISAPPEARED[key]}{at((key,), document)}."


class _Reader:
    """From the keys of a file that pydantic has passed to what they mean together; notes what is wrong."""

    def __init__(self, file: MergeFile, document: Document) -> None:
        self.file, self.document = file, document

    def read(self, folder: Path, name: str, text: str) -> LoadedMerge | None:
        method = self._method()
        entries, parents = self._entries()
        if method is None or not entries:
            return None
        parameters_class = PARAMETERS[method.name]
        settings: dict[str, Setting] = {}
        for parent in parents:
            settings |= self._settings(parent, parameters_class, alone=False)
        base = self.file.base_model
        models = [(e, self._settings(path, parameters_class, alone=True)) for e, path in entries]
        experts = self._experts(models, parameters_class, [path for _, path in entries])
        self._tokenizer([expert.ref for expert in experts])
        loaded = LoadedMerge(
            file=self.file,
            name=name,
            folder=folder,
            yaml=text,
            method=method.name,
            base=base,
            experts=tuple(experts),
            settings=settings,
            preset=self._preset(method, parameters_class),
            layer_ranges=tuple(entry.layer_range for entry, _ in entries if isinstance(entry, SourceEntry)),
        )
        if not self.document.problems:
            self._together(loaded)
        return loaded

    def _problem(self, path: KeyPath, value: Any, reason: str, suggestion: str = "") -> None:
        self.document.problems.append(line(path, value, reason, self.document, suggestion))

    def _say(self, path: KeyPath, reason: str) -> None:
        self.document.problems.append(f"{dotted(path)}: {reason}{at(path, self.document)}.")

    def _method(self) -> OtherMethod | None:
        name = self.file.merge_method
        if name in PARAMETERS:
            return OtherMethod(name, {})
        if name in OTHER_METHODS:
            return OTHER_METHODS[name]
        known = [*PARAMETERS, *OTHER_METHODS]
        near = difflib.get_close_matches(name.lower().replace("-", "_"), known, 1)
        hint = f"Did you mean {near[0]}?" if near else ""
        self._problem(("merge_method",), name, f"must be one of: {', '.join(known)}", hint)
        return None

    def _entries(self) -> tuple[list[tuple[ModelEntry, KeyPath]], list[KeyPath]]:
        """The models with their paths, and the paths of the parameters of all, the last of which wins."""
        if self.file.models and self.file.slices:
            self._say(("slices",), "give models or slices, not both")
        elif len(self.file.slices) > 1:
            self._say(("slices",), "only one slice of all layers is merged; give one, or models")
        elif self.file.slices:
            sources = self.file.slices[0].sources
            entries = [(source, ("slices", 0, "sources", i)) for i, source in enumerate(sources)]
            return list(entries), [("parameters",), ("slices", 0, "parameters")]
        elif not self.file.models:
            self.document.problems.append("models: is required: what is merged, each as `- model: FOLDER`.")
        return [(entry, ("models", i)) for i, entry in enumerate(self.file.models)], [("parameters",)]

    def _experts(
        self,
        models: Sequence[tuple[ModelEntry, Mapping[str, Setting]]],
        parameters_class: type[MethodParameters],
        paths: Sequence[KeyPath],
    ) -> list[Expert]:
        base = self.file.base_model
        chosen = []
        for (entry, settings), path in zip(models, paths, strict=True):
            if entry.model != base or not parameters_class.needs_base:
                chosen.append((entry.model, settings))
            elif settings:
                self._say((*path, "parameters"), "this is base_model, which has none: differences are taken to it")
        if parameters_class.experts == (2, 2) and base is not None:  # as mergekit has it, the base is the first of two
            if len(chosen) == 1 and chosen[0][0] != base:
                chosen.insert(0, (base, {}))
            chosen.sort(key=lambda model: model[0] != base)
        if not chosen:
            self._say(("models",), "holds nothing but base_model")
        seen: dict[str, int] = {}
        experts = []
        for ref, settings in chosen:
            seen[ref] = seen.get(ref, 0) + 1
            experts.append(Expert(ref, ref if seen[ref] == 1 else f"{ref}#{seen[ref]}", settings))
        return experts

    def _settings(self, parent: KeyPath, of: type[MethodParameters], *, alone: bool) -> dict[str, Setting]:
        """The parameters written at ``parent``, by our names; ``alone``: those of one model."""
        path = (*parent, "parameters") if alone else parent
        found: dict[str, Setting] = {}
        keys: dict[str, str] = {}  # as they are written
        for key, value in (_dig(self.document.data, path) or {}).items():
            here = (*path, key)
            name = key if key in of.model_fields else of.other_names.get(key, key)
            if name in found:
                self._say(here, f"is the same as {keys[name]}, which is given too. Keep one")
            elif name not in of.model_fields:
                legal = [*of.model_fields, *of.other_names]
                near = difflib.get_close_matches(key, legal, 1, cutoff=0.65)
                has = f"{self.file.merge_method} has: {', '.join(legal)}."
                hint = f"Did you mean {dotted((*path, near[0]))}?" if near else has
                self.document.problems.append(f"{dotted(here)}: unknown parameter{at(here, self.document)}. {hint}")
            elif alone and name not in of.per_expert():
                self._say(here, f"is one value for the whole merge. Move it to parameters.{key}")
            else:
                written = read_setting(value, here)
                for place, given, reason in written.problems:
                    self._problem(place, given, reason)
                for place, given in written.values:
                    self._value(of, name, place, given)
                found[name], keys[name] = written.setting, key
        return found

    def _value(self, of: type[MethodParameters], name: str, place: KeyPath, value: Any) -> None:
        """Whether a value is one that the parameter may have."""
        single = name in of.per_expert()
        annotation = _item(of.model_fields[name].annotation) if single else of.model_fields[name].annotation
        if isinstance(value, bool) and is_number(annotation):
            self._problem(place, value, f"must be a {type_words(annotation)}")
            return
        try:
            of.model_validate({name: (value,) if single else value})
        except ValidationError as error:
            mine = [found for found in error.errors() if found["loc"][:1] == (name,)]
            lines = explain(error, self.document, of, lambda path: place)
            if mine:
                self.document.problems += lines[:1]

    def _preset(self, method: OtherMethod, of: type[MethodParameters]) -> dict[str, Any]:
        preset: dict[str, Any] = dict(method.settings)
        if "seed" in of.model_fields:
            preset["seed"] = self.file.seed
        if self.file.reference is not None:
            if "reference" in of.model_fields:
                preset["reference"] = self.file.reference
                self._value(of, "reference", ("reference",), self.file.reference)
            elif self.file.reference not in ("original", "mergekit", "fusion_bench"):
                self._problem(("reference",), self.file.reference, "must be one of: original, mergekit, fusion_bench")
        return preset

    def _tokenizer(self, experts: Sequence[str]) -> None:
        source = self.file.tokenizer_source
        known = list(dict.fromkeys(["base", *([self.file.base_model] if self.file.base_model else []), *experts]))
        if source == "union":
            self._problem(
                ("tokenizer_source",),
                source,
                "vocabularies are not joined: a row that only one model has would meet no row of the others",
                "Use base or one of the models, with vocabulary: common_rows if they differ.",
            )
        elif source not in known:
            near = difflib.get_close_matches(source, known, 1)
            hint = f"Did you mean {near[0]}?" if near else ""
            self._problem(("tokenizer_source",), source, f"must be one of: {', '.join(known)}", hint)

    def _together(self, loaded: LoadedMerge) -> None:
        """Whether the parameters go together, where that does not depend on the tensor."""
        settings = [*loaded.settings.values(), *(s for expert in loaded.experts for s in expert.settings.values())]
        try:
            if all(setting.everywhere for setting in settings):
                loaded.parameters("", 0.0)
            else:
                loaded.parameters_class.model_validate({}).check(len(loaded.experts), base=loaded.base is not None)
        except ConfigError as error:
            self.document.problems.append(f"{self.file.merge_method}: {error}{at(('merge_method',), self.document)}.")


def _dig(data: Any, path: KeyPath) -> Any:
    for part in path:
        data = data[int(part)] if isinstance(data, list) else data.get(part)
        if data is None:
            return None
    return data


def _item(annotation: Any) -> Any:
    """The type of one number of a parameter that has one for each expert."""
    for option in (annotation, *get_args(annotation)):
        arguments = get_args(option)
        if arguments and arguments[-1] is Ellipsis:
            return (get_args(arguments[0]) or arguments)[0]
    return annotation
