"""The parameters of every merge method, torch-free: names, defaults, ranges, and mergekit's other names for them.

A parameter that every expert has for itself (`weight`, `density`) is a tuple here, one number an expert or one for all,
already resolved for one tensor; merge files also give one number for all, a list over the layers, or values by tensor
name. ``reference`` sets what decides the result beside the numbers (scope, merge, rescaling, rounding) to what the
named code does; a setting that is given as well wins over it. Defaults are the project's own choices.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal, Self, get_args, get_origin

from pydantic import Field, model_validator

from direct_rlhf.errors import ConfigError
from direct_rlhf.recipe.schema import Section

Weights = tuple[float, ...]
Shares = tuple[Annotated[float, Field(ge=0, le=1)], ...]
Rescale = Literal["inverse", "l1", "none"]
Merge = Literal["mean", "sum"]
ZeroSign = Literal["majority", "positive"]
Settings = dict[str, Any]

OTHER_NAMES = {"lambda": "scale", "alpha": "scale", "normalize": "merge"}  # `alpha` as in the papers
OTHER_VALUES = {"merge": {True: "mean", False: "sum"}, "rescale": {True: "l1", False: "none"}}  # as mergekit means them


class MethodParameters(Section):
    """Base of every method's parameters."""

    experts: ClassVar[tuple[int, int | None]] = (1, None)
    """Fewest and most experts of the method."""
    needs_base: ClassVar[bool] = True
    """Whether it works on differences to a base."""
    other_names: ClassVar[Mapping[str, str]] = OTHER_NAMES
    """Names that mergekit or the papers have for our parameters."""
    references: ClassVar[Mapping[str, Settings]] = {}
    """What each `reference` sets."""

    precision: Literal["float32", "float64"] = "float32"
    """What is computed in; the result is cast once. float64 is for checks."""

    @model_validator(mode="before")
    @classmethod
    def _settle(cls, data: Any) -> Any:
        """Our names for others' names, one number for all experts, and what a reference sets for what is not given."""
        if not isinstance(data, Mapping):
            return data
        given: dict[str, Any] = {}
        for key, value in data.items():
            name = key if key in cls.model_fields else cls.other_names.get(key, key)
            if name in given:
                raise ValueError(f"{key} and {name} are the same parameter: give one of them")
            is_truth = isinstance(value, bool) and name in OTHER_VALUES
            given[name] = OTHER_VALUES[name][value] if is_truth else value
        for name in cls.per_expert() & given.keys():
            if isinstance(given[name], int | float) and not isinstance(given[name], bool):
                given[name] = (given[name],)
        preset = cls.references.get(given.get("reference"), {})  # type: ignore[arg-type]  # None is no key
        return {**preset, **given}

    @classmethod
    def per_expert(cls) -> set[str]:
        """The names of the parameters that are one number an expert."""
        return {
            name
            for name, field in cls.model_fields.items()
            if any(get_origin(option) is tuple for option in (field.annotation, *get_args(field.annotation)))
        }

    def of(self, name: str, count: int) -> tuple[float, ...]:
        """Parameter ``name`` of each of ``count`` experts."""
        values: tuple[float, ...] = getattr(self, name)
        return values * count if len(values) == 1 else values

    def check(self, count: int, *, base: bool) -> None:
        """Whether ``count`` experts, with or without a base, can be merged so: ConfigError if not.

        What needs no weights to be seen; a merge file is checked with it before a checkpoint is opened.
        """
        fewest, most = self.experts
        if count < fewest or (most is not None and count > most):
            number = (
                f"at least {fewest}" if most is None else f"exactly {fewest}" if most == fewest else f"{fewest}-{most}"
            )
            raise ConfigError(f"needs {number} models to merge, got {count}")
        for name in sorted(self.per_expert()):
            values = getattr(self, name)
            if values is not None and len(values) not in (1, count):
                raise ConfigError(f"{name} has {len(values)} numbers for {count} models: give one, or one for each")
        if self.needs_base and not base:
            raise ConfigError("needs a base_model: it merges differences to a base")


class Weighted(MethodParameters):
    """A weight for each expert, and one scale for what they add up to."""

    weight: Weights = (1.0,)
    """Factor on each expert's difference to the base."""
    scale: float = 1.0
    """Factor on the merged difference; 0 gives the base."""


class Electing(Weighted):
    """Methods that may elect a sign for each entry before they merge."""

    merge: Merge = "mean"
    """mean: divided by the weights of the experts that are merged (at each entry, if signs are elected). sum: not."""
    zero_sign: ZeroSign = "majority"
    """Where weighted entries cancel exactly: the sign that most entries of the tensor elect, or always +."""


class LinearParameters(MethodParameters):
    needs_base: ClassVar[bool] = False
    other_names: ClassVar[Mapping[str, str]] = {}
    weight: Weights = (1.0,)
    """Weight of each model."""
    normalize: bool = True
    """Divide by the sum of the weights."""

    def check(self, count: int, *, base: bool) -> None:
        super().check(count, base=base)
        if self.normalize and sum(self.of("weight", count)) == 0:
            raise ConfigError(
                "the weights add up to 0, so their sum cannot divide: change one, or set normalize: false"
            )


class SlerpParameters(MethodParameters):
    experts: ClassVar[tuple[int, int | None]] = (2, 2)
    needs_base: ClassVar[bool] = False
    t: float = Field(0.5, ge=0, le=1)
    """Place on the arc: 0 is the first model, 1 the second."""
    on: Literal["weights", "delta"] = "weights"
    """What is interpolated: the weights, or their differences to the base."""

    def check(self, count: int, *, base: bool) -> None:
        super().check(count, base=base)
        if self.on == "delta" and not base:
            raise ConfigError("on: delta needs a base_model")


class TaskArithmeticParameters(Weighted):
    scale: float = 0.3
    """Factor on the merged difference; 0 gives the base."""
    merge: Merge = "sum"
    """mean: divided by the sum of the weights. sum: not."""


class TiesParameters(Electing):
    reference: Literal["original", "mergekit", "fusion_bench"] | None = None
    """Set scope, merge, zero_sign and at_cut to what this code does."""
    references: ClassVar[Mapping[str, Settings]] = {
        "original": {"scope": "global", "merge": "mean", "at_cut": "all"},
        "fusion_bench": {"scope": "global", "merge": "sum", "at_cut": "all"},
        "mergekit": {"scope": "tensor", "merge": "mean", "zero_sign": "positive"},
    }
    density: Shares = (0.2,)
    """Share of each expert's entries that is kept, the largest."""
    scope: Literal["tensor", "global"] = "tensor"
    """Whether the largest are sought in each tensor or in the whole model."""
    at_cut: Literal["exact", "all"] = "exact"
    """exact: max(1, int(density n)) entries. all: everything as large as the next smaller one, as ties-merging does."""


class Dropping(Weighted):
    """Methods that drop entries at random."""

    density: Shares = (0.5,)
    """Share of each expert's entries that is kept, at random: 1 - p."""
    rescale: Rescale = "inverse"
    """What makes up for the dropped: inverse: each entry is divided by its chance to stay. l1: the tensor's sum of
    absolute values is restored, as mergekit does. none: nothing."""
    seed: int = Field(0, ge=0)
    """Seed of the random masks; they also depend on the expert and the tensor's name, and on nothing else."""


class DareLinearParameters(Dropping):
    reference: Literal["mergekit", "fusion_bench"] | None = None
    """Set rescale to what this code does."""
    references: ClassVar[Mapping[str, Settings]] = {"mergekit": {"rescale": "l1"}, "fusion_bench": {}}
    scale: float = 0.3
    """Factor on the merged difference; 0 gives the base."""
    merge: Merge = "sum"
    """mean: divided by the sum of the weights. sum: not."""


class DareTiesParameters(Dropping, Electing):
    reference: Literal["mergekit", "fusion_bench"] | None = None
    """Set rescale, trim, scope, merge, zero_sign and at_cut to what this code does."""
    references: ClassVar[Mapping[str, Settings]] = {
        "mergekit": {"rescale": "l1", "merge": "sum", "zero_sign": "positive"},
        "fusion_bench": {"trim": (0.2,), "scope": "global", "merge": "sum", "at_cut": "all"},
    }
    trim: Shares | None = None
    """Share that TIES keeps of what DARE left, the largest of all entries. Default: all of it."""
    scope: Literal["tensor", "global"] = "tensor"
    """Whether trim seeks the largest in each tensor or in the whole model."""
    at_cut: Literal["exact", "all"] = "exact"
    """As in ties."""


class DellaParameters(Dropping, Electing):
    reference: Literal["original", "mergekit"] | None = None
    """Set rescale and zero_sign to what this code does."""
    references: ClassVar[Mapping[str, Settings]] = {
        "original": {"zero_sign": "positive"},
        "mergekit": {"rescale": "l1", "zero_sign": "positive"},
    }
    density: Shares = (0.7,)
    """Mean share of each row's entries that is kept."""
    epsilon: Shares = (0.07,)
    """Half the range of the chances: the smallest entry stays with density - epsilon, the largest with + epsilon."""
    elect: bool = True
    """Elect signs, as in ties. false: mergekit's della_linear."""

    @model_validator(mode="after")
    def _chances_are_chances(self) -> Self:
        count = max(len(self.density), len(self.epsilon))
        for density, epsilon in zip(self.of("density", count), self.of("epsilon", count), strict=False):
            if density < 1 and (density - epsilon <= 0 or density + epsilon >= 1):
                raise ValueError(
                    f"density {density} and epsilon {epsilon}: density - epsilon must be above 0 and density + epsilon "
                    "below 1 (density 1 drops nothing)"
                )
        return self


class BreadcrumbsParameters(Electing):
    reference: Literal["original", "mergekit"] | None = None
    """Set scope and zero_sign to what this code does."""
    references: ClassVar[Mapping[str, Settings]] = {
        "original": {"scope": "row"},
        "mergekit": {"scope": "tensor", "zero_sign": "positive"},
    }
    other_names: ClassVar[Mapping[str, str]] = {**OTHER_NAMES, "beta": "density"}
    density: Shares = (0.2,)
    """beta: share of the entries that is kept, the largest after those that gamma removes."""
    gamma: Shares = (0.1,)
    """Share of the entries that is removed as outliers, the largest."""
    scope: Literal["row", "tensor"] = "row"
    """Whether the largest are sought along the last dimension or in the whole tensor."""
    scale: float = 0.4
    """Factor on the merged difference; 0 gives the base."""
    merge: Merge = "sum"
    """As in ties."""
    elect: bool = False
    """Elect signs, as in ties: mergekit's breadcrumbs_ties."""


class ModelStockParameters(MethodParameters):
    reference: Literal["mergekit", "fusion_bench"] | None = None
    """Set average and clamp to what this code does."""
    references: ClassVar[Mapping[str, Settings]] = {
        "mergekit": {"average": "cosine", "clamp": False},
        "fusion_bench": {"average": "angle", "clamp": False},
    }
    average: Literal["cosine", "angle"] = "cosine"
    """What is averaged over the pairs of experts."""
    clamp: bool = True
    """Keep the ratio t within 0 and 1; without it a negative cosine extrapolates."""


class ConsensusParameters(Weighted):
    scale: float = 0.3
    """Factor on the merged difference; 0 gives the base."""
    mask_scale: tuple[Annotated[float, Field(ge=0)], ...] = (0.6,)
    """lambda_m: an expert claims an entry if its difference is more than this times what the others add to it."""
    agree: int = Field(2, ge=0)
    """k: an entry stays if this many experts claim it; 0 keeps all."""


class PcbParameters(Weighted):
    reference: Literal["original"] | None = None
    """Set scope and clamp_tails to what this code does."""
    references: ClassVar[Mapping[str, Settings]] = {"original": {"scope": "global", "clamp_tails": 1e-4}}
    density: Shares = (0.1,)
    """rho: share of the entries whose balance counts, the highest."""
    scale: float = 1.2
    """Factor on the merged difference; 0 gives the base."""
    scope: Literal["tensor", "global"] = "tensor"
    """Whether smallest, largest and quantile are sought in each tensor or in the whole model."""
    clamp_tails: float = Field(0.0, ge=0, lt=0.5)
    """Clamp magnitudes to these quantiles from below and above first (and the largest entry always, if not 0)."""


class MatrixParameters(Weighted):
    """Methods on singular values; of all tensors but matrices they take the mean of the differences."""

    svd: Literal["auto", "exact"] = "auto"
    """exact: a full SVD of every matrix. auto: the same to a stated bound, by products where that is faster."""
    rank_cap: bool = True
    """Use no direction below the numerical rank, which knows the rounding of bfloat16 and float16 weights."""


class IsoCParameters(MatrixParameters):
    reference: Literal["original", "fusion_bench"] | None = None
    """Set rank_cap to what this code does: the mean over all singular values."""
    references: ClassVar[Mapping[str, Settings]] = {
        "original": {"rank_cap": False},
        "fusion_bench": {"rank_cap": False},
    }


class SingularParameters(MatrixParameters):
    """Methods that put singular vectors of several experts side by side."""

    orthogonalise: Literal["pinv", "polar"] = "pinv"
    """pinv: directions that the experts share count once. polar: the nearest orthonormal matrix, not unique there."""
    rcond: float = Field(1e-3, gt=0, lt=1)
    """Singular values of the joint basis below this times the largest are shared directions (pinv)."""


class IsoCtsParameters(SingularParameters):
    reference: Literal["original", "fusion_bench"] | None = None
    """Set rank_cap, orthogonalise and rounding to what this code does."""
    references: ClassVar[Mapping[str, Settings]] = {
        name: {"rank_cap": False, "orthogonalise": "polar", "rounding": "nearest"}
        for name in ("original", "fusion_bench")
    }
    common: float = Field(0.8, ge=0, le=1)
    """Share of the directions that belongs to the experts' common space."""
    rounding: Literal["floor", "nearest"] = "floor"
    """Of the directions that each expert gets for itself; what is over goes to the common space."""


class TsvParameters(SingularParameters):
    reference: Literal["original", "fusion_bench"] | None = None
    """Set remainder, orthogonalise and rank_cap to what this code does."""
    references: ClassVar[Mapping[str, Settings]] = {
        name: {"remainder": "floor", "orthogonalise": "polar", "rank_cap": False}
        for name in ("original", "fusion_bench")
    }
    remainder: Literal["distribute", "floor"] = "distribute"
    """Directions that the number of experts does not divide: to the largest next singular values, or lost."""


class RTsvmParameters(TsvParameters):
    """R-TSVM in this project's own reading of its abstract: TSV-M with two ingredients, each with a switch."""

    weighting: bool = True
    """Outlier-aware weighting, before the decomposition: clamping, expert weights and the norm that follows."""
    threshold: float = Field(4.5, gt=0)
    """c: entries beyond this many robust standard deviations are outliers."""
    clamp: bool = True
    """Clamp the outliers."""
    power: float = Field(1.0, ge=0)
    """p: an expert's weight is (1 - its energy in outliers)^p; 0 gives all the same."""
    norm_cap: float | None = Field(1.5, ge=1)
    """G: largest factor that makes up for clamped energy; null is no limit."""
    rank: Literal["equal", "entropy", "stable"] = "entropy"
    """Sparsity-adaptive rank selection: directions in proportion to the entropy or stable rank. equal: as TSV-M."""


class WudiParameters(Weighted):
    reference: Literal["original", "fusion_bench"] | None = None
    """Set solver to what this code does."""
    references: ClassVar[Mapping[str, Settings]] = {"original": {"solver": "adam"}, "fusion_bench": {"solver": "adam"}}
    solver: Literal["exact", "adam"] = "exact"
    """exact: the least-squares solution. adam: a fixed number of steps of a fixed size from the sum of differences."""
    learning_rate: float = Field(1e-5, gt=0, lt=1)
    """Of adam; its steps are about this long at any scale of the weights."""
    steps: int = Field(300, ge=0)
    """Of adam."""


PARAMETERS: dict[str, type[MethodParameters]] = {
    "linear": LinearParameters,
    "slerp": SlerpParameters,
    "task_arithmetic": TaskArithmeticParameters,
    "ties": TiesParameters,
    "dare_linear": DareLinearParameters,
    "dare_ties": DareTiesParameters,
    "della": DellaParameters,
    "breadcrumbs": BreadcrumbsParameters,
    "model_stock": ModelStockParameters,
    "consensus_ta": ConsensusParameters,
    "pcb": PcbParameters,
    "tsv_m": TsvParameters,
    "iso_c": IsoCParameters,
    "iso_cts": IsoCtsParameters,
    "wudi": WudiParameters,
    "r_tsvm": RTsvmParameters,
}


@dataclass(frozen=True)
class OtherMethod:
    """What a method of another name is here: one of ours with these settings."""

    name: str
    settings: Settings


OTHER_METHODS = {  # mergekit's, where they mean a setting of ours
    "della_linear": OtherMethod("della", {"elect": False, "merge": "sum"}),
    "breadcrumbs_ties": OtherMethod("breadcrumbs", {"elect": True}),
}
