"""``direct-rlhf chat MODEL``: a conversation with a model in the terminal.

The dialogue is rendered as in training (data.dialogue) and sampled by the same engine (rollout.native); a model of a
run speaks the format of that run's recipe. Where stdin is no terminal, a line is a turn and only answers are printed.
"""

import contextlib
import sys
import unicodedata
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from direct_rlhf.errors import ConfigError
from direct_rlhf.recipe.schema import DialogueSection
from direct_rlhf.run.context import ProgressBars
from direct_rlhf.run.directory import MANIFEST, RunDirectory

if TYPE_CHECKING:
    from direct_rlhf.data.dialogue import DialogueFormat
    from direct_rlhf.data.types import Turns

ARMS = ("direct_ppo", "sft_ppo", "dpo", "sft")  # which model of a run to talk to: the first that is there
HELP = """/reset        forget the conversation
/system TEXT  text before the first turn (without TEXT: none); forgets the conversation
/quit         leave (also Ctrl-D; Ctrl-C stops an answer, twice leaves)"""


def chat(
    model: str,
    *,
    system: str | None = None,
    temperature: float = 0.7,
    max_new_tokens: int = 128,
    seed: int = 0,
) -> None:
    """Talks with ``model`` until the user leaves.

    ``model``: a folder, a hub id, ``world:base``, or a run directory (its trained model). ``temperature`` 0 is greedy.
    The same seed and the same words give the same conversation.
    Errors: ConfigError if there is no such model.
    """
    for stream in (sys.stdin, sys.stdout):
        if hasattr(stream, "reconfigure"):  # bytes that are no UTF-8, or a terminal that cannot show a letter
            stream.reconfigure(errors="replace")
    reference, section = _find(model)
    if system is not None:
        section = section.model_copy(update={"system": system or None})
    on_terminal = sys.stdin.isatty()
    with ProgressBars()(f"loading {model}"):
        talk = _load(reference, section, temperature, max_new_tokens, seed)
    if on_terminal:
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401  gives input() line editing and history
        print(f"{model} (temperature {temperature:g}). /help lists the commands.")
    _converse(talk, on_terminal)


def _converse(talk: "_Talk", on_terminal: bool) -> None:
    interrupted = False
    while True:
        try:
            line = input("\nYou: " if on_terminal else "").strip()
        except EOFError:
            break
        except KeyboardInterrupt:
            if interrupted:
                break
            interrupted = True
            print("\n(Ctrl-C again, or /quit, leaves)")
            continue
        if line in ("/quit", "/exit"):
            return
        if line.startswith("/"):
            print(talk.command(line))
        elif line:
            print("\nModel: " if on_terminal else "", end="", flush=True)
            interrupted = not talk.answer(line)
            continue
        interrupted = False
    if on_terminal:
        print()


@dataclass
class _Talk:
    """The model, how it is asked, and what has been said."""

    model: Any
    dialogue: "DialogueFormat"
    temperature: float
    max_new_tokens: int
    max_prompt_tokens: int
    seed: int
    turns: "Turns" = ()
    n_answers: int = 0
    _shown: list[str] = field(default_factory=list)

    def command(self, line: str) -> str:
        """Does what a line that starts with a slash says, and says so."""
        from direct_rlhf.data.dialogue import DialogueFormat

        word, _, rest = line.partition(" ")
        if word == "/system":
            section = self.dialogue.section.model_copy(update={"system": rest.strip() or None})
            self.dialogue = DialogueFormat(section, self.dialogue.tokens)
        if word in ("/reset", "/system"):
            self.turns = ()
            return "(new conversation)"
        return HELP if word == "/help" else f"{word}: no such command.\n{HELP}"

    def answer(self, text: str) -> bool:
        """Streams the answer to ``text`` and remembers both. False if Ctrl-C stopped it; what was shown counts."""
        from direct_rlhf.data.types import Turn
        from direct_rlhf.rollout.native import sample
        from direct_rlhf.rollout.types import SampleKey, SamplingSettings

        turns = (*self.turns, Turn("human", text))
        prompt_ids = self.dialogue.encode_prompt(turns, self.max_prompt_tokens)
        if prompt_ids is None:
            print(f"(too long: a turn may have about {self.max_prompt_tokens} tokens)")
            return True
        settings = SamplingSettings(self.max_new_tokens, self.temperature, self.dialogue.stop_strings)
        key = SampleKey(self.seed, "chat", self.n_answers, 0)
        self.n_answers += 1
        self._shown = []
        finished = True
        try:
            sample(self.model, self.dialogue.tokens, [prompt_ids], [key], settings, on_text=self._show)
        except KeyboardInterrupt:
            finished = False
        said = "".join(self._shown).strip()
        remarks = ([] if said else ["(no answer)"]) + ([] if finished else ["(stopped)"])
        print(" " * bool(said and remarks) + " ".join(remarks))
        if said:  # a turn without an answer is forgotten: no dialogue has an empty turn
            self.turns = (*turns, Turn("assistant", said))
        return finished

    def _show(self, row: int, text: str) -> None:
        if not self._shown:
            text = text.lstrip()  # the space after the marker
        if text:
            self._shown.append(text)
            print(_harmless(text), end="", flush=True)


def _load(reference: str, section: DialogueSection, temperature: float, max_new_tokens: int, seed: int) -> _Talk:
    import torch
    from transformers.utils import logging

    from direct_rlhf.data.dialogue import DialogueFormat
    from direct_rlhf.data.tokens import load_tokens
    from direct_rlhf.models.loading import load_causal_lm

    logging.disable_progress_bar()  # ours is shown
    on_gpu = torch.cuda.is_available()
    tokens = load_tokens(reference)
    model = load_causal_lm(reference, dtype="bfloat16" if on_gpu else "float32", device="cuda" if on_gpu else "cpu")
    window = getattr(model.config, "max_position_embeddings", None) or 2048
    if max_new_tokens > window // 2:
        max_new_tokens = window // 2
        print(f"(the model reads {window} tokens, so answers end after {max_new_tokens})", file=sys.stderr)
    dialogue = DialogueFormat(section, tokens)
    return _Talk(model, dialogue, temperature, max_new_tokens, window - max_new_tokens, seed)


def _find(model: str) -> tuple[str, DialogueSection]:
    """The model's reference, and the dialogue format it was trained in."""
    path = Path(model).expanduser()
    if (path / MANIFEST).is_file():
        made = [path / "models" / arm for arm in ARMS if (path / "models" / arm / "config.json").is_file()]
        if not made:
            raise ConfigError(f"{path}: this run has made no model yet. Finish it with --resume, or name a model.")
        return str(made[0]), RunDirectory(path).recipe.dialogue
    if path.parent.name == "models" and (path.parents[1] / MANIFEST).is_file():
        return str(path), RunDirectory(path.parents[1]).recipe.dialogue
    return str(path) if path.is_dir() else model, DialogueSection()


def _harmless(text: str) -> str:
    """Model text without control characters, which could steer the terminal."""
    return "".join(char if char in "\n\t" or unicodedata.category(char) != "Cc" else "\ufffd" for char in text)
