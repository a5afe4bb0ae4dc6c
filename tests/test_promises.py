"""The page of promises says no more than the tests hold."""

import pytest

import promises
from promises import GROUPS, NOT_YET, PAGE, PROMISES, TESTS, Promise, Test, collected, marks, page, state

IDS = [promise.id for promise in PROMISES]


@pytest.fixture(scope="module")
def found():
    return collected(TESTS)


def test_the_page_is_the_one_that_the_tests_give(found):
    assert PAGE.read_text(encoding="utf-8") == page(found), "run: python tests/promises.py > docs/promises.md"


def test_no_mark_names_a_promise_that_there_is_not(found):
    unknown = {promise: tests for promise, tests in found.items() if promise not in IDS}
    assert unknown == {}


def test_exactly_the_promises_that_are_listed_as_such_have_no_test(found):
    without = {name for name in IDS if name not in found}
    assert without - NOT_YET == set(), "a promise has lost its only test"
    assert NOT_YET - without == set(), "these have a test by now: take them out of NOT_YET in tests/promises.py"


def test_no_promise_is_called_held_that_has_no_test_or_lacks_something(found):
    rows = {line.split(" | ")[0].removeprefix("| "): line for line in page(found).splitlines() if line.startswith("| ")}
    for promise in PROMISES:
        shown = rows[promise.id].split(" | ")[2]
        assert (shown == "held") == (promise.id in found and not promise.missing)
        assert promise.missing in shown


def test_every_promise_is_on_the_page_once_and_in_its_group(found):
    assert len(set(IDS)) == len(IDS)
    lines = page(found).splitlines()
    heading = ""
    seen = []
    for line in lines:
        if line.startswith("## "):
            heading = line[3:]
        name = line.removeprefix("| ").split(" | ")[0]
        if line.startswith("| ") and name in IDS:
            assert heading == f"{name.rstrip('0123456789')} {GROUPS[name.rstrip('0123456789')]}"
            seen.append(name)
    assert seen == IDS


def test_every_link_leads_to_a_test_file_and_a_test_in_it(found):
    for tests in found.values():
        for test in tests:
            text = (TESTS / test.file).read_text(encoding="utf-8")
            assert not test.name or f"def {test.name}(" in text


SOURCE = """
import pytest

@pytest.mark.promise("K1")
@pytest.mark.promise("K2", "R1")
@pytest.mark.parametrize("x", [1, pytest.param(2, marks=pytest.mark.promise("N1"))])
def test_a(x): ...

def helper(): ...

class TestMore:
    pytestmark = pytest.mark.promise("T1")
    @pytest.mark.promise("T2")
    async def test_b(self): ...
    def helper(self): ...

@pytest.mark.promise("T3")
class TestAll:
    def test_c(self): ...
"""


def test_marks_are_found_wherever_they_may_stand():
    assert sorted(marks(SOURCE)) == [
        ("K1", "test_a"),
        ("K2", "test_a"),
        ("N1", "test_a"),
        ("R1", "test_a"),
        ("T1", "test_b"),
        ("T2", "test_b"),
        ("T3", "test_c"),
    ]


@pytest.mark.parametrize("value", ['pytest.mark.promise("K1")', '[pytest.mark.slow, pytest.mark.promise("K1")]'])
def test_a_mark_on_the_module_counts_for_the_whole_file(value):
    assert list(marks(f"import pytest\npytestmark = {value}\ndef test_a(): ...")) == [("K1", "")]


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("@pytest.mark.promise('K1')\ndef helper(): ...", "line 1: a promise mark that stands on no test"),
        ("mark = pytest.mark.promise\n@mark('K1')\ndef test_a(): ...", "line 1: a promise mark that stands on no test"),
        ("@pytest.mark.promise(ID)\ndef test_a(): ...", "line 1: name the promise as plain text"),
    ],
)
def test_a_mark_that_would_be_lost_is_an_error(source, message):
    with pytest.raises(ValueError, match=message):
        list(marks(source))


def test_a_state_is_earned_by_a_test_and_lowered_by_what_is_missing():
    test = [Test("a.py", "test_a")]
    assert state(Promise("K1", ""), test) == "held"
    assert state(Promise("K1", "", "no GPU"), test) == "partly: no GPU"
    assert state(Promise("K1", "", "no GPU"), []) == "not yet: no GPU"
    assert state(Promise("K1", ""), []) == "not yet: no test tries to break it"


def test_losing_the_only_test_of_a_promise_is_seen(tmp_path, monkeypatch):
    (tmp_path / "test_a.py").write_text("import pytest\n@pytest.mark.promise('K1')\ndef test_a(): ...\n")
    monkeypatch.setattr(promises, "PROMISES", [Promise("K1", "It holds.")])
    held = page(collected(tmp_path))
    assert "| K1 | It holds. | held | [test_a.py](../tests/test_a.py): `test_a` |" in held
    (tmp_path / "test_a.py").write_text("def test_a(): ...\n")
    assert "| K1 | It holds. | not yet: no test tries to break it |  |" in page(collected(tmp_path))
