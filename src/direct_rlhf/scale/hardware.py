"""What a GPU, a node and a network are taken to do: vendors' peaks, and the shares of them that are assumed."""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import yaml

from direct_rlhf.errors import ConfigError

TERA, GIGA = 1e12, 1e9


@dataclass(frozen=True)
class Hardware:
    """A profile. Bytes and seconds; links are one way; ``network`` is of a whole node."""

    name: str
    memory: float  # bytes of a GPU
    bfloat16: float  # dense FLOP/s
    float32: float  # FLOP/s
    bandwidth: float  # of the GPU's memory, bytes/s
    link: float  # of a GPU to the others of its node, bytes/s
    network: float  # of a node to the others, bytes/s
    host_memory: float  # bytes of CPU memory of a node
    # Assumed, as they depend on the work
    compute_use: float = 0.4  # share of the FLOP/s that training and scoring reach
    bandwidth_use: float = 0.6  # share of the memory's bandwidth that decoding reaches
    traffic_use: float = 0.8  # share of link and network that collectives reach
    usable: float = 0.9  # share of the memory; the rest is context, kernels, and what lies between blocks
    link_latency: float = 3.4e-6  # seconds of a step of a ring within a node
    network_latency: float = 14e-6  # the same between nodes
    layer_latency: float = 1e-4  # seconds in which a layer's kernels are started, when decoding
    exchange: float = 1e9  # bytes/s of what travels between CPUs (gloo)
    source: str = "given by the user"


PROFILES = {
    profile.name: profile
    for profile in (
        Hardware(
            name="a100-80gb",
            memory=80 * GIGA,
            bfloat16=312 * TERA,
            float32=19.5 * TERA,
            bandwidth=2.039 * TERA,
            link=300 * GIGA,
            network=8 * 25 * GIGA,
            host_memory=2 * TERA,
            source="NVIDIA A100 80GB SXM and DGX A100 data sheets: NVLink 600 GB/s both ways, 8 x 200 Gbit/s, 2 TB",
        ),
        Hardware(
            name="h100",
            memory=80 * GIGA,
            bfloat16=989 * TERA,
            float32=67 * TERA,
            bandwidth=3.35 * TERA,
            link=450 * GIGA,
            network=8 * 50 * GIGA,
            host_memory=2 * TERA,
            source="NVIDIA H100 SXM and DGX H100 data sheets: NVLink 900 GB/s both ways, 8 x 400 Gbit/s, 2 TB",
        ),
        Hardware(
            name="h200",
            memory=141 * GIGA,
            bfloat16=989 * TERA,
            float32=67 * TERA,
            bandwidth=4.8 * TERA,
            link=450 * GIGA,
            network=8 * 50 * GIGA,
            host_memory=2 * TERA,
            source="NVIDIA H200 SXM and DGX H200 data sheets: NVLink 900 GB/s both ways, 8 x 400 Gbit/s, 2 TB",
        ),
        Hardware(
            name="l40s",
            memory=48 * GIGA,
            bfloat16=362 * TERA,
            float32=91.6 * TERA,
            bandwidth=0.864 * TERA,
            link=32 * GIGA,
            network=2 * 25 * GIGA,
            host_memory=1 * TERA,
            link_latency=5.7e-6,
            source="NVIDIA L40S data sheet: PCIe 4 x16, 64 GB/s both ways; 2 x 200 Gbit/s and 1 TB a node are assumed",
        ),
    )
}


def hardware(name: str) -> Hardware:
    """A profile by its name, or that of a YAML file with the fields of `Hardware` (``like: NAME`` fills the rest).

    Errors: ConfigError for an unknown name or field, and for a value that is not a positive number.
    """
    if name in PROFILES:
        return PROFILES[name]
    path = Path(name)
    if path.suffix not in (".yaml", ".yml") or not path.is_file():
        raise ConfigError(
            f"--hardware {name}: no such profile, and no YAML file of that name. Known: {', '.join(PROFILES)}."
        )
    try:
        given = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ConfigError(f"--hardware {name}: not YAML ({str(error).splitlines()[0]}).") from error
    if not isinstance(given, Mapping):
        raise ConfigError(f"--hardware {name}: must be a section, with keys such as memory: 80e9.")
    return _from_file(path, dict(given))


def _from_file(path: Path, given: dict[str, Any]) -> Hardware:
    like = given.pop("like", None)
    if like is not None and like not in PROFILES:
        raise ConfigError(f"--hardware {path}: like = {like}: no such profile. Known: {', '.join(PROFILES)}.")
    numbers = [field.name for field in fields(Hardware) if field.type is float or field.type == "float"]
    values: dict[str, Any] = {name: getattr(PROFILES[like], name) for name in numbers} if like else {}
    for key, value in given.items():
        if key not in numbers:
            raise ConfigError(f"--hardware {path}: {key}: unknown key. Known: like, {', '.join(numbers)}.")
        values[key] = _positive(path, key, value)
    required = [field.name for field in fields(Hardware) if field.name in numbers and field.default is not None]
    missing = [name for name in required[:7] if name not in values]
    if missing:
        raise ConfigError(f"--hardware {path}: {', '.join(missing)}: required, or name a profile with like: h100.")
    return Hardware(name=path.stem, **values)


def _positive(path: Path, key: str, value: Any) -> float:
    try:
        number = float(value) if not isinstance(value, bool) else 0.0
    except (TypeError, ValueError):
        number = 0.0
    if not 0 < number < float("inf"):
        raise ConfigError(f"--hardware {path}: {key} = {value}: must be a positive number, such as 80e9.")
    return number
