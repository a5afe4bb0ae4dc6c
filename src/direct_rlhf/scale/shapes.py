"""The shapes of models: how many weights there are, and where. The Llama family, whose arithmetic is written out here.

Numbers of the shapes by name are those of the models' published config.json.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from direct_rlhf.errors import ConfigError
from direct_rlhf.recipe.references import HubReference, resolve_model
from direct_rlhf.recipe.schema import LoraSection

FAMILY = ("llama", "mistral", "qwen2", "qwen3")  # model_type


@dataclass(frozen=True)
class Shape:
    """A decoder of the Llama family."""

    name: str
    layers: int
    hidden: int
    inner: int  # of the gated layer
    heads: int
    key_heads: int
    vocabulary: int
    head_size: int
    tied: bool = False  # the head is the embedding
    biases: bool = False  # of queries, keys and values (Qwen2)
    head_norms: bool = False  # of queries and keys (Qwen3)

    @property
    def query(self) -> int:
        return self.heads * self.head_size

    @property
    def key(self) -> int:
        return self.key_heads * self.head_size

    @property
    def linears(self) -> dict[str, tuple[int, int]]:
        """A layer's products: in and out."""
        hidden, inner = self.hidden, self.inner
        return {
            "q_proj": (hidden, self.query),
            "k_proj": (hidden, self.key),
            "v_proj": (hidden, self.key),
            "o_proj": (self.query, hidden),
            "gate_proj": (hidden, inner),
            "up_proj": (hidden, inner),
            "down_proj": (inner, hidden),
        }

    @property
    def products(self) -> int:
        """Weights of a layer that inputs are multiplied with."""
        return sum(n_in * n_out for n_in, n_out in self.linears.values())

    @property
    def tensors(self) -> list[int]:
        """Elements of each tensor of the model without its head."""
        layer = [n_in * n_out for n_in, n_out in self.linears.values()]
        layer += [self.query, self.key, self.key] if self.biases else []
        layer += [self.head_size, self.head_size] if self.head_norms else []
        layer += [self.hidden, self.hidden]
        return [self.vocabulary * self.hidden, *layer * self.layers, self.hidden]

    @property
    def layer(self) -> int:
        """Weights of a layer, all of them."""
        return (sum(self.tensors) - self.vocabulary * self.hidden - self.hidden) // self.layers

    @property
    def trunk(self) -> int:
        """Weights without the head."""
        return sum(self.tensors)

    @property
    def head(self) -> int:
        """Weights of the head that are not the embedding's."""
        return 0 if self.tied else self.vocabulary * self.hidden

    @property
    def whole(self) -> int:
        return self.trunk + self.head

    def adapter(self, lora: LoraSection) -> list[int]:
        """Elements of each tensor of a LoRA adapter."""
        wanted = lora.target_modules
        names = [
            name
            for name in self.linears
            if wanted == "all-linear" or name == wanted or (isinstance(wanted, list) and name in wanted)
        ]
        sizes = [(n_in * lora.rank, n_out * lora.rank) for n_in, n_out in (self.linears[name] for name in names)]
        return [size for pair in sizes for size in pair] * self.layers


SHAPES = {
    shape.name: shape
    for shape in (
        Shape("mistral-7b", 32, 4096, 14336, 32, 8, 32_000, 128),
        Shape("llama-3-8b", 32, 4096, 14336, 32, 8, 128_256, 128),
        Shape("qwen-2.5-7b", 28, 3584, 18944, 28, 4, 152_064, 128, biases=True),
        Shape("llama-2-13b", 40, 5120, 13824, 40, 40, 32_000, 128),
        Shape("llama-2-70b", 80, 8192, 28672, 64, 8, 32_000, 128),
        Shape("llama-3-70b", 80, 8192, 28672, 64, 8, 128_256, 128),
    )
}
OF_HUB = {
    "mistralai/Mistral-7B-v0.1": "mistral-7b",
    "meta-llama/Meta-Llama-3-8B": "llama-3-8b",
    "Qwen/Qwen2.5-7B": "qwen-2.5-7b",
    "meta-llama/Llama-2-13b-hf": "llama-2-13b",
    "meta-llama/Llama-2-70b-hf": "llama-2-70b",
    "meta-llama/Meta-Llama-3-70B": "llama-3-70b",
}


def shape_of(base: str, folder: Path | None, name: str | None = None) -> Shape:
    """The shape ``name``, or that of ``model.base``: a folder with a config.json, or a hub id that is known here.

    Errors: ConfigError for an unknown name, a base that is neither, and another architecture.
    """
    if name is not None:
        if name not in SHAPES:
            raise ConfigError(f"--shape {name}: no such shape. Known: {', '.join(SHAPES)}.")
        return SHAPES[name]
    if base in OF_HUB:
        return SHAPES[OF_HUB[base]]
    place = resolve_model(base, folder)
    if isinstance(place, HubReference):
        raise ConfigError(
            f"model.base = {base}: its shape is not known here. Name a similar one with --shape "
            f"({', '.join(SHAPES)}), or download the model and give its folder."
        )
    path = place / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"model.base = {base}: {path} cannot be read ({error}). Give the folder of a model."
        ) from error
    return from_config(place.name, config)


def from_config(name: str, config: Mapping[str, Any]) -> Shape:
    """The shape that a transformers config.json describes. ConfigError for other architectures."""
    kind = config.get("model_type")
    if kind not in FAMILY:
        raise ConfigError(
            f"{name}: plans on several GPUs know the architectures {', '.join(FAMILY)}, and this is {kind}. Name a "
            "similar one with --shape, or leave --gpus out: the plan of one process knows every architecture."
        )
    heads, hidden = int(config["num_attention_heads"]), int(config["hidden_size"])
    return Shape(
        name=name,
        layers=int(config["num_hidden_layers"]),
        hidden=hidden,
        inner=int(config["intermediate_size"]),
        heads=heads,
        key_heads=int(config.get("num_key_value_heads") or heads),
        vocabulary=int(config["vocab_size"]),
        head_size=int(config.get("head_dim") or hidden // heads),
        tied=bool(config.get("tie_word_embeddings", False)),
        biases=kind == "qwen2",
        head_norms=kind == "qwen3",
    )
