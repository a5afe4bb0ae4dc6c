"""`data show`: what the recipe's data becomes, before anything is trained on it."""

from bisect import bisect_right
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from itertools import accumulate, islice
from pathlib import Path

from rich.console import Console
from rich.progress import track
from rich.table import Table
from rich.text import Text

from direct_rlhf.data.dialogue import DialogueFormat, EncodedDialogue
from direct_rlhf.data.load import fits, load_preferences, load_prompts, load_text_data
from direct_rlhf.data.mixture import outlook
from direct_rlhf.data.tokens import Tokens
from direct_rlhf.data.types import PreferencePair, RejectedRow, Turns
from direct_rlhf.recipe.schema import DataSection, DialogueSection

MEASURED_PAIRS = 1000
"""Lengths come from the first so many pairs."""
_STYLES = {
    "marker": "dim", "template": "cyan", "system": "magenta", "human": "cyan", "assistant": "blue",
    "chosen": "bold green", "rejected": "bold red", "special": "bold yellow",
}  # fmt: skip
_NO_LIMIT = 2**31


def show(
    section: DataSection,
    dialogue: DialogueSection,
    tokens: Tokens,
    *,
    folder: Path | None,
    console: Console,
    rows: int = 5,
    seed: int = 0,
) -> None:
    """Prints sources, counts, dropped rows with reasons, lengths, and the first ``rows`` pairs as tokens.

    Errors: those of loading, and of a mixture that the data do not allow.
    """
    form = DialogueFormat(dialogue, tokens)
    if section.preferences:
        data = load_preferences(section, folder=folder, seed=seed, dialogue=dialogue)
        pairs = list(islice(dict.fromkeys((*data.train, *data.held_out)), MEASURED_PAIRS))
        _print_sources(console, "preference pairs", data.formats, data.counts)
        _print_split(console, len(data.train), len(data.held_out))
        if section.mixture.type != "none":
            console.print(Text(f"  mixture: {outlook(section.mixture, data.train, data.held_out)}\n"))
        kept, too_long = fits(track(pairs, "measuring", console=console, transient=True), form, section)
        _print_rejected(console, data.rejected, "Rows not used")
        _print_rejected(console, too_long, f"Pairs not used with this tokenizer, of the first {len(pairs):,}")
        _print_lengths(console, pairs, form, section)
        _print_legend(console, form)
        for pair in kept[:rows]:
            print_pair(console, pair, form, section)
    if section.prompts:
        prompts = load_prompts(section, folder=folder, seed=seed, dialogue=dialogue)
        _print_sources(console, "prompts", prompts.formats, prompts.counts)
        _print_split(console, len(prompts.train), len(prompts.held_out))
        _print_rejected(console, prompts.rejected, "Prompt rows not used")
    if section.text:
        texts = load_text_data(section, folder=folder)
        _print_sources(console, "texts", texts.formats, texts.counts)
        _print_rejected(console, texts.rejected, "Text rows not used")


def print_pair(console: Console, pair: PreferencePair, form: DialogueFormat, section: DataSection) -> None:
    """One pair that fits, as its token ids are seen in training: the prompt in its roles, then both answers."""
    fitted = form.fit(pair.prompt, section.max_prompt_tokens)
    if fitted is None:
        return
    turns, prompt_ids = fitted
    dropped = len(pair.prompt) - len(turns)
    note = f", {dropped} turns dropped from the left" if dropped else ""
    console.rule(Text(f"{_printable(pair.source)}  {_printable(pair.kind)}{note}"), align="left", style="dim")
    grid = Table.grid(padding=(0, 2))
    grid.add_row(Text("prompt\nloss 0", style="dim"), prompt_tokens(prompt_ids, turns, form))
    for label, answer in (("chosen", pair.chosen), ("rejected", pair.rejected)):
        encoded = form.encode_dialogue(
            turns, answer, max_prompt_tokens=section.max_prompt_tokens, max_answer_tokens=section.max_answer_tokens
        )
        if encoded is not None:
            grid.add_row(Text(f"{label}\nloss 1", style="dim"), answer_tokens(encoded, form, label))
    console.print(grid)


def prompt_tokens(prompt_ids: Sequence[int], turns: Turns, form: DialogueFormat) -> Text:
    """The prompt's tokens, each in the colour of its role, with bars between them and each turn on a new line."""
    segments = form.segments(turns)
    ends = list(accumulate(len(part) for _, part in segments))
    text, before = Text(), -1
    for piece, position, special in _pieces([], prompt_ids, form.tokens):
        at = min(bisect_right(ends, position), len(segments) - 1)
        role = segments[at][0]
        if at != before and role == "marker" and len(text):
            text.append("\n")
        _append(text, piece, _STYLES["special" if special else role])
        before = at
    return text


def answer_tokens(encoded: EncodedDialogue, form: DialogueFormat, label: str) -> Text:
    """An answer's tokens with bars between them."""
    text = Text()
    for piece, _, special in _pieces(encoded.prompt_ids, encoded.answer_ids, form.tokens):
        _append(text, piece, _STYLES["special" if special else label])
    return text


def _pieces(context: Sequence[int], ids: Sequence[int], tokens: Tokens) -> Iterator[tuple[str, int, bool]]:
    """For each id: what it adds to the text, the position of the last character so far, whether it is special.

    Decoding grows id by id, because a character may span several byte-level tokens and the first of a text may lose
    its space.
    """
    special = {token_id: text for text, token_id in tokens.special_ids.items()}
    before = tokens.decode(context)
    for at, token_id in enumerate(ids):
        if token_id in special:
            yield special[token_id], max(len(before) - 1, 0), True
            continue
        text = tokens.decode([*context, *ids[: at + 1]])
        common = next((i for i, (a, b) in enumerate(zip(before, text, strict=False)) if a != b), len(before))
        yield text[common:], max(len(text) - 1, 0), False
        before = text


def _append(text: Text, piece: str, style: str) -> None:
    if len(text) and not text.plain.endswith("\n"):
        text.append("|", "dim")
    text.append(_printable(piece), style)


def _printable(piece: str) -> str:
    """Data may hold terminal escapes; they are shown, not obeyed."""
    return "".join(c if c.isprintable() else "⏎" if c == "\n" else "\ufffd" for c in piece)


def _print_sources(console: Console, what: str, formats: Mapping[str, str], counts: Mapping[str, int]) -> None:
    table = Table(title=f"Sources of {what}", title_justify="left", box=None)
    table.add_column("source")
    table.add_column("format")
    for path, row_format in formats.items():
        table.add_row(Text(path), row_format)
    console.print(table)
    console.print(Text("  " + ", ".join(f"{key.replace('_', ' ')} {number:,}" for key, number in counts.items())))


def _print_split(console: Console, train: int, held_out: int) -> None:
    console.print(Text(f"  training {train:,} (weights applied), held out {held_out:,}\n"))


def _print_rejected(console: Console, rejected: Sequence[RejectedRow], title: str) -> None:
    if not rejected:
        return
    table = Table(title=title, title_justify="left", box=None)
    table.add_column("reason")
    table.add_column("rows", justify="right")
    table.add_column("first")
    for reason, count in Counter(row.reason for row in rejected).most_common():
        first = next(row for row in rejected if row.reason == reason)
        table.add_row(reason, f"{count:,}", Text(_printable(f"{first.source}: {first.detail}")))
    console.print(table)
    console.print()


def _print_lengths(
    console: Console, pairs: Sequence[PreferencePair], form: DialogueFormat, section: DataSection
) -> None:
    lengths: dict[str, list[int]] = {"prompt": [], "chosen": [], "rejected": []}
    alone = 0
    for pair in track(pairs, "counting tokens", console=console, transient=True):
        for label, answer in (("chosen", pair.chosen), ("rejected", pair.rejected)):
            encoded = form.encode_dialogue(
                pair.prompt, answer, max_prompt_tokens=_NO_LIMIT, max_answer_tokens=_NO_LIMIT
            )
            if encoded is not None:
                lengths[label].append(len(encoded.answer_ids))
                alone += not encoded.joint
                if label == "chosen":
                    lengths["prompt"].append(len(encoded.prompt_ids))
    table = Table(title=f"Tokens, first {len(pairs):,} pairs", title_justify="left", box=None)
    for heading in ("", "5 %", "50 %", "95 %", "most", "limit", "above it"):
        table.add_column(heading, justify="left" if not heading else "right")
    for label, values in lengths.items():
        if not values:  # a chat template refused every pair; the table above says so
            continue
        ordered = sorted(values)
        limit = section.max_prompt_tokens if label == "prompt" else section.max_answer_tokens
        shown = [ordered[round(share * (len(ordered) - 1))] for share in (0.05, 0.5, 0.95, 1)]
        above = sum(value > limit for value in values) / len(values)
        table.add_row(label, *(f"{value:,}" for value in shown), f"{limit:,}", f"{above:.1%}")
    console.print(table)
    if alone:
        console.print(
            f"  {alone:,} answers were encoded apart from their prompt (the tokenizer merges over the border)"
        )
    console.print()


def _print_legend(console: Console, form: DialogueFormat) -> None:
    names = ("template",) if form.template else ("marker", "system", "human", "assistant")
    legend = Text("tokens are parted by |; colours: ")
    for name in (*names, "chosen", "rejected", "special"):
        legend.append(name, _STYLES[name]).append("  ")
    console.print(legend)
    stops = ", ".join(repr(stop) for stop in form.stop_strings) or "none"
    console.print(Text(f"only answers and their EOS are in the loss; stop strings: {stops}"))
