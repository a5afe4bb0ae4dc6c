"""What happens when memory runs out: a smaller chunk from then on, the same results, and a line that says so."""

import gc
import logging
from collections.abc import Callable
from typing import TypeVar

import torch

from direct_rlhf.errors import DirectRLHFError, OutOfMemoryError

log = logging.getLogger(__name__)
T = TypeVar("T")

CPU_ALLOCATOR = ("not enough memory", "can't allocate memory")  # it raises a plain RuntimeError with one of these


class ChunkSize:
    """How much one phase computes at once. Each phase has its own, so that no phase pays for another's halvings.

    ``phase`` is how messages name it. ``size`` counts what the caller cuts its work into (rows, sequences, padded
    tokens); only `run` lowers it, and it is never raised again. ``report`` gets one line for each halving.
    ``fixed``: several processes compute in step, so that one alone cannot go back and halve.
    """

    def __init__(
        self, phase: str, size: int, report: Callable[[str], None] = log.warning, *, fixed: bool = False
    ) -> None:
        if size < 1:
            raise ValueError(f"{phase}: a chunk holds at least 1, got {size}")
        self.phase = phase
        self.size = size
        self.halvings = 0
        self._report = report
        self._fixed = fixed

    def run(self, work: Callable[[int], T]) -> T:
        """``work(size)``, again with half the size for as long as memory runs out.

        ``work`` must be a pure function whose result does not depend on the size: a failed call may have done any part
        of it, and nothing of that is kept. What it adds to (gradients, lists, a progress bar) it must reset itself.
        Errors: OutOfMemoryError where memory runs out at size 1, or is fixed; whatever else ``work`` raises, at once.
        """
        while True:
            try:
                return work(self.size)
            except (RuntimeError, MemoryError) as error:
                if not ran_out_of_memory(error):
                    raise
                said = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
            # Outside the except block: the exception's traceback holds the failed call's tensors until it ends.
            if self._fixed:
                raise OutOfMemoryError(
                    f"{self.phase}: out of memory with {self.size} padded slots at once ({said}). Where several "
                    "processes compute in step, chunks do not shrink by themselves: go on with more processes, "
                    "parallel.activation_checkpointing=true, a smaller ppo.micro_batch_tokens in a new run, or "
                    "model.tuning=lora."
                )
            if self.size == 1:
                raise OutOfMemoryError(
                    f"{self.phase}: out of memory even with a chunk of 1 ({said}). Shorten prompts and answers "
                    "(data.max_prompt_tokens, data.max_answer_tokens, max_new_tokens), set model.dtype=bfloat16 or "
                    "model.tuning=lora, take a smaller model, or free memory that other programs hold."
                )
            old, self.size = self.size, self.size // 2
            self.halvings += 1
            self._report(
                f"{self.phase}: out of memory; the chunk is {self.size} instead of {old} from now on. "
                "Results do not change."
            )
            gc.collect()  # a frame that kept its own exception is a cycle, and holds its tensors until this
            if torch.cuda.is_initialized():
                torch.cuda.empty_cache()  # blocks of the old shapes, which the new ones may not fit


def ran_out_of_memory(error: BaseException) -> bool:
    """Whether a smaller chunk could help; not for our own OutOfMemoryError, which has tried that."""
    if isinstance(error, DirectRLHFError):
        return False
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in CPU_ALLOCATOR)
