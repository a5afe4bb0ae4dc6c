import io
import json

import pytest
from rich.console import Console

from direct_rlhf.data.dialogue import DialogueFormat
from direct_rlhf.data.show import answer_tokens, prompt_tokens, show
from direct_rlhf.data.types import Turn
from direct_rlhf.recipe.schema import DataSection, DataSource, DialogueSection

TURNS = (Turn("human", "Name a fruit."), Turn("assistant", "An apple."), Turn("human", "Another é?"))


@pytest.mark.parametrize("name", ["plain", "gpt2", "llama"])
def test_tokens_are_shown_whole_and_in_the_colour_of_their_role(all_tokens, name):
    tokens = all_tokens[name]
    form = DialogueFormat(DialogueSection(), tokens)
    encoded = form.encode_dialogue(TURNS, "A pear.", max_prompt_tokens=500, max_answer_tokens=500)
    shown = prompt_tokens(encoded.prompt_ids, TURNS, form)
    colours = {}
    for span in shown.spans:
        colours.setdefault(str(span.style), []).append(shown.plain[span.start : span.end])
    if name != "llama":  # its few merges span turns; such a token has the colour of its end
        assert "".join(colours["cyan"]).replace(" ", "").replace("\ufffd", "") == "Nameafruit.Anotheré?"
        assert "".join(colours["blue"]).replace(" ", "") == "Anapple."
    assert ("bold yellow" in colours) == (tokens.bos_id is not None)
    answer, end = answer_tokens(encoded, form, "chosen").plain, tokens.tokenizer.id_to_token(tokens.eos_id)
    assert answer.endswith("|" + end)
    assert answer.removesuffix(end).replace("|", "") == " A pear."
    assert answer.removesuffix(end).count("|") == len(encoded.answer_ids) - 1


def page(folder, tokens, data, dialogue=DialogueSection(), **settings):  # noqa: B008, frozen
    out = io.StringIO()
    show(data, dialogue, tokens, folder=folder, console=Console(file=out, width=160), **settings)
    return out.getvalue()


def rows(*answers):
    return [{"prompt": f"question {at}", "chosen": answer, "rejected": "bad"} for at, answer in enumerate(answers)]


@pytest.fixture
def data(tmp_path):
    lines = [json.dumps(row) for row in rows("good", "word " * 200, " ", "esc \x1b[31m [red]x[/red]", "bad")]
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    (tmp_path / "t.jsonl").write_text('{"text": "a"}\n')
    return DataSection(
        preferences=[DataSource(path="a.jsonl")],
        prompts=[DataSource(path="a.jsonl", format="explicit")],
        text=[DataSource(path="t.jsonl")],
        max_bad_rows=0.5,
        held_out=0,
    )


def test_the_page_shows_sources_counts_reasons_lengths_and_rows(tmp_path, tokens, data):
    text = page(tmp_path, tokens, data)
    assert ["a.jsonl", "explicit"] in [line.split() for line in text.splitlines()]
    assert "read 5, kept 3, empty chosen 1, identical 1, cut early 0" in text
    assert "training 3 (weights applied), held out 0" in text
    assert "empty_chosen     1  a.jsonl:3: the chosen answer is empty" in text
    assert "too_long     1  a.jsonl:2: chosen: longer than data.max_answer_tokens = 96" in text
    assert "stop strings: '\\n\\nHuman:'" in text
    assert "</s>" in text
    assert "Sources of prompts" in text
    assert "Sources of texts" in text


def test_terminal_escapes_and_markup_in_data_are_shown_and_not_obeyed(tmp_path, tokens, data):
    text = page(tmp_path, tokens, data)
    assert "\x1b" not in text
    assert "\ufffd" in text
    assert "[red]x[/red]" in text.replace("|", "")


def test_the_number_of_rows_can_be_chosen(tmp_path, tokens, data):
    assert page(tmp_path, tokens, data, rows=0).count("loss 1") == 0
    assert page(tmp_path, tokens, data, rows=1).count("loss 1") == 2
    assert page(tmp_path, tokens, data).count("loss 1") == 4


def test_a_chat_template_is_shown_too(tmp_path, all_tokens, data):
    text = page(tmp_path, all_tokens["chat"], data, DialogueSection(format="chat_template"))
    assert "<|im_start|>" in text
    assert "stop strings: none" in text
