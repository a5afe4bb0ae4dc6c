"""Dialogues as text and as token ids.

One object renders reward data, rollouts, normalisation samples, SFT, DPO, evaluation and chat, so that a model never
meets two spellings of one dialogue. The plain form is byte-exact with Anthropic HH:

    {system}\\n\\nHuman: {text}\\n\\nAssistant: {text}\\n\\nHuman: {text}\\n\\nAssistant:      the prompt
     {answer}<EOS>                                                                      the answer, after one space

Ids: the prompt is encoded alone, since that is what a sampler starts from. Prompt and answer are then encoded
together; where the prompt's ids begin the joint ids (the rule), the rest are the answer's ids. Where a tokenizer merges
over the border, the answer is encoded alone (``EncodedDialogue.joint`` is False; `data show` counts these).
"""

import re
from dataclasses import dataclass, replace
from functools import lru_cache

from direct_rlhf.data.template import ChatTemplate
from direct_rlhf.data.tokens import Tokens
from direct_rlhf.data.types import Turn, Turns
from direct_rlhf.errors import DataError
from direct_rlhf.recipe.schema import DialogueSection


@dataclass(frozen=True)
class EncodedDialogue:
    """A prompt and one answer to it as ids; the loss mask is False on the first and True on the second."""

    prompt_ids: list[int]
    answer_ids: list[int]  # ends with EOS if the answer is finished
    joint: bool = True  # False: the answer was encoded alone


class DialogueFormat:
    """How turns become text and ids under one recipe and one tokenizer."""

    def __init__(self, section: DialogueSection, tokens: Tokens) -> None:
        """Errors: ConfigError if `chat_template` is asked for and the tokenizer has none, or a broken one."""
        self.section = section
        self.template = ChatTemplate(tokens) if section.format == "chat_template" else None
        self.tokens = tokens
        """The tokenizer; its ``eos_id`` is what ends an answer in this format (a chat template's end of turn)."""
        stops = [section.human]
        if self.template is not None:
            self.tokens = replace(tokens, eos_id=self.template.end_id, eos_ids=tokens.eos_ids | {self.template.end_id})
            stops = []  # the end of turn is a token
        self.stop_strings: tuple[str, ...] = tuple(stops if section.stop_strings is None else section.stop_strings)
        """Texts that end an answer."""
        self._fit = lru_cache(maxsize=1)(self._shorten)  # both answers of a pair follow one prompt

    def prompt_text(self, turns: Turns) -> str:
        """The text after which an assistant's answer starts. Errors: DataError if the last turn is not human."""
        if not turns or turns[-1].role != "human":
            raise DataError(
                f"a prompt must end with a human turn, this one ends with {turns[-1].role if turns else 'nothing'}: "
                "add the human turn that is to be answered."
            )
        return "".join(text for _, text in self.segments(turns))

    def segments(self, turns: Turns) -> list[tuple[str, str]]:
        """The prompt in parts: (role, "marker" or "template"; text)."""
        turns = self._with_system(turns)
        if self.template is not None:
            return [("template", self.template.render(turns))]
        markers = {"human": self.section.human, "assistant": self.section.assistant}
        parts = []
        for at, turn in enumerate(turns):
            if turn.role != "system":
                parts += [("marker", markers[turn.role]), (turn.role, " " + turn.text)]
            elif at == 0:
                parts.append(("system", turn.text))
            else:
                raise DataError("a system turn must come before all others: move its text there.")
        return [*parts, ("marker", self.section.assistant)]

    def answer_text(self, answer: str) -> str:
        """The text of an answer as it follows the prompt; nothing for an empty one."""
        answer = answer.strip()
        lead = " " if self.template is None else self.template.lead
        return lead + answer if answer else ""

    def fit(self, turns: Turns, max_tokens: int) -> tuple[Turns, list[int]] | None:
        """The turns that are left when whole ones go from the left until the prompt fits, and its ids.

        What is left starts with a human turn; the system turn stays. None if even the last human turn does not fit.
        """
        kept, ids = self._fit(turns, max_tokens)
        return None if ids is None else (kept, list(ids))

    def _shorten(self, turns: Turns, max_tokens: int) -> tuple[Turns, list[int] | None]:
        system, rest = (turns[:1], turns[1:]) if turns and turns[0].role == "system" else ((), turns)
        while True:
            kept = system + rest
            ids = self._prompt_ids(kept)
            if len(ids) <= max_tokens:
                return kept, ids
            later = [at for at, turn in enumerate(rest) if at and turn.role == "human"]
            if not later:
                return kept, None
            rest = rest[later[0] :]

    def encode_prompt(self, turns: Turns, max_tokens: int) -> list[int] | None:
        """Ids of the prompt, shortened as ``fit`` does; None if it does not fit."""
        fitted = self.fit(turns, max_tokens)
        return None if fitted is None else fitted[1]

    def encode_dialogue(
        self, turns: Turns, answer: str, *, max_prompt_tokens: int, max_answer_tokens: int, finished: bool = True
    ) -> EncodedDialogue | None:
        """Prompt and answer as ids, EOS last if ``finished`` (it counts as a token of the answer).

        The prompt loses turns from the left until it fits; the answer is never cut: None if either does not fit.
        """
        fitted = self.fit(turns, max_prompt_tokens)
        if fitted is None:
            return None
        kept, prompt_ids = fitted
        answer_ids, joint = self._answer_ids(kept, prompt_ids, self.answer_text(answer))
        if finished:
            answer_ids.append(self.tokens.eos_id)
        return EncodedDialogue(prompt_ids, answer_ids, joint) if len(answer_ids) <= max_answer_tokens else None

    def _with_system(self, turns: Turns) -> Turns:
        if self.section.system is None:
            return turns
        if turns[0].role == "system":
            return (Turn("system", f"{self.section.system}\n\n{turns[0].text}"), *turns[1:])
        return (Turn("system", self.section.system), *turns)

    def _prompt_ids(self, turns: Turns) -> list[int]:
        text = self.prompt_text(turns)
        if self.template is not None:  # it writes its own BOS
            return self.template.encode(self._with_system(turns), text)
        return self.tokens.encode(text, bos=True)

    def _answer_ids(self, turns: Turns, prompt_ids: list[int], text: str) -> tuple[list[int], bool]:
        if not text:
            return [], True
        prompt = self.prompt_text(turns)
        if self.template is None:
            joint_ids = self.tokens.encode(prompt + text, bos=True)
        else:
            joint_ids = self.template.encode(self._with_system(turns), prompt, text)
        if joint_ids[: len(prompt_ids)] == prompt_ids:
            return joint_ids[len(prompt_ids) :], True
        return self.tokens.encode(text), False


def parse_transcript(text: str, section: DialogueSection) -> Turns:
    """The turns of a transcript in which only the exact bytes of a marker open a turn.

    Text before the first marker is a system turn. Outer white space of a turn is dropped. An open assistant marker at
    the end gives an empty assistant turn.
    """
    words = sorted((section.human, section.assistant), key=len, reverse=True)  # one may begin the other
    marker = re.compile("|".join(re.escape(word) for word in words))
    found = list(marker.finditer(text))
    head = text[: found[0].start()] if found else text
    turns = [Turn("system", head.strip())] if head.strip() else []
    ends = [match.start() for match in found[1:]] + [len(text)]
    for match, end in zip(found, ends, strict=False):  # without a marker there is one end and no turn
        turns.append(Turn("human" if match[0] == section.human else "assistant", text[match.end() : end].strip()))
    return tuple(turns)
