"""How alike the task vectors of several experts are: do they pull their base the same way?"""

import math
from collections.abc import Mapping
from itertools import combinations
from pathlib import Path

import torch

from direct_rlhf.errors import MergeError
from direct_rlhf.merge.checkpoints import read_tensors
from direct_rlhf.merge.weights import Mapped


@torch.inference_mode()
def likeness(base: Path, experts: Mapping[str, Path]) -> dict[tuple[str, str], dict[str, float | None]]:
    """Of every two experts, whole model: ``cosine`` of their task vectors, and ``sign_conflict``.

        cosine = t_a t_b / (|t_a| |t_b|)
        sign_conflict = entries that both move, in opposite directions / entries that both move

    Cases:   an expert equal to its base has no direction: None. Memory: one tensor of each model in float32.
    Errors:  MergeError if an expert has other tensors than the base.
    """
    places = {name: read_tensors(folder, str(folder)) for name, folder in {"": base, **experts}.items()}
    for name in experts:
        if {key: place.shape for key, place in places[name].items()} != {k: p.shape for k, p in places[""].items()}:
            raise MergeError(f"{experts[name]}: has other tensors than {base}, so their difference is no task vector.")
    pairs = list(combinations(experts, 2))
    square = dict.fromkeys(experts, 0.0)
    product, both, against = (dict.fromkeys(pairs, 0.0) for _ in range(3))
    mapped = Mapped()
    for key, place in places[""].items():
        start = mapped.tensor(place)
        if not start.is_floating_point():
            continue
        vectors = {name: mapped.tensor(places[name][key]).float() - start.float() for name in experts}
        for name, vector in vectors.items():
            square[name] += float(vector.double().square().sum())
        for a, b in pairs:
            entry = vectors[a].double() * vectors[b]
            product[a, b] += float(entry.sum())
            both[a, b] += int((entry != 0).sum())
            against[a, b] += int((entry < 0).sum())
    return {
        (a, b): {
            "cosine": product[a, b] / math.sqrt(square[a] * square[b]) if square[a] and square[b] else None,
            "sign_conflict": against[a, b] / both[a, b] if both[a, b] else None,
        }
        for a, b in pairs
    }
