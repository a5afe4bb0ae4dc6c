"""The tokenizer of the base: byte-level BPE trained on the world's own text."""

import json
from itertools import islice
from pathlib import Path

from direct_rlhf.world.knowledge import build_world
from direct_rlhf.world.pretraining import documents

VOCAB_SIZE = 1280
BOS, EOS, PAD = "<s>", "</s>", "<pad>"
CONTEXT = 1024
# A digit stands alone; a run of line breaks is one piece, so that turn markers never merge with what is around them.
_PIECES = r" ?\d| ?\p{L}+| ?[^\s\p{L}\d]+|\n+|[^\S\n]+"


def train_tokenizer(folder: Path, *, n_documents: int = 20_000, seed: int = 1) -> None:
    """Write ``tokenizer.json`` and ``tokenizer_config.json``; the same seed gives the same bytes."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_PIECES), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=[BOS, EOS, PAD],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    texts = [text for text, _ in islice(documents(seed, build_world()), n_documents)]
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A {BOS} $B", special_tokens=[(BOS, 0)]
    )
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": BOS,
        "eos_token": EOS,
        "pad_token": PAD,
        "model_max_length": CONTEXT,
        "padding_side": "left",
        "clean_up_tokenization_spaces": False,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")
