"""Tiny checkpoints to merge, and merges of them in a line."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from direct_rlhf.merge.executor import Execution, merge_models
from direct_rlhf.recipe.merge import merge_of
from models.tiny_models import tiny_lm, write_tokenizer

SHARDED = "20KB"  # several files
METHODS_OF_TWO = ("slerp",)


def write_model(
    folder: Path,
    name: str = "mistral",
    seed: int = 0,
    *,
    dtype: str = "bfloat16",
    shard: str = "5GB",
    noise: float = 0.02,
) -> Path:
    """A checkpoint: the random model of the architecture, with noise by ``seed`` on all weights (0: none)."""
    model = tiny_lm(name, scale=1.0)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if seed:
                parameter.add_(noise * torch.randn(parameter.shape, generator=generator))
    model.to(getattr(torch, dtype)).save_pretrained(folder, max_shard_size=shard)
    write_tokenizer(folder)
    return folder


def write_family(root: Path, name: str = "mistral", **options: Any) -> Path:
    """base, a, b and c."""
    for seed, model in enumerate(("base", "a", "b", "c")):
        write_model(root / model, name, seed, **options)
    return root


def merge(root: Path, out: Path, how: Execution | None = None, *, overwrite: bool = False, **values: Any) -> Path:
    """Merge as a file in ``root`` with these keys would; ``models`` may be names alone."""
    models = [m if isinstance(m, Mapping) else {"model": m} for m in values.pop("models", ["a", "b"])]
    return merge_models(merge_of({"models": models, **values}, root), out, overwrite=overwrite, how=how)


def settings_for(method: str) -> dict[str, Any]:
    """The models and the base of a merge by any method."""
    models = ["a", "b"] if method in METHODS_OF_TWO else ["a", "b", "c"]
    return {"merge_method": method, "models": models} | (
        {} if method in ("linear", "slerp") else {"base_model": "base"}
    )


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of a checkpoint."""
    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}


def same(one: Path, other: Path) -> bool:
    """Whether two checkpoints hold the same tensors, bit for bit."""
    a, b = tensors(one), tensors(other)
    return a.keys() == b.keys() and all(
        a[name].dtype == b[name].dtype and torch.equal(a[name].view(torch.uint8), b[name].view(torch.uint8))
        for name in a
    )


def reshard(folder: Path, out: Path, files: int, *, reverse: bool = False) -> Path:
    """The same model in so many files, its tensors dealt out in order or in reverse order."""
    out.mkdir(parents=True)
    found = sorted(tensors(folder).items(), reverse=reverse)
    weight_map = {}
    for number in range(files):
        name = f"part-{number}.safetensors"
        save_file(dict(found[number::files]), out / name, metadata={"format": "pt"})
        weight_map |= dict.fromkeys((tensor for tensor, _ in found[number::files]), name)
    (out / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    for file in folder.iterdir():
        if "safetensors" not in file.name:
            (out / file.name).write_bytes(file.read_bytes())
    return out


def edit_config(folder: Path, **changes: Any) -> None:
    """Keys of config.json; None takes one away."""
    path = folder / "config.json"
    config = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in config.items() if value is not None}))


def rewrite(folder: Path, change: Any) -> None:
    """Put back what ``change`` makes of the tensors of a model of one file."""
    file = folder / "model.safetensors"
    save_file(change(load_file(file)), file, metadata={"format": "pt"})
