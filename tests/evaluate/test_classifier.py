"""Classifiers by stand-ins: what they give is a score, and what they cannot give is none, never 0."""

import json
import sys
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from types import ModuleType

import pytest
import torch
import transformers as tf

from direct_rlhf.data.types import Turn
from direct_rlhf.errors import ConfigError
from direct_rlhf.evaluate import guard as guard_module
from direct_rlhf.evaluate import perspective
from direct_rlhf.evaluate.classifier import DialogueScorer, finite, load_classifier
from direct_rlhf.evaluate.guard import TEMPLATE, load_guard, toxic_label
from direct_rlhf.evaluate.perspective import Perspective
from direct_rlhf.evaluate.scoring import Score


@pytest.mark.parametrize(
    ("score", "found"),
    [(0, 0.0), (0.25, 0.25), (1, 1.0), (float("nan"), None), (1.5, None), (-0.1, None), (None, None), ("x", None), (True, None)],
)  # fmt: skip
def test_only_a_probability_is_a_score(score, found):
    assert finite(score) == found


@pytest.fixture
def detoxify(monkeypatch):
    """A module of that name whose model scores a text by its length, and nothing finite where it holds "broken"."""
    made = []

    class Detoxify:
        def __init__(self, kind, device="cpu", checkpoint=None):
            made.append((kind, device, checkpoint))

        def predict(self, texts):
            return {"toxicity": [float("nan") if "broken" in text else len(text) / 100 for text in texts], "insult": []}

    module = ModuleType("detoxify")
    module.Detoxify = Detoxify
    monkeypatch.setitem(sys.modules, "detoxify", module)
    return made


def test_detoxify_is_asked_in_batches_for_toxicity_and_a_nan_is_no_score(detoxify, tmp_path):
    name, scorer = load_classifier("detoxify", tmp_path / "weights.ckpt")
    assert (name, detoxify) == ("detoxify", [("original", "cpu", str(tmp_path / "weights.ckpt"))])
    texts = ["a" * n for n in range(70)] + ["broken"]
    assert scorer(texts) == [*(n / 100 for n in range(70)), None]


def test_a_classifier_that_is_not_installed_or_lacks_what_it_needs_says_so(monkeypatch):
    monkeypatch.setitem(sys.modules, "detoxify", None)
    with pytest.raises(ConfigError, match=r"detoxify: it is not installed. Run `pip install detoxify`"):
        load_classifier("detoxify")
    monkeypatch.delenv(perspective.KEY, raising=False)
    with pytest.raises(ConfigError, match=r"needs an API key. Set the environment variable PERSPECTIVE_API_KEY"):
        load_classifier("perspective")
    with pytest.raises(ConfigError, match="guard: classifier_path is not set"):
        load_classifier("guard")


GOOD = (200, {"attributeScores": {"TOXICITY": {"summaryScore": {"value": 0.75}}}}, {})


@contextmanager
def service(*replies):
    """A local server that gives the replies in turn, the last one for ever; what it was asked; what was slept."""
    asked, slept = [], []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            code, reply, headers = replies[min(len(asked), len(replies) - 1)]
            asked.append((body, dict(self.headers), self.path))
            self.send_response(code)
            for name, value in headers.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(reply if isinstance(reply, bytes) else json.dumps(reply).encode())

        def log_message(self, *args):
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    try:
        url = f"http://127.0.0.1:{server.server_port}/analyze"
        yield Perspective("secret-key", url, timeout=5, sleep=slept.append), asked, slept
    finally:
        server.shutdown()
        server.server_close()


def test_perspective_sends_the_text_and_reads_the_score_and_keeps_its_key_out_of_the_address():
    with service(GOOD) as (scorer, asked, slept):
        assert scorer(["You fool."]) == [0.75]
    body, headers, path = asked[0]
    assert body["comment"] == {"text": "You fool."}
    assert body["requestedAttributes"] == {"TOXICITY": {}}
    assert body["doNotStore"] is True
    assert headers["X-Goog-Api-Key"] == "secret-key"
    assert "secret-key" not in path
    assert slept == []


@pytest.mark.promise("J1")
def test_perspective_tries_again_after_429_5xx_and_broken_replies_and_obeys_retry_after():
    with service((429, {}, {"Retry-After": "7"}), (503, {}, {}), (200, b"<html>", {}), GOOD) as (scorer, asked, slept):
        assert scorer(["a"]) == [0.75]
    assert len(asked) == 4
    assert slept[0] == 7
    assert 1 <= slept[1] <= 2
    assert 2 <= slept[2] <= 4


@pytest.mark.promise("J1", "J2")
def test_perspective_does_not_repeat_a_refused_text_and_gives_it_no_score():
    with service((400, {"error": "language"}, {}), GOOD) as (scorer, asked, slept):
        assert scorer(["zzz", "a"]) == [None, 0.75]
    assert (len(asked), slept) == (2, [])
    with service(*[(400, {}, {})] * 5, GOOD) as (scorer, asked, _):  # a row of them is no outage
        assert scorer(["zzz"] * 5 + ["a"]) == [None] * 5 + [0.75]


@pytest.mark.promise("J2")
def test_an_outage_of_perspective_is_no_score_and_is_given_up_after_a_few_texts():
    with service((500, {}, {})) as (scorer, asked, slept):
        assert scorer(["a", " ", "b", "c", "d", "e", "f"]) == [None, 0.0, None, None, None, None, None]
    assert len(asked) == perspective.DOWN_AFTER * perspective.TRIES
    assert max(slept) <= perspective.LONGEST_WAIT


def test_no_connection_is_no_score_and_a_reply_without_a_score_neither():
    with service((200, {"attributeScores": {}}, {})) as (scorer, _, _):
        assert scorer(["a"]) == [None]
        url = scorer.url
    assert Perspective("k", url, timeout=1, sleep=lambda s: None)(["a"]) == [None]


def test_a_refused_key_ends_it_at_once_and_is_not_shown():
    with service((403, {}, {})) as (scorer, _, _), pytest.raises(ConfigError, match="refuses the key") as caught:
        scorer(["a"])
    assert "secret-key" not in str(caught.value)


def test_a_guards_score_is_its_own_probability_of_unsafe_against_safe(tiny_folder, tokens, model, monkeypatch):
    monkeypatch.setattr(guard_module, "LEAST_VERDICT", 0.0)  # a random model says neither
    guard = load_guard(tiny_folder, "Q: {prompt} A: {answer} =")
    assert isinstance(guard, DialogueScorer)
    (score,) = guard.of_dialogues([((Turn("human", "What is it?"),), "blue")])
    context = [
        *tokens.encode("Q: "),
        *tokens.encode("What is it?"),
        *tokens.encode(" A: "),
        *tokens.encode("blue"),
        *tokens.encode(" ="),
    ]

    def probability(word):
        ids = tokens.encode(word)
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([[*context, *ids]])).logits[0]
        rows = range(len(context) - 1, len(context) - 1 + len(ids))
        return float(
            torch.stack([logits[row].log_softmax(-1)[i] for row, i in zip(rows, ids, strict=True)]).sum().exp()
        )

    safe, unsafe = probability("safe"), probability("unsafe")
    assert score == pytest.approx(unsafe / (safe + unsafe), rel=1e-2)


def test_a_guard_that_is_sure_is_read_and_one_that_says_something_else_gives_no_verdict(tiny_folder, monkeypatch):
    logprobs = iter([-4.0, -0.02, -0.1, -3.0, -9.0, -9.0, float("nan"), -0.1])
    monkeypatch.setattr(
        guard_module,
        "score_continuations",
        lambda model, requests, batch: [Score(next(logprobs), True) for _ in requests],
    )
    guard = load_guard(tiny_folder, "{prompt} {answer}")
    asked = [((Turn("human", "a"), Turn("assistant", "b"), Turn("human", "c")), "d")] * 4
    unsafe, safe, none, nan = guard.of_dialogues(asked)
    assert unsafe > 0.9
    assert safe < 0.1
    assert (none, nan) == (None, None)


def test_a_dialogue_that_does_not_fit_the_guard_has_no_score_and_special_tokens_in_it_stay_text(tiny_folder):
    guard = load_guard(tiny_folder, "{prompt} {answer}")
    assert guard(["snow " * 400]) == [None]
    ids = guard._encode((), "<eos>")
    assert guard.tokens.eos_id not in ids
    assert guard.tokens.eos_id in load_guard(tiny_folder, "<eos>{answer}")._encode((), "a")


def test_a_guard_template_without_an_answer_and_a_folder_without_a_model_are_refused(tiny_folder, tmp_path):
    with pytest.raises(ConfigError, match=r"guard_template: it holds no \{answer\}"):
        load_guard(tiny_folder, "Is it safe?")
    with pytest.raises(ConfigError, match=r"holds no readable config.json"):
        load_guard(tmp_path)
    assert "{prompt}" in TEMPLATE
    assert "{answer}" in TEMPLATE


def test_a_text_classifier_scores_by_its_toxic_label(tiny_folder, tmp_path):
    torch.manual_seed(0)
    config = tf.BertConfig(
        vocab_size=340, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16,
        max_position_embeddings=64, id2label={0: "clean", 1: "toxic"}, label2id={"clean": 0, "toxic": 1},
    )  # fmt: skip
    model = tf.BertForSequenceClassification(config).eval()
    model.save_pretrained(tmp_path)
    for file in tiny_folder.glob("*token*"):
        (tmp_path / file.name).write_bytes(file.read_bytes())
    texts = ["You fool.", "The sky is blue. " * 60]
    name, scorer = load_classifier("guard", tmp_path)
    found = scorer(texts)
    assert name == f"guard: {tmp_path.name}"
    ids = tf.AutoTokenizer.from_pretrained(tmp_path)(texts[0], return_tensors="pt")
    with torch.no_grad():
        assert found[0] == pytest.approx(float(model(**ids).logits.softmax(-1)[0, 1]), rel=1e-3)
    assert 0 <= found[1] <= 1


@pytest.mark.parametrize("labels", [{0: "LABEL_0", 1: "LABEL_1"}, {0: "toxic", 1: "hate"}])
def test_a_classifier_whose_toxic_label_is_not_clear_is_refused(labels):
    with pytest.raises(ConfigError, match=r"which label is toxic\? Its labels are"):
        toxic_label(labels)
