import pytest
from pydantic import ValidationError

from direct_rlhf.recipe.schema import ConversationSection

PROMPTS = {"judge_prompts": "p.jsonl"}
SERVER = {"base_url": "http://127.0.0.1:8000/v1", "model": "m"}


@pytest.mark.parametrize(
    "given",
    [
        {},
        {**PROMPTS, "judge": "endpoint", "judging": SERVER, "references": "r.jsonl", "without_references": True},
        {
            **PROMPTS,
            "judge": "local",
            "judging": {"model": "world:base"},
            "self_check": "pairs.jsonl",
            "pairwise": True,
        },
        {**PROMPTS, "judge": "recorded", "judging": {"recorded": "judgments.jsonl"}},
        {**PROMPTS, "judge": "endpoint", "judging": {**SERVER, "max_cost": 5, "price_in": 0, "price_out": 0}},
    ],
)
def test_a_judge_with_all_it_needs_is_taken(given):
    assert ConversationSection.model_validate(given).judge == given.get("judge", "scripted")


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"judge": "endpoint"}, "judge = endpoint needs judging.base_url, judging.model, judge_prompts"),
        ({**PROMPTS, "judge": "endpoint", "judging": {"model": "m"}}, "judge = endpoint needs judging.base_url"),
        ({**PROMPTS, "judge": "local"}, "judge = local needs judging.model"),
        ({**PROMPTS, "judge": "recorded"}, "judge = recorded needs judging.recorded"),
        ({"references": "r", "pairwise": True}, "references, pairwise: the scripted judge has no use for this"),
        ({**PROMPTS, "judge": "endpoint", "judging": SERVER, "without_references": True}, "needs references"),
        ({"judging": {"max_cost": 5}}, "max_cost needs price_in and price_out"),
        ({"judging": {"base_url": "ftp://x"}}, "base_url"),
        ({"judging": {"key": "sk-secret"}}, "key"),  # there is no place for a key
    ],
)
def test_what_a_judge_lacks_is_said(given, said):
    with pytest.raises(ValidationError, match=said):
        ConversationSection.model_validate(given)
