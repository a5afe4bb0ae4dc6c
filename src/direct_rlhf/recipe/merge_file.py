"""The merge file: its schema, in mergekit's shape where it means the same, and what it says for each tensor.

Torch-free. What differs from mergekit: all is computed in float32, so `dtype` only says what is stored; `slices` must
be all layers of all models; `tokenizer_source: union`, `modules` and `chat_template` do not exist. `seed`, `reference`,
`vocabulary` and `shard_size` are ours.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, ValidationError

from direct_rlhf.errors import ConfigError
from direct_rlhf.recipe.explain import explain
from direct_rlhf.recipe.merge_methods import PARAMETERS, MethodParameters
from direct_rlhf.recipe.merge_settings import Scalar, Setting
from direct_rlhf.recipe.schema import Section
from direct_rlhf.recipe.source import Document

Dtype = Literal["float32", "bfloat16", "float16"]


class ModelEntry(Section):
    model: str = Field(min_length=1)
    """A folder, a hub id with or without @REVISION, or world:base; `MODEL+ADAPTER` adds a LoRA adapter."""
    parameters: dict[str, Any] = Field(default_factory=dict)
    """Of this model alone: weight, density and what else the method has for each model."""


class SourceEntry(ModelEntry):
    layer_range: tuple[int, int]
    """First layer and the one after the last: all layers of the model."""


class SliceEntry(Section):
    sources: list[SourceEntry] = Field(min_length=1)
    """The models."""
    parameters: dict[str, Any] = Field(default_factory=dict)
    """As the file's own; these win."""


class MergeFile(Section):
    merge_method: str
    """One of our methods, or mergekit's name for it."""
    base_model: str | None = None
    """What the differences are taken to, and whose config the result has."""
    models: list[ModelEntry] = Field(default_factory=list)
    """What is merged. If base_model is among them, methods that merge differences to it leave it out."""
    slices: list[SliceEntry] = Field(default_factory=list)
    """Instead of models: one slice of all layers."""
    parameters: dict[str, Any] = Field(default_factory=dict)
    """Of the method."""
    dtype: Dtype | None = None
    """What is stored, if out_dtype does not say it. All is computed in float32."""
    out_dtype: Dtype | None = None
    """What is stored. Default: what base_model (else the first model) stores each tensor in."""
    tokenizer_source: str = "base"
    """Whose tokenizer, generation config and vocabulary rows the result has: base, or one of the models."""
    vocabulary: Literal["same", "common_rows"] = "same"
    """same: models of other vocabularies are refused. common_rows: tokens that all models have are merged; the rows
    that only some have are those of tokenizer_source."""
    seed: int = Field(0, ge=0)
    """Of methods that draw."""
    reference: str | None = None
    """Settings of another code, for methods that know some: original, mergekit or fusion_bench."""
    shard_size: str = Field(
        "5GB", pattern=r"^\d+(\.\d+)? ?[KMGT]?i?B?$", json_schema_extra={"must": "be a size, such as 5GB or 500MB"}
    )
    """Largest size of one weights file."""


@dataclass(frozen=True)
class Expert:
    """A model that is merged."""

    ref: str  # as the file names it
    key: str  # what its random masks are drawn by: the reference; a model that is named twice gets a number as well
    settings: Mapping[str, Setting] = field(default_factory=dict)


@dataclass(frozen=True)
class LoadedMerge:
    """A checked merge file."""

    file: MergeFile
    name: str  # of the file, for messages
    folder: Path  # that relative paths start from
    yaml: str  # the file, as text
    method: str  # our name
    base: str | None
    experts: tuple[Expert, ...]
    settings: Mapping[str, Setting]  # of all models
    preset: Mapping[str, Any]  # what the name of the method and the keys outside `parameters` set
    layer_ranges: tuple[tuple[int, int], ...] = ()  # of each source, where the file has slices

    @property
    def parameters_class(self) -> type[MethodParameters]:
        return PARAMETERS[self.method]

    @property
    def frame(self) -> str:
        """The model whose config, names and types the result has."""
        return self.base or self.experts[0].ref

    @property
    def tokenizer_source(self) -> str:
        return self.frame if self.file.tokenizer_source == "base" else self.file.tokenizer_source

    @cached_property
    def shard_bytes(self) -> int:
        """The largest size of a file."""
        text = self.file.shard_size.removesuffix("B")
        base = 1024 if text.endswith("i") else 1000
        text = text.removesuffix("i")
        number = text.rstrip(" KMGT")
        return max(1, int(float(number) * base ** " KMGT".index(text[len(number) :].strip() or " ")))

    @cached_property
    def _made(self) -> dict[tuple[tuple[str, Any], ...], MethodParameters]:
        return {}

    def parameters(self, tensor: str, depth: float) -> MethodParameters:
        """The method's parameters for one tensor; equal ones are one object.

        Errors: ConfigError if they do not go together.
        """
        values = self.values(tensor, depth)
        key = tuple(sorted(values.items()))
        if key not in self._made:
            self._made[key] = self._make(values)
        return self._made[key]

    def values(self, tensor: str, depth: float) -> dict[str, Scalar | tuple[Scalar | None, ...]]:
        """What the file says for one tensor, by our names. Of one per expert, None is where it says nothing."""
        found: dict[str, Any] = dict(self.preset)
        for name, setting in self.settings.items():
            if setting.fits(tensor):
                found[name] = setting.at(tensor, depth)
        per_expert = self.parameters_class.per_expert()
        for name in sorted({name for expert in self.experts for name in expert.settings}):
            each = [
                expert.settings[name].at(tensor, depth) if name in expert.settings else None for expert in self.experts
            ]
            found[name] = tuple(found.get(name) if value is None else value for value in each)
        return {
            name: (value,) if name in per_expert and not isinstance(value, tuple) else value
            for name, value in found.items()
        }

    def _make(self, values: Mapping[str, Any]) -> MethodParameters:
        partial = [name for name, value in values.items() if isinstance(value, tuple) and None in value]
        whole = {name: value for name, value in values.items() if name not in partial}
        try:
            parameters = self.parameters_class.model_validate(whole)
            for name in partial:
                others = getattr(parameters, name)
                if others is None:
                    raise ConfigError(f"{name}: some models have it and others do not. Give it to all of them.")
                others = others * len(self.experts) if len(others) == 1 else others
                whole[name] = tuple(o if v is None else v for v, o in zip(values[name], others, strict=True))
            parameters = self.parameters_class.model_validate(whole) if partial else parameters
        except ValidationError as error:
            raise ConfigError("\n".join(explain(error, Document({}), self.parameters_class))) from error
        parameters.check(len(self.experts), base=self.base is not None)
        return parameters
