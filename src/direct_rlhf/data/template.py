"""A tokenizer's own chat template, rendered in a sandbox as transformers does, without importing it."""

import re
from collections.abc import Callable

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from direct_rlhf.data.tokens import Tokens
from direct_rlhf.data.types import Turn, Turns
from direct_rlhf.errors import ConfigError, DataError

_ROLES = {"human": "user", "assistant": "assistant", "system": "system"}
_PROBE = Turn("human", "probe"), Turn("assistant", "Qx7answer")


class _GenerationBlock(Extension):
    """`{% generation %}...{% endgeneration %}` marks answers for training frameworks; here it is its body."""

    tags = {"generation"}  # noqa: RUF012, jinja's own spelling

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _raise(message: str) -> str:
    raise jinja2.TemplateError(message)


class ChatTemplate:
    """The template of one tokenizer."""

    def __init__(self, tokens: Tokens) -> None:
        """Errors: ConfigError if there is no template, or it does not compile or render."""
        if tokens.chat_template is None:
            raise ConfigError(
                f"dialogue.format = chat_template, but the tokenizer of {tokens.name} has no chat template "
                "(base models have none). Set dialogue.format = plain."
            )
        self._tokens = tokens
        # `strftime_now` is left out on purpose: a date in the prompt would make every day another run
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationBlock, "jinja2.ext.loopcontrols"]
        )
        environment.globals["raise_exception"] = _raise
        try:
            self._template = environment.from_string(tokens.chat_template)
            prompt, dialogue = self.render(_PROBE[:1]), self._render(_PROBE, open_answer=False)
        except (jinja2.TemplateError, DataError) as error:
            raise ConfigError(
                f"the chat template of {tokens.name} does not render ({error}). Set dialogue.format = plain."
            ) from error
        lead, _, tail = dialogue.removeprefix(prompt).partition(_PROBE[1].text)
        follows = dialogue.startswith(prompt) and tail != ""
        self.lead = lead if follows and not lead.strip() else ""
        """White space that the template puts between the prompt and an answer."""
        self.end_id = self._end_of_turn(tail) if follows else tokens.eos_id
        """The special token that the template puts after an answer; the tokenizer's EOS if it puts none."""

    def render(self, turns: Turns) -> str:
        """Text up to where an answer starts. Errors: DataError if the template refuses the dialogue."""
        return self._render(turns, open_answer=True)

    def encode(self, turns: Turns, prompt: str, answer: str = "") -> list[int]:
        """Ids of ``prompt = render(turns)`` and a following answer.

        The template's special tokens become ids, content's never do. Without special texts in content these are
        the ids that transformers gives; with them, content and template are encoded piece by piece.
        """
        contents = [turn.text for turn in turns] + [answer]
        if not any(word in content for word in self._tokens.special_ids for content in contents):
            return self._tokens.encode_template(prompt + answer)
        marks = [f"\ue000{at}\ue001" for at in range(len(turns))]
        marked = self.render(tuple(Turn(t.role, m) for t, m in zip(turns, marks, strict=True))) + "\ue000answer\ue001"
        content_of = dict(zip([*marks, "\ue000answer\ue001"], contents, strict=True))
        ids: list[int] = []
        for piece in re.split("(\ue000(?:\\d+|answer)\ue001)", marked):
            encode: Callable[[str], list[int]] = self._tokens.encode
            ids += encode(content_of[piece]) if piece in content_of else self._tokens.encode_template(piece)
        return ids

    def _render(self, turns: Turns, *, open_answer: bool) -> str:
        messages = [{"role": _ROLES[turn.role], "content": turn.text} for turn in turns]
        try:
            return self._template.render(
                messages=messages, add_generation_prompt=open_answer, **self._tokens.special_texts
            )
        except (jinja2.TemplateError, TypeError, ValueError, ArithmeticError, LookupError) as error:
            # a template is a program of others: whatever it raises means that it refuses this dialogue
            raise DataError(f"the chat template refuses this dialogue: {error}") from error

    def _end_of_turn(self, tail: str) -> int:
        first = self._tokens.encode_template(tail.lstrip())[:1]
        return first[0] if first and first[0] in self._tokens.special_ids.values() else self._tokens.eos_id
