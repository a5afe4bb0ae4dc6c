"""Whether models can be merged as a file says, from configs, headers and tokenizers: no weight is read. Torch-free."""

from collections.abc import Iterator, Mapping, Sequence

from direct_rlhf.errors import MergeError
from direct_rlhf.merge.checkpoints import FLOATS, Checkpoint, TensorPlace
from direct_rlhf.merge.sources import Source
from direct_rlhf.merge.vocabularies import Vocabulary, conflicts, differences

SHOWN = 3  # examples of a list in a message

HEADS = ("lm_head.weight", "embed_out.weight")
EMBEDDINGS = ("embed_tokens.weight", "wte.weight", "word_embeddings.weight", "embed_in.weight")

# What makes another function of weights of the same shapes. Other differences of configs are reported only
STRUCTURE = frozenset(
    {
        "model_type", "num_hidden_layers", "n_layer", "num_attention_heads", "n_head", "num_key_value_heads",
        "head_dim", "hidden_size", "n_embd", "intermediate_size", "hidden_act", "activation_function",
        "num_local_experts", "num_experts", "n_routed_experts", "num_experts_per_tok", "position_embedding_type",
        "tie_word_embeddings",
    }
)  # fmt: skip
OF_NO_ACCOUNT = frozenset(
    {
        "_name_or_path", "transformers_version", "torch_dtype", "dtype", "use_cache", "vocab_size",
        "initializer_range", "auto_map", "bos_token_id", "eos_token_id", "pad_token_id", "id2label", "label2id",
        "pretraining_tp", "attn_implementation", "_attn_implementation",
    }
)  # fmt: skip


def config_problems(sources: Sequence[Source]) -> Iterator[str]:
    """Models of another architecture than the first."""
    first, *others = sources
    for other in others:
        kinds = [(source.config["model_type"], source.config.get("architectures")) for source in (first, other)]
        if kinds[0] != kinds[1]:
            words = [f"{kind} ({', '.join(names or ['of no named class'])})" for kind, names in kinds]
            yield f"{other.ref}: its architecture is {words[1]}, that of {first.ref} {words[0]}. Only equal ones merge."
            continue
        for key, mine, theirs in _unequal(first.config, other.config):
            if key.rpartition(".")[2] in STRUCTURE:
                yield f"{other.ref}: {key} is {theirs!r} in its config.json, {mine!r} in that of {first.ref}."


def config_notes(sources: Sequence[Source]) -> Iterator[str]:
    """Differences of configs under which models still merge."""
    first, *others = sources
    for other in others:
        for key, mine, theirs in _unequal(first.config, other.config):
            name = key.rpartition(".")[2]
            if name not in STRUCTURE | OF_NO_ACCOUNT and "dropout" not in name and "pdrop" not in name:
                yield f"{key} is {theirs!r} in {other.ref}; the result keeps {mine!r} of {first.ref}"


def _unequal(
    one: Mapping[str, object], other: Mapping[str, object], prefix: str = ""
) -> Iterator[tuple[str, object, object]]:
    """(key, value, value) of what both configs have, and have otherwise."""
    for key in sorted(one.keys() & other.keys()):
        mine, theirs = one[key], other[key]
        if isinstance(mine, Mapping) and isinstance(theirs, Mapping):
            yield from _unequal(mine, theirs, f"{prefix}{key}.")
        elif mine != theirs:
            yield f"{prefix}{key}", mine, theirs


def vocabulary_problems(sources: Sequence[Source], rule: str) -> Iterator[str]:
    """Tokenizers that give tokens other ids than the first model's does."""
    first, *others = [_vocabulary(source) for source in sources]
    for other in others:
        if first is None or other is None:
            continue
        found = differences(first, other) if rule == "same" else conflicts(first, other)
        if found and rule == "same":
            yield (
                f"{other.ref}: its vocabulary is not that of {first.ref}: {found}. To merge the tokens that all have: "
                "vocabulary: common_rows."
            )
        elif found:
            yield f"{other.ref}: its vocabulary contradicts that of {first.ref}: {found}. These do not merge."


def vocabulary_notes(sources: Sequence[Source]) -> Iterator[str]:
    for source in sources:
        if _vocabulary(source) is None:
            yield f"{source.ref} has no tokenizer; it is taken to use that of the others"


def _vocabulary(source: Source) -> Vocabulary | None:
    return Vocabulary.find(source.ref, (source.adapter, source.folder) if source.adapter else (source.folder,))


def is_table(name: str, place: TensorPlace) -> bool:
    """Whether it is what old checkpoints store and a model makes for itself: rotary frequencies, causal masks."""
    is_mask = name.endswith((".attn.bias", ".attention.bias")) and len(place.shape) == 4
    return is_mask or name.endswith(("rotary_emb.inv_freq", ".attn.masked_bias", ".attention.masked_bias"))


def without_tables(checkpoints: Sequence[Checkpoint]) -> list[Checkpoint]:
    """The models without what only some of them store and every model makes for itself."""
    everywhere = set.intersection(*(set(c.tensors) for c in checkpoints))
    return [
        c.without({n for n, place in c.tensors.items() if is_table(n, place) and n not in everywhere})
        for c in checkpoints
    ]


def tied_heads(checkpoints: Sequence[Checkpoint]) -> Iterator[tuple[Checkpoint, str, str]]:
    """(model, head, embeddings) of heads that are stored though they are the embeddings: these merge once.

    Errors: MergeError if some models tie their heads and others do not.
    """
    stored = {c.ref: [name for name in c.tensors if name.endswith(HEADS)] for c in checkpoints}
    if not any(stored.values()):
        return
    tied = {c.ref: c.is_tied if c.is_tied is not None else not stored[c.ref] for c in checkpoints}
    if len(set(tied.values())) > 1:
        yes, no = (next(ref for ref, value in tied.items() if value is wanted) for wanted in (True, False))
        raise MergeError(f"{yes} ties its head to its embeddings and {no} does not. Only alike ones merge.")
    if not all(tied.values()):
        return
    for checkpoint in checkpoints:
        for head in stored[checkpoint.ref]:
            embeddings = [name for name in checkpoint.tensors if name.endswith(EMBEDDINGS)]
            same = [n for n in embeddings if checkpoint.tensors[n].shape == checkpoint.tensors[head].shape]
            if not same or {head, *same} & checkpoint.low_rank.keys():
                raise MergeError(
                    f"{checkpoint.ref}: its config ties {head} to the embeddings, but the file has it apart and they "
                    "cannot be compared. Save the model again with transformers."
                )
            yield checkpoint, head, same[0]


def tensor_problems(checkpoints: Sequence[Checkpoint], rule: str) -> Iterator[str]:
    """Names, shapes and kinds of tensors that are not those of the first model."""
    first, *others = checkpoints
    for other in others:
        lacks, extra = first.tensors.keys() - other.tensors.keys(), other.tensors.keys() - first.tensors.keys()
        if lacks or extra:
            said = [f"lacks {_some(lacks)}"] if lacks else []
            said += [f"has {_some(extra)} beside"] if extra else []
            yield f"{other.ref}: its tensors are not those of {first.ref}: it {' and '.join(said)}."
        for name in sorted(first.tensors.keys() & other.tensors.keys()):
            yield from _tensor_problem(name, first, other, rule)


def _tensor_problem(name: str, first: Checkpoint, other: Checkpoint, rule: str) -> Iterator[str]:
    mine, theirs = first.tensors[name], other.tensors[name]
    where = f"{name} is {list(theirs.shape)} in {other.ref} and {list(mine.shape)} in {first.ref}"
    if (mine.dtype in FLOATS) != (theirs.dtype in FLOATS):
        yield f"{name} is stored as {theirs.dtype} in {other.ref} and as {mine.dtype} in {first.ref}. Save one again."
    elif mine.shape == theirs.shape:
        return
    elif not is_by_token(name, mine, theirs):
        yield f"{where}. Only models of equal shapes merge."
    elif rule == "same":
        yield f"{where}: other vocabulary rows. To merge the rows that all have: vocabulary: common_rows."
    elif name in first.low_rank.keys() | other.low_rank.keys():
        yield f"{where}, and an adapter changes it. Merge the adapter with PEFT and name that model."


def is_by_token(name: str, one: TensorPlace, other: TensorPlace) -> bool:
    """Whether a tensor has a row for each token, and the two differ in nothing else than their number."""
    has_rows = name.endswith((*HEADS, *EMBEDDINGS, "lm_head.bias"))
    return has_rows and len(one.shape) == len(other.shape) and one.shape[1:] == other.shape[1:]


def _some(names: Sequence[str] | set[str]) -> str:
    shown = ", ".join(sorted(names)[:SHOWN])
    return shown if len(names) <= SHOWN else f"{len(names)} tensors such as {shown}"
