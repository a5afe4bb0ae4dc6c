"""Text to token ids and back, without torch: the `tokenizers` library on a model's own `tokenizer.json`."""

import hashlib
import json
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import islice, pairwise
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from direct_rlhf.errors import ConfigError
from direct_rlhf.recipe.references import HubReference, resolve_model

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "tokenizer.model",
    "spiece.model",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "chat_template.jinja",
)
_CONFIG_FILES = ("config.json", "generation_config.json")
ENCODED_AT_ONCE = 128  # texts: what the library returns is some fifty times the ids


@dataclass(frozen=True)
class Tokens:
    """A tokenizer and the ids that training and sampling need."""

    name: str  # the reference it was loaded by
    tokenizer: Tokenizer = field(repr=False)
    bos_id: int | None  # None if the tokenizer itself puts no BOS before a text
    eos_id: int  # the id appended to a finished answer
    eos_ids: frozenset[int]  # every id that ends an answer; holds eos_id
    pad_id: int  # not in eos_ids; masks make its choice free, it is never saved
    sha256: str  # of tokenizer.json
    special_texts: Mapping[str, str] = field(default_factory=dict)  # bos_token, eos_token ... as templates read them
    chat_template: str | None = field(default=None, repr=False)
    folder: Path | None = None  # where the files came from

    @cached_property
    def vocab_size(self) -> int:
        """Largest id + 1."""
        return max(self.tokenizer.get_vocab(with_added_tokens=True).values()) + 1

    @cached_property
    def special_ids(self) -> Mapping[str, int]:
        """Texts that must never become their id when they stand in content; `unk`, which says nothing, may."""
        unk = self.special_texts.get("unk_token")
        added = self.tokenizer.get_added_tokens_decoder()
        ids = {token.content: i for i, token in added.items() if token.special and token.content != unk}
        return ids | {str(self.tokenizer.id_to_token(i)): i for i in self.control_ids}

    @cached_property
    def control_ids(self) -> frozenset[int]:
        """BOS and every EOS: special even where a tokenizer has not flagged them so."""
        return self.eos_ids if self.bos_id is None else self.eos_ids | {self.bos_id}

    @cached_property
    def _template_tokenizer(self) -> Tokenizer:
        tokenizer = Tokenizer.from_str(self.tokenizer.to_str())
        tokenizer.encode_special_tokens = False
        return tokenizer

    def encode(self, text: str, *, bos: bool = False) -> list[int]:
        """Ids of content; a special token's text in it stays text. ``bos`` puts the BOS first where there is one."""
        return self._content(text, self.tokenizer.encode(text, add_special_tokens=False).ids, bos)

    def encode_many(self, texts: Iterable[str], *, bos: bool = False) -> Iterator[list[int]]:
        """As ``encode``, of each text in turn; the library works on several at once."""
        waiting = iter(texts)
        while part := list(islice(waiting, ENCODED_AT_ONCE)):
            for text, found in zip(part, self.tokenizer.encode_batch(part, add_special_tokens=False), strict=True):
                yield self._content(text, found.ids, bos)

    def _content(self, text: str, ids: list[int], bos: bool) -> list[int]:
        head = [self.bos_id] if bos and self.bos_id is not None else []
        if not self._forbidden.isdisjoint(ids):
            # the vocabulary itself holds the special text as a piece (Unigram does): break it up
            pieces = _break_up(text, self.special_ids)
            ids = [i for piece in pieces for i in self.tokenizer.encode(piece, add_special_tokens=False).ids]
        return head + ids

    def encode_template(self, text: str) -> list[int]:
        """Ids of text that a chat template wrote: special tokens' texts become their ids."""
        return list(self._template_tokenizer.encode(text, add_special_tokens=False).ids)

    def decode(self, ids: Sequence[int]) -> str:
        """Text of ids; special tokens are left out."""
        return str(self.tokenizer.decode([i for i in ids if i not in self.control_ids], skip_special_tokens=True))

    def save(self, folder: Path) -> None:
        """Write the tokenizer's files into ``folder``, as they came."""
        folder.mkdir(parents=True, exist_ok=True)
        for name in TOKENIZER_FILES:
            if self.folder is not None and (self.folder / name).is_file():
                shutil.copyfile(self.folder / name, folder / name)
        if not (folder / "tokenizer.json").exists():
            tokenizer = Tokenizer.from_str(self.tokenizer.to_str())
            tokenizer.encode_special_tokens = False
            tokenizer.save(str(folder / "tokenizer.json"))

    @cached_property
    def _forbidden(self) -> frozenset[int]:
        return frozenset(self.special_ids.values())


def load_tokens(
    ref: str, *, revision: str | None = None, trust_remote_code: bool = False, folder: Path | None = None
) -> Tokens:
    """The tokenizer of a model: `world:base`, a folder (relative ones start from ``folder``), or a hub id.

    Errors: ConfigError if the files cannot be had, are damaged, or name no end-of-sequence token.
    """
    place = resolve_model(ref, folder, revision=revision)
    if isinstance(place, HubReference):
        place = _download(place)
    config = _read_json(place / "tokenizer_config.json")
    if (place / "tokenizer.json").is_file():
        text = _read_text(place / "tokenizer.json")
    else:
        text = _convert(place, ref, trust_remote_code=trust_remote_code)
    try:
        tokenizer = Tokenizer.from_str(text)
    except Exception as error:  # the library raises nothing narrower
        raise ConfigError(f"{place / 'tokenizer.json'}: not a tokenizer ({error}). Fetch the file again.") from error
    tokenizer.no_truncation()
    tokenizer.no_padding()
    tokenizer.encode_special_tokens = True  # the texts of special tokens are text, unless a template wrote them

    special_texts = _special_texts(place, config)
    eos_id, eos_ids = _eos(tokenizer, special_texts, place)
    return Tokens(
        name=ref,
        tokenizer=tokenizer,
        bos_id=_bos(tokenizer, special_texts, config, eos_ids),
        eos_id=eos_id,
        eos_ids=eos_ids,
        pad_id=_pad(tokenizer, special_texts, eos_ids),
        sha256=hashlib.sha256(text.encode()).hexdigest(),
        special_texts=special_texts,
        chat_template=_chat_template(place, config),
        folder=place,
    )


def _download(ref: HubReference) -> Path:
    from huggingface_hub import snapshot_download

    try:
        return Path(
            snapshot_download(ref.name, revision=ref.revision, allow_patterns=[*TOKENIZER_FILES, *_CONFIG_FILES])
        )
    except (OSError, ValueError) as error:  # every hub and connection error is one of the two
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ConfigError(
            f"{ref.name}: its tokenizer cannot be fetched from the Hugging Face hub ({reason}). Check the name and the "
            "connection (`hf auth login` for gated models), or give a folder that holds the model."
        ) from error


def _convert(place: Path, ref: str, *, trust_remote_code: bool) -> str:
    """tokenizer.json of a folder that has only older files, through transformers (which imports torch)."""
    if not any((place / name).is_file() for name in TOKENIZER_FILES[4:9]):
        raise ConfigError(
            f"{ref}: {place} holds no tokenizer (looked for {', '.join(TOKENIZER_FILES[:1] + TOKENIZER_FILES[4:9])}). "
            "Give a model folder that has one."
        )
    from transformers import AutoTokenizer

    try:
        loaded = AutoTokenizer.from_pretrained(place, trust_remote_code=trust_remote_code)
        return str(loaded.backend_tokenizer.to_str())
    except (OSError, ValueError, ImportError, AttributeError) as error:
        raise ConfigError(
            f"{ref}: {place} has no tokenizer.json, and transformers cannot make one from its other files ({error}). "
            "Save the tokenizer once with `save_pretrained` of a fast tokenizer."
        ) from error


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not UTF-8 at byte {error.start}. Fetch the file again.") from error


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        value = json.loads(_read_text(path))
    except json.JSONDecodeError as error:
        raise ConfigError(f"{path}: broken JSON at line {error.lineno} ({error.msg}). Fetch the file again.") from error
    if not isinstance(value, dict):
        raise ConfigError(f"{path}: must hold a JSON object, holds a {type(value).__name__}. Fetch the file again.")
    return value


def _special_texts(place: Path, config: Mapping[str, Any]) -> dict[str, str]:
    merged = {**_read_json(place / "special_tokens_map.json"), **config}
    texts = {}
    for key in ("bos_token", "eos_token", "unk_token", "pad_token"):
        value = merged.get(key)
        value = value.get("content") if isinstance(value, dict) else value
        if isinstance(value, str):
            texts[key] = value
    return texts


def _eos(tokenizer: Tokenizer, special_texts: Mapping[str, str], place: Path) -> tuple[int, frozenset[int]]:
    """The id to append, and all ids that end an answer.

    The tokenizer's own EOS comes first. Ids of the two config files count only if they are special tokens: a config
    written from defaults names ids that mean something else in another vocabulary.
    """
    named = tokenizer.token_to_id(special_texts.get("eos_token", ""))
    special = {i for i, token in tokenizer.get_added_tokens_decoder().items() if token.special}
    configured: list[int] = []
    for name in reversed(_CONFIG_FILES):
        value = _read_json(place / name).get("eos_token_id")
        configured += [i for i in (value if isinstance(value, list) else [value]) if isinstance(i, int)]
    usable = [i for i in configured if i in special]
    if named is None and not usable:
        raise ConfigError(
            f"{place}: the tokenizer names no end-of-sequence token, so answers could not end. Set `eos_token` in "
            f"{place / 'tokenizer_config.json'} to one of its special tokens: "
            f"{', '.join(sorted(str(tokenizer.id_to_token(i)) for i in special)) or 'it has none, so add one'}."
        )
    first = usable[0] if named is None else named
    return first, frozenset([first, *usable])


def _bos(
    tokenizer: Tokenizer, special_texts: Mapping[str, str], config: Mapping[str, Any], eos_ids: frozenset[int]
) -> int | None:
    """The id that the tokenizer itself puts before a text; an explicit `add_bos_token` decides, as in transformers."""
    named = tokenizer.token_to_id(special_texts.get("bos_token", ""))
    if isinstance(config.get("add_bos_token"), bool):
        return named if config["add_bos_token"] else None
    added = tokenizer.encode("", add_special_tokens=True).ids
    if not added:
        return None
    if named is not None:
        return named if added[0] == named else None
    return added[0] if added[0] not in eos_ids else None


def _pad(tokenizer: Tokenizer, special_texts: Mapping[str, str], eos_ids: frozenset[int]) -> int:
    for key in ("pad_token", "unk_token"):
        token_id = tokenizer.token_to_id(special_texts.get(key, ""))
        if token_id is not None and token_id not in eos_ids:
            return int(token_id)
    return min(i for i in tokenizer.get_vocab(with_added_tokens=True).values() if i not in eos_ids)


def _chat_template(place: Path, config: Mapping[str, Any]) -> str | None:
    if (place / "chat_template.jinja").is_file():
        return _read_text(place / "chat_template.jinja")
    template = config.get("chat_template")
    if isinstance(template, list):  # several named ones
        template = next((t.get("template") for t in template if t.get("name") == "default"), None)
    return template if isinstance(template, str) else None


def _break_up(text: str, special: Mapping[str, int]) -> list[str]:
    """Cut ``text`` after the first character of every special text in it."""
    cuts = {0, len(text)}
    for word in special:
        at = text.find(word)
        while at >= 0:
            cuts.add(at + 1)
            at = text.find(word, at + 1)
    ordered = sorted(cuts)
    return [text[a:b] for a, b in pairwise(ordered)]
