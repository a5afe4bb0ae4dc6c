import json

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from direct_rlhf.data.dialogue import DialogueFormat
from direct_rlhf.data.formats import recognise, to_pair, to_prompt, to_text
from direct_rlhf.data.types import PreferencePair, Prompt, RejectedRow, Turn
from direct_rlhf.recipe.schema import DialogueSection

PLAIN = DialogueSection()
OWN = DialogueSection(human="\n\nQ:", assistant="\n\nA:")
WORDS = (
    st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), min_size=1, max_size=12)
    .map(str.strip)
    .filter(lambda text: text and not any(m in text for m in ("\n\nHuman:", "\n\nAssistant:", "\n\nQ:", "\n\nA:")))
)
USER, BOT = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes"}


def convert(row, **overrides):
    found = overrides.pop("format", None) or recognise(row)
    return to_pair(row, found, **{"dialogue": PLAIN, "kind": "helpful", "source": "f:1"} | overrides)


@st.composite
def pairs(draw):
    turns = []
    for _ in range(draw(st.integers(0, 2))):
        turns += [Turn("human", draw(WORDS)), Turn("assistant", draw(WORDS))]
    turns.append(Turn("human", draw(WORDS)))
    same_start, same_end = draw(st.sampled_from(["", "It is P", "Yes. "])), draw(st.sampled_from(["", " then.", "."]))
    chosen, rejected = ((same_start + draw(WORDS) + same_end).strip() for _ in range(2))
    assume(chosen != rejected)
    return tuple(turns), chosen, rejected


def every_form(turns, chosen, rejected):
    """One preference in each accepted format."""

    def transcript(markers, answer=None):
        said = "".join((markers.human if t.role == "human" else markers.assistant) + " " + t.text for t in turns)
        return said + markers.assistant + (f" {answer}" if answer else "")

    def messages(answer=None, user="user", bot="assistant"):
        said = [{"role": user if t.role == "human" else bot, "content": t.text} for t in turns]
        return said + ([{"role": bot, "content": answer}] if answer else [])

    def sharegpt(role, text):
        return {"from": role, "value": text}

    return {
        "explicit": {"prompt": transcript(OWN), "chosen": f" {chosen}", "rejected": f" {rejected}"},
        "hh": {"chosen": transcript(PLAIN, chosen), "rejected": transcript(PLAIN, rejected)},
        "implicit": {"chosen": transcript(OWN, chosen), "rejected": transcript(OWN, rejected)},
        "messages, whole": {"chosen": messages(chosen), "rejected": messages(rejected)},
        "messages, prompt apart": {
            "prompt": messages(),
            "chosen": messages(chosen)[-1:],
            "rejected": messages(rejected)[-1:],
        },
        "messages, texts": {"prompt": messages(), "chosen": chosen, "rejected": rejected},
        "messages, prompt twice": {
            "prompt": turns[-1].text,
            "chosen": messages(chosen),
            "rejected": messages(rejected),
        },
        "messages, other roles": {
            "chosen": messages(chosen, "human", "gpt"),
            "rejected": messages(rejected, "human", "gpt"),
        },
        "sharegpt": {
            "conversations": [sharegpt("human" if t.role == "human" else "gpt", t.text) for t in turns],
            "chosen": sharegpt("gpt", chosen),
            "rejected": sharegpt("gpt", rejected),
        },
        "alpaca": {
            "instruction": turns[-1].text,
            "history": [[a.text, b.text] for a, b in zip(turns[:-1:2], turns[1::2], strict=True)],
            "chosen": chosen,
            "rejected": rejected,
        },
        "alpaca, output": {
            "instruction": turns[-1].text,
            "input": "",
            "history": [[a.text, b.text] for a, b in zip(turns[:-1:2], turns[1::2], strict=True)],
            "output": [chosen, rejected],
        },
    }


@pytest.mark.promise("T5")
@given(pair=pairs())
def test_every_form_of_one_dialogue_gives_the_same_normal_form_and_ids(tokens, pair):
    turns, chosen, rejected = pair
    form = DialogueFormat(OWN, tokens)
    ids = set()
    for name, row in every_form(turns, chosen, rejected).items():
        found = recognise(row)
        assert found == name.split(",")[0]
        result = convert(row, dialogue=OWN)
        assert isinstance(result, PreferencePair), (name, result)
        assert (result.prompt, result.chosen, result.rejected, result.cut_early) == (turns, chosen, rejected, False), (
            name
        )
        limits = {"max_prompt_tokens": 9999, "max_answer_tokens": 9999}
        answers = [form.encode_dialogue(result.prompt, answer, **limits) for answer in (result.chosen, result.rejected)]
        ids.add((result.id, *(tuple(part) for encoded in answers for part in (encoded.prompt_ids, encoded.answer_ids))))
    assert len(ids) == 1


@pytest.mark.promise("T5")
def test_an_implicit_prompt_is_cut_at_a_turn_and_never_inside_one():
    same_start = "\n\nHuman: Capital?\n\nAssistant: It is P"
    pair = convert({"chosen": same_start + "aris.", "rejected": same_start + "rague."})
    assert pair.prompt == (Turn("human", "Capital?"),)
    assert (pair.chosen, pair.rejected) == ("It is Paris.", "It is Prague.")


def test_alpaca_input_follows_the_instruction_on_a_new_line():
    pair = convert({"system": "Be brief.", "instruction": "Add.", "input": "1 and 2", "chosen": "3", "rejected": "4"})
    assert pair.prompt == (Turn("system", "Be brief."), Turn("human", "Add.\n1 and 2"))


def test_text_before_the_first_marker_is_a_system_turn():
    pair = convert(
        {"chosen": "Be kind.\n\nHuman: a\n\nAssistant: b", "rejected": "Be kind.\n\nHuman: a\n\nAssistant: c"}
    )
    assert pair.prompt == (Turn("system", "Be kind."), Turn("human", "a"))


@pytest.mark.promise("T6")
def test_markers_inside_message_content_stay_content():
    forged = "No.\n\nHuman: Thanks!\n\nAssistant: You are welcome."
    rows = [
        {"prompt": [{"role": "user", "content": forged}], "chosen": forged, "rejected": "b"},
        {"prompt": "Is it?" + forged, "chosen": forged, "rejected": "b"},
    ]
    for row in rows:
        pair = convert(row)
        assert len(pair.prompt) == 1
        assert pair.prompt[0].text.endswith(forged)
        assert pair.chosen == forged


FORGED = [
    "\n\nHuman:",
    "\n\nAssistant:",
    "\n\nHuman: Thanks!\n\nAssistant: You are welcome.",
    "</s>",
    "<|im_end|>",
    "\n\nQ:",
]


@pytest.mark.promise("T6")
@given(pair=pairs(), forged=st.sampled_from(FORGED), where=st.integers(0, 9), at=st.integers(0, 12))
def test_no_text_in_a_turn_forges_another_where_the_form_keeps_turns_apart(tokens, pair, forged, where, at):
    turns, *answers = pair
    texts = [*(turn.text for turn in turns), *answers]
    where %= len(texts)
    texts[where] = f"{texts[where][:at]}{forged} {texts[where][at:]} end".strip()
    turns = tuple(Turn(turn.role, text) for turn, text in zip(turns, texts, strict=False))
    chosen, rejected = texts[-2:]
    rows = {name: row for name, row in every_form(turns, chosen, rejected).items() if name.split(",")[0] in APART}
    assert len(rows) > 6
    special = set(tokens.special_ids.values())
    for name, row in rows.items():
        found = convert(row, dialogue=OWN)
        assert isinstance(found, PreferencePair), (name, found)
        assert (found.prompt, found.chosen, found.rejected) == (turns, chosen, rejected), name
        encoded = DialogueFormat(OWN, tokens).encode_dialogue(
            found.prompt, found.chosen, max_prompt_tokens=9999, max_answer_tokens=9999
        )
        assert not special & {*encoded.prompt_ids, *encoded.answer_ids[:-1]}


APART = ("messages", "sharegpt", "alpaca")


def test_optional_columns_are_read():
    row = {"prompt": "a", "chosen": "b", "rejected": "c"}
    assert (convert(row).kind, convert(row).margin) == ("helpful", None)
    assert convert({**row, "kind": "honest", "margin": 2}) == convert({**row, "kind": "honest", "margin": 2.0})
    assert (convert({**row, "kind": "honest"}).kind, convert({**row, "margin": 0.5}).margin) == ("honest", 0.5)


def test_dialogues_that_go_on_are_cut_at_the_first_assistant_turn_that_differs():
    row = {
        "chosen": "\n\nHuman: a\n\nAssistant: b\n\nHuman: c\n\nAssistant: d",
        "rejected": "\n\nHuman: a\n\nAssistant: e",
    }
    pair = convert(row)
    assert (pair.prompt, pair.chosen, pair.rejected, pair.cut_early) == ((Turn("human", "a"),), "b", "e", True)


@pytest.mark.parametrize(
    ("rejected", "turn"),
    [
        ("\n\nHuman: a\n\nAssistant: b\n\nHuman: other\n\nAssistant: d", 3),
        ("\n\nHuman: a\n\nAssistant: b", 3),
        ("\n\nHuman: other\n\nAssistant: d", 1),
    ],
)
def test_dialogues_that_part_before_any_common_prompt_ends_are_rejected(rejected, turn):
    row = {"chosen": "\n\nHuman: a\n\nAssistant: b\n\nHuman: c\n\nAssistant: d", "rejected": rejected}
    detail = f"chosen and rejected part at turn {turn}, which is not an assistant turn in both"
    assert convert(row) == RejectedRow("f:1", "diverges_early", detail)


BAD_ROWS = [
    ("missing_key", "rejected is missing; there is: prompt, chosen", {"prompt": "a", "chosen": "b"}, "explicit"),
    ("missing_key", "chosen[0].content is missing; there is: role", {"chosen": [{"role": "user"}], "rejected": []}, None),
    ("missing_key", "a prompt row holds no preference: chosen and rejected are missing", {"prompt": "a"}, None),
    ("wrong_type", "chosen must be text, is null", {"prompt": "a", "chosen": None, "rejected": "b"}, "explicit"),
    ("wrong_type", "rejected must be text, is int", {"prompt": "a", "chosen": "b", "rejected": 3}, "explicit"),
    ("wrong_type", "chosen[0] must be a message, is a str", {"chosen": ["a"], "rejected": ["b"]}, None),
    ("wrong_type", "margin must be a finite number, is nan", {"prompt": "a", "chosen": "b", "rejected": "c", "margin": float("nan")}, None),
    ("wrong_type", "margin must be a finite number, is True", {"prompt": "a", "chosen": "b", "rejected": "c", "margin": True}, None),
    ("wrong_type", "output must be a list of two answers, the chosen one first", {"instruction": "a", "output": ["b"]}, None),
    ("wrong_type", "history[0] must be [question, answer]", {"instruction": "a", "history": ["b"], "chosen": "c", "rejected": "d"}, None),
    ("empty_chosen", "the chosen answer is empty", {"prompt": "a", "chosen": " \n", "rejected": "b"}, None),
    ("empty_chosen", "chosen holds no message", {"chosen": [], "rejected": []}, None),
    ("empty_prompt", "the last human turn is empty", {"prompt": " ", "chosen": "a", "rejected": "b"}, None),
    ("empty_prompt", "the prompt has no human turn", {"prompt": [], "chosen": "a", "rejected": "b"}, None),
    ("identical", "chosen and rejected are the same", {"prompt": "a", "chosen": "b ", "rejected": " b"}, None),
    ("identical", "chosen and rejected are the same", {"chosen": [USER, BOT], "rejected": [USER, BOT]}, None),
    ("no_turns", "chosen holds no '\\n\\nHuman:' and no '\\n\\nAssistant:'; add a prompt column", {"chosen": "a", "rejected": "b"}, None),
    ("no_turns", "chosen holds no '\\n\\nHuman:' and no '\\n\\nAssistant:'; add a prompt column", {"chosen": "Human: a", "rejected": "Human: b"}, "hh"),
    ("roles_out_of_order", "chosen ends with a human turn, it must end with an assistant turn", {"chosen": [USER], "rejected": [USER, BOT]}, None),
    ("roles_out_of_order", "a prompt must start and end with a human turn, its turns are: assistant, human", {"prompt": [BOT, USER], "chosen": "a", "rejected": "b"}, None),
    ("roles_out_of_order", "a prompt must start and end with a human turn, its turns are: human, assistant", {"prompt": [USER, BOT], "chosen": "a", "rejected": "b"}, None),
    ("roles_out_of_order", "a system turn must come before all others", {"prompt": [USER, {"role": "system", "content": "x"}, USER], "chosen": "a", "rejected": "b"}, None),
    ("unknown_role", "chosen[0] has role 'tool'; known: user, human, assistant, gpt, system", {"chosen": [{"role": "tool", "content": "x"}], "rejected": [BOT]}, None),
    ("unknown_role", "chosen[0] has role '[]'; known: user, human, assistant, gpt, system", {"chosen": [{"role": [], "content": "x"}], "rejected": [BOT]}, None),
    ("lone_surrogate", "chosen holds half a surrogate pair at character 1", {"prompt": "a", "chosen": "b\ud800", "rejected": "c"}, None),
    ("nul", "prompt holds a NUL character", {"prompt": "a\0", "chosen": "b", "rejected": "c"}, None),
]  # fmt: skip


@pytest.mark.promise("T1")
@pytest.mark.parametrize(
    ("reason", "detail", "row", "format"), BAD_ROWS, ids=[f"{r[0]}-{i}" for i, r in enumerate(BAD_ROWS)]
)
def test_a_bad_row_gets_its_reason(reason, detail, row, format):  # noqa: A002
    assert convert(row, format=format) == RejectedRow("f:1", reason, detail)


JSON = st.recursive(
    st.none() | st.booleans() | st.floats() | st.integers() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["role", "content", "from", "value", "prompt", "chosen"]), inner, max_size=3)
    ),
    max_leaves=6,
)
KEYS = [
    "prompt",
    "chosen",
    "rejected",
    "conversations",
    "instruction",
    "input",
    "output",
    "history",
    "system",
    "margin",
    "kind",
    "text",
]


@pytest.mark.promise("T1")
@given(row=st.dictionaries(st.sampled_from(KEYS), JSON))
def test_no_row_crashes(row):
    found = recognise(row)
    for name in {found} - {None} | {"explicit", "implicit", "hh", "messages", "sharegpt", "alpaca"}:
        assert isinstance(convert(row, format=name), PreferencePair | RejectedRow)
        assert isinstance(to_prompt(row, name, dialogue=PLAIN, kind="k", source="f:1"), Prompt | RejectedRow)
    assert isinstance(to_prompt(row, "prompt", dialogue=PLAIN, kind="k", source="f:1"), Prompt | RejectedRow)
    assert isinstance(to_text(row, source="f:1"), str | RejectedRow)


@pytest.mark.parametrize(
    "prompt",
    ["Hi there", "\n\nHuman: Hi there", "\n\nHuman: Hi there\n\nAssistant:", [{"role": "user", "content": "Hi there"}]],
)
def test_a_prompt_row_is_text_transcript_or_messages(prompt):
    row = json.loads(json.dumps({"prompt": prompt}))
    result = to_prompt(row, recognise(row), dialogue=PLAIN, kind="helpful", source="f:1")
    assert result.turns == (Turn("human", "Hi there"),)


def test_a_preference_row_gives_its_prompt():
    row = {"prompt": "Hi", "chosen": "a", "rejected": "b"}
    assert to_prompt(row, "explicit", dialogue=PLAIN, kind="k", source="f:1").turns == convert(row).prompt


def test_text_rows_are_kept_as_they_are():
    assert to_text({"text": " a\n"}, source="f:1") == " a\n"
    assert to_text({"text": " \n"}, source="f:1") == RejectedRow("f:1", "empty_text", "text is empty")
