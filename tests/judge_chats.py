"""A judge in the same process, which remembers what it was asked."""

from collections.abc import Callable, Sequence
from typing import Any

from direct_rlhf.evaluate.chats import Keep, Reply, Request


class SaidChat:
    """``say(messages)`` is its reply: text, or a Reply."""

    name = "said"

    def __init__(self, say: Callable[[tuple[tuple[str, str], ...]], str | Reply], **identity: Any) -> None:
        self.say = say
        self.identity = {"judge": "said", **identity}
        self.asked: list[Request] = []

    def replies(self, requests: Sequence[Request], keep: Keep) -> list[Reply]:
        found = []
        for index, request in enumerate(requests):
            self.asked.append(request)
            said = self.say(request.messages)
            reply = said if isinstance(said, Reply) else Reply(said, "stop")
            keep(index, reply)
            found.append(reply)
        return found
