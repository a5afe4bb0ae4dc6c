"""LoRA adapters in PEFT's format: what they add to which tensors of their base, from headers alone."""

import math
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from direct_rlhf.errors import MergeError
from direct_rlhf.merge.checkpoints import Checkpoint, LowRank, TensorPlace, read_header
from direct_rlhf.run.atomic import read_json

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_PREFIX = "base_model.model."
_PART = re.compile(r"(?P<module>.+)\.lora_(?P<kind>embedding_)?(?P<side>[AB])(\.weight)?")
_NOT_PLAIN = (  # settings under which an update is more than scale B A, or is not one to the weights
    "use_dora", "lora_bias", "layer_replication", "target_parameters", "trainable_token_indices", "use_qalora",
    "use_bdlora", "velora_config", "monteclora_config", "arrow_config", "kasa_config", "alora_invocation_tokens",
)  # fmt: skip
_CHANGES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")  # their start also changes the base's weights


def is_adapter(folder: Path) -> bool:
    """Whether a folder holds an adapter and no model."""
    return (folder / CONFIG).is_file() and not (folder / "config.json").is_file()


def read_adapter_config(folder: Path, ref: str) -> dict[str, Any]:
    """adapter_config.json. Errors: MergeError if it is not that of a LoRA whose update is scale B A."""
    try:
        config = read_json(folder / CONFIG)
    except (OSError, ValueError) as error:
        raise MergeError(f"{ref}: {folder / CONFIG} cannot be read ({error}).") from error
    if config.get("peft_type") != "LORA":
        raise MergeError(f"{ref}: an adapter of type {config.get('peft_type')}. Only LoRA is merged on the fly.")
    start = config.get("init_lora_weights")
    special = [name for name in _NOT_PLAIN if config.get(name)]
    if isinstance(start, str) and start.lower().startswith(_CHANGES_BASE):
        special.append(f"init_lora_weights: {start}")
    if special:
        raise MergeError(
            f"{ref}: this LoRA has {', '.join(special)}, which is not merged on the fly. Merge it with PEFT "
            "(merge_and_unload) and name that model."
        )
    return config


def with_adapter(base: Checkpoint, folder: Path, ref: str) -> Checkpoint:
    """The model that ``base`` is with an adapter on it. Errors: MergeError if the two do not fit."""
    config = read_adapter_config(folder, ref)
    if not (folder / WEIGHTS).is_file():
        raise MergeError(f"{ref}: {WEIGHTS} is missing in {folder}. Only safetensors are read; save the adapter again.")
    halves: dict[str, dict[str, TensorPlace]] = {}
    tensors, lookups = dict(base.tensors), set()
    for key, place in read_header(folder / WEIGHTS, ref).items():
        name = key.removeprefix(_PREFIX)
        if found := _PART.fullmatch(name):
            halves.setdefault(found["module"], {})[found["side"]] = place
            if found["kind"]:
                lookups.add(found["module"])
        elif "lora_" in name:
            raise MergeError(f"{ref}: {key} is not understood. Merge the adapter with PEFT and name that model.")
        else:  # a tensor that was trained in full
            whole = name.replace(".modules_to_save", "").replace(".base_layer", "")
            tensors[_in_base(base, whole, ref)] = place
    low_rank = {}
    for module, half in halves.items():
        name = _in_base(base, f"{module}.weight", ref)
        low_rank[name] = _low_rank(config, module, half, tensors[name], module in lookups, ref)
    return replace(base, ref=ref, tensors=tensors, low_rank=low_rank, adapter=folder)


def _low_rank(
    config: Mapping[str, Any], module: str, half: Mapping[str, TensorPlace], whole: TensorPlace, lookup: bool, ref: str
) -> LowRank:
    a, b = half.get("A"), half.get("B")
    transposed = lookup or bool(config.get("fan_in_fan_out"))
    if a is None or b is None or len(a.shape) != 2 or len(b.shape) != 2 or a.shape[0] != b.shape[1]:
        raise MergeError(f"{ref}: {module} has no pair of matrices A and B that fit. Save the adapter again.")
    shape = (b.shape[0], a.shape[1])
    if whole.shape != (shape[::-1] if transposed else shape):
        raise MergeError(f"{ref}: its update of {module} is {list(shape)}, the base's tensor {list(whole.shape)}.")
    rank = a.shape[0]
    alphas = config.get("alpha_pattern") or {}
    fits = [value for pattern, value in alphas.items() if re.match(rf"(.*\.)?({pattern})$", module)]
    alpha = float(fits[0] if fits else config["lora_alpha"])
    return LowRank(a, b, alpha / (math.sqrt(rank) if config.get("use_rslora") else rank), transposed)


def _in_base(base: Checkpoint, name: str, ref: str) -> str:
    """The base's name for a tensor; old checkpoints leave out the name of the trunk."""
    short = name.partition(".")[2]
    for known in (name, short):
        if known in base.tensors:
            return known
    if base.is_tied is not False and any(name.endswith(head) for head in ("lm_head.weight", "embed_out.weight")):
        raise MergeError(
            f"{ref}: it adapts {name}, which its base ties to its embeddings. Merge the adapter with PEFT."
        )
    raise MergeError(f"{ref}: it adapts {name}, which {base.ref} does not have. Is that its base?")
