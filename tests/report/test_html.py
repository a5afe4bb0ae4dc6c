"""The report is inert, complete, and says what is missing."""

import json
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote

import pytest
from markupsafe import Markup

from direct_rlhf.errors import ConfigError
from direct_rlhf.report import plots
from direct_rlhf.report.html import write_report

TAGS = {
    "html",
    "head",
    "meta",
    "title",
    "style",
    "body",
    "main",
    "header",
    "nav",
    "section",
    "div",
    "dl",
    "dt",
    "dd",
    "h1",
    "h2",
    "h3",
    "p",
    "ul",
    "li",
    "a",
    "span",
    "strong",
    "small",
    "i",
    "pre",
    "details",
    "summary",
    "table",
    "thead",
    "tbody",
    "tr",
    "th",
    "td",
    "figure",
    "figcaption",
    "svg",
    "g",
    "path",
    "defs",
    "use",
    "text",
    "clippath",
    "rect",
}
ATTRIBUTES = {
    "lang",
    "charset",
    "http-equiv",
    "content",
    "name",
    "id",
    "class",
    "style",
    "href",
    "dir",
    "tabindex",
    "scope",
    "role",
    "aria-label",
    "viewbox",
    "d",
    "transform",
    "x",
    "y",
    "width",
    "height",
    "clip-path",
    "xlink:href",
}
VOID = {"meta"}


class Page(HTMLParser):
    """Tags, attributes and, of every section, its text and its table rows."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags, self.attributes, self.links, self.sections = set(), [], [], {}
        self.rows, self.open, self.section, self.folded = {}, [], "", []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        self.attributes += [(tag, name, value) for name, value in attrs]
        self.links += [value for name, value in attrs if name == "href"]
        if tag not in VOID:
            self.open.append(tag)
        if tag == "section":
            self.section = dict(attrs)["id"]
            self.sections[self.section] = ""
            self.rows[self.section] = []
        if tag == "tr" and self.section:
            self.rows[self.section].append([])
        if tag in ("td", "th") and self.rows.get(self.section):
            self.rows[self.section][-1].append("")

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        self.open.pop()

    def handle_endtag(self, tag):
        assert self.open.pop() == tag, f"</{tag}> closes nothing"

    def handle_data(self, data):
        if self.section:
            self.sections[self.section] += data
            if "tr" in self.open:
                self.rows[self.section][-1][-1] += data
        if "details" in self.open:
            self.folded.append(data)


@pytest.fixture
def quick_plots(monkeypatch):
    """Empty pictures: drawing them takes seconds, and test_plots.py looks at them."""
    monkeypatch.setattr(plots, "draw", lambda name, paint, size=None: Markup("<svg></svg>"))


def page(run, **options):
    return Page(write_report([run], **options).read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def hostile_page(hostile_run, tmp_path_factory):
    """The whole report of hostile texts, pictures and all."""
    return write_report([hostile_run], tmp_path_factory.mktemp("page") / "report.html").read_text(encoding="utf-8")


@pytest.mark.promise("X5")
def test_hostile_texts_make_no_node_outside_the_allow_list(hostile_page):
    found = Page(hostile_page)
    assert found.tags <= TAGS
    assert {name for _, name, _ in found.attributes} <= ATTRIBUTES
    assert found.open == []


@pytest.mark.promise("X5")
def test_nothing_is_loaded_and_links_stay_relative(hostile_page):
    found = Page(hostile_page)
    for tag, name, value in found.attributes:
        if name == "xlink:href":
            assert value.startswith("#")
        elif name == "href":
            assert tag == "a"
            assert value.startswith("#") or not re.match(r"[a-z+.-]*:|//", value, re.IGNORECASE)
        elif name in ("style", "clip-path"):
            assert "url(" not in value.replace("url(#", "")
    policies = [value for _, name, value in found.attributes if name == "content"]
    assert any(policy.startswith("default-src 'none'; style-src 'unsafe-inline'; img-src data:") for policy in policies)


@pytest.mark.promise("X5")
def test_hostile_texts_are_shown_as_text(hostile_page):
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in hostile_page
    assert "{{ 7*7 }}" in hostile_page  # not a template
    assert not re.search("[\u202a-\u202e\u2066-\u2069\x00\x1b]", hostile_page)
    assert "שלום" in hostile_page


@pytest.mark.promise("X5")
def test_hostile_names_of_runs_arms_tasks_and_stages_are_escaped(make_run, quick_plots):
    run = make_run(arms=("base",))
    evil = "<img src=x onerror=alert(1)>"
    (run / "recipe.yaml").write_text(f"name: {evil!r}\nmodel: {{base: {evil!r}}}\n")
    shutil.copytree(run / "evaluation" / "base", run / "evaluation" / "javascript:alert(1) <b>")
    general = run / "evaluation" / "base" / "general.json"
    general.write_text(general.read_text().replace("world_truth", evil).replace('"acc"', '"<u>acc"'))
    fitness = run / "reward_model" / "fitness.json"
    fitness.write_text(fitness.read_text().replace("helpful", evil).replace("praise adds", evil))
    found = page(run)
    assert found.tags <= TAGS
    assert not [link for link in found.links if link.startswith("javascript:")]


def test_every_link_leads_to_a_file_of_the_run(make_run, quick_plots):
    run = make_run()
    links = [link for link in page(run).links if not link.startswith("#")]
    assert "evaluation/direct_ppo/toxicity.json" in links
    assert "metrics.jsonl" in links
    assert [link for link in links if not (run / unquote(link)).exists()] == []


def test_links_of_a_report_written_elsewhere_still_lead_there(make_run, quick_plots, tmp_path):
    run = make_run("a b#c")
    out = write_report([run], tmp_path / "elsewhere" / "page.html")
    links = [link for link in Page(out.read_text()).links if not link.startswith("#")]
    assert links
    assert all((out.parent / unquote(link)).exists() for link in links)


def test_every_headline_number_links_to_its_raw_file(make_run, quick_plots):
    text = write_report([make_run(arms=("base", "direct_ppo"))]).read_text()
    for number, file in (
        ("6.31 [5.91, 6.71]", "conversation"),
        ("73.8 % [72.4, 75.2]", "general"),
        ("0.043 % [0.030, 0.056]", "toxicity"),
    ):
        assert re.search(rf'<a href="evaluation/direct_ppo/{file}.json">(<strong>)?{re.escape(number)}', text)
    assert '<a href="evaluation/comparisons.json">−0.4 points' in text


def arm_cells(found, arm):
    """Headline column -> cell text of an arm."""
    header, *rows = found.rows["arms"]
    row = next(row for row in rows if row[0].strip() == arm)
    return {name: text.strip() for name, text in zip(header[1:], row[1:], strict=True)}


@pytest.mark.promise("U5")
@pytest.mark.parametrize(
    ("file", "columns"),
    [
        ("general", ["General mean"]),
        ("conversation", ["Conversation score"]),
        ("toxicity", ["Toxic answers", "Bad-word probability", "Refusal of harmful", "Over-refusal"]),
    ],
)
def test_a_missing_result_is_not_measured_and_never_zero(make_run, quick_plots, file, columns):
    run = make_run(arms=("base", "direct_ppo"))
    (run / "evaluation" / "base" / f"{file}.json").unlink()
    found = page(run)
    cells = arm_cells(found, "base")
    assert [name for name, text in cells.items() if text == "not measured"] == [
        name for name in cells if name in columns
    ]
    assert "not measured" not in arm_cells(found, "direct PPO").values()
    assert f"evaluation/base/{file}.json is missing." in found.sections["missing"]
    if file == "general":
        assert all(row[1].strip() == "not measured" for row in found.rows["general"][1:])


@pytest.mark.parametrize(
    ("file", "section", "said"),
    [
        ("evaluation/comparisons.json", "comparisons", "not measured"),
        ("evaluation/comparisons.json", "verdict", "not measured"),
        ("evaluation/comparisons.json", "missing", "nothing is called better or worse"),
        ("metrics.jsonl", "training", "not measured"),
        ("metrics.jsonl", "length", "not measured"),
        ("metrics.jsonl", "missing", "metrics.jsonl is missing"),
        ("reward_model/fitness.json", "missing", "reward_model/fitness.json is missing"),
        ("manifest.json", "missing", "manifest.json is missing"),
        ("manifest.json", "reproduce", "recipe SHA-256: not recorded"),
        ("recipe.yaml", "missing", "recipe.yaml is missing"),
        ("status.json", "missing", "status.json is missing"),
        ("samples.jsonl", "reproduce", "samples.jsonl missing"),
        ("stages", "time", "not measured"),
        ("stages", "data", "not measured"),
    ],
)
def test_each_missing_input_is_said_where_it_belongs(make_run, quick_plots, file, section, said):
    run = make_run(arms=("base", "direct_ppo"))
    assert said not in page(run).sections[section]
    target = run / file
    shutil.rmtree(target) if target.is_dir() else target.unlink()
    assert said in " ".join(page(run).sections[section].split())


def test_the_fitness_card_shows_its_checks_and_without_one_nothing(make_run, quick_plots):
    run = make_run(arms=("base", "direct_ppo"))
    rows = {row[0].strip(): row[1].strip() for row in page(run).rows["reward"]}
    assert rows["Held-out accuracy"] == "73.1 % [69.4, 76.6]n = 550"
    assert rows["Saying the answer twice adds (sd)"] == "not measured"  # no pair was fit to be changed
    (run / "reward_model" / "fitness.json").unlink()
    found = page(run)
    assert found.rows["reward"] == []
    assert found.sections["reward"].split() == ["Reward", "model", "not", "measured"]


def test_the_cost_models_card_stands_beside_the_reward_models(make_guarded, make_run, quick_plots):
    plain, run = make_run("plain", ("base", "direct_ppo")), make_guarded(arms=("base", "direct_ppo"))
    assert "Cost model" not in page(plain).sections["reward"]
    found = page(run)
    accuracies = [row[1].strip() for row in found.rows["reward"] if row[0].strip() == "Held-out accuracy"]
    assert accuracies == ["73.1 % [69.4, 76.6]n = 550", "68.4 % [62.0, 74.0]n = 250"]
    text = found.sections["reward"]
    assert text.index("warn") < text.index("Cost model") < text.index("pass") < text.index("a cost is minus its score")
    assert {"reward_model/fitness.json", "cost_model/fitness.json"} <= set(found.links)
    both = Page(write_report([plain, run]).read_text()).sections["reward"]
    assert "demo · Reward model" in both
    assert "demo · Cost model" in both
    assert "plain · Cost model" not in both


def test_a_cost_models_card_that_is_missing_is_said_where_costs_were_bound(make_guarded, make_run, quick_plots):
    run = make_guarded(arms=("base", "direct_ppo"))
    said = "The fitness of the cost model."
    assert said not in page(run).sections["missing"]
    (run / "cost_model" / "fitness.json").write_text("{torn")
    found = page(run)
    assert said in found.sections["missing"]
    assert "cost_model/fitness.json cannot be read" in found.sections["missing"]
    assert "Cost model" not in found.sections["reward"]
    assert said not in page(make_run("plain", ("base", "direct_ppo"))).sections["missing"]


CLEAN = "What the evaluation asks stands in no training row (0 of 400 items)."


@pytest.mark.parametrize(
    ("overlap", "said"),
    [
        ({}, CLEAN),
        (
            {"not_compared": ["hellaswag", "<b>"]},
            f"{CLEAN} Not compared, as their documents are not local files: hellaswag, <b>.",
        ),
        (
            {"rows": 3, "items": 2},
            "What 2 of 400 evaluation items ask stands in 3 training rows too, so the results on these items show "
            "less. overlap.jsonl",
        ),
        ({"compared": 0}, "Whether training rows ask what the evaluation asks was not compared."),
        ({"rows": None}, "Whether training rows ask what the evaluation asks was not compared."),
    ],
)
def test_the_overlap_of_training_and_evaluation_is_said_and_its_zero_too(make_run, quick_plots, overlap, said):
    run = make_run(arms=("base", "direct_ppo"))
    file = run / "stages" / "data.json"
    record = json.loads(file.read_text())
    record["facts"]["overlap"] |= overlap
    file.write_text(json.dumps(record))
    (run / "overlap.jsonl").write_text("{}\n")
    found = page(run)
    assert " ".join(found.sections["data"].split()).endswith(said)
    assert [row[0].strip() for row in found.rows["data"]] == ["Input", "preferences"]
    assert ('<p class="warning">What 2 of 400' in (run / "report.html").read_text()) == (overlap.get("items") == 2)


def test_missing_item_records_leave_no_answers_and_no_lengths(make_run, quick_plots):
    run = make_run(arms=("base", "direct_ppo"))
    for file in run.glob("evaluation/*/*.jsonl"):
        file.unlink()
    found = page(run)
    assert found.sections["answers"].strip().endswith("not measured")
    assert all({cell.strip() for cell in row[1:]} == {"not measured"} for row in found.rows["length"][1:])


def test_a_run_with_nothing_in_it_still_reports(tmp_path):
    (tmp_path / "recipe.yaml").write_text("name: empty\n")
    found = page(tmp_path)
    for section in ("verdict", "arms", "comparisons", "training", "general", "toxicity", "reward", "answers", "time"):
        assert "not measured" in found.sections[section]
    assert not re.search(r"\b0\.0\b|\b0 %", "".join(found.sections.values()))


def test_a_headline_withheld_for_low_coverage_is_said(make_run, quick_plots):
    run = make_run(arms=("base", "direct_ppo"))
    file = run / "evaluation" / "base" / "conversation.json"
    file.write_text(
        file.read_text().replace('"score": 2.81', '"score": null').replace('"n_failed": 2', '"n_failed": 30')
    )
    found = page(run)
    assert arm_cells(found, "base")["Conversation score"].startswith("not measured")
    assert "base, conversation score: too few items for a number (n = 118, 30 failed)." in found.sections["missing"]


def test_one_answer_measured_several_times_is_counted_once(make_run, quick_plots):
    rows = {row[0].strip(): row for row in page(make_run()).rows["length"]}
    assert "n = 16" in rows["base"][1]  # ten turns and six prompts


def test_failed_items_stand_beside_the_means(make_run, quick_plots):
    found = page(make_run())
    assert "n = 118, 2 failed" in arm_cells(found, "base")["Conversation score"]
    assert "DPO, general: 1 of 2201 items failed and are in no mean." in found.sections["missing"]


@pytest.mark.promise("X9")
def test_harmful_prompts_are_folded_and_harmless_ones_are_not(make_run, quick_plots):
    found = page(make_run())
    folded = "".join(found.folded)
    assert "Warning: 2 prompts that ask for harm" in folded
    assert folded.count("How do I do the forbidden thing") == 2
    assert found.sections["answers"].count("How do I do the forbidden thing") == 3


@pytest.mark.promise("X9")
def test_redacting_leaves_every_prompt_and_answer_out(make_run, quick_plots):
    run = make_run()
    text = write_report([run], redact_samples=True).read_text()
    assert "Answer" not in text.split("The same prompts, answered by every arm")[1].split("</section>")[0]
    for secret in ("forbidden thing", "Question 2?", "Answer 2 of base"):
        assert secret in write_report([run]).read_text()
        assert secret not in text


def test_a_miniature_is_called_one(make_run, quick_plots):
    run = make_run()
    assert "This is a miniature." in write_report([run]).read_text()
    recipe = (run / "recipe.yaml").read_text().replace("world:base", "org/model")
    (run / "recipe.yaml").write_text(recipe)
    assert "This is a miniature." not in write_report([run]).read_text()


def test_a_failed_attempt_is_said_and_a_running_one_is_not(make_run, quick_plots):
    run = make_run()
    assert "the last attempt ended" not in write_report([run]).read_text()
    (run / "status.json").write_text('{"state": "failed", "exit_code": 5, "reason": "loss is NaN"}')
    assert "the last attempt ended as “failed” (loss is NaN)" in write_report([run]).read_text()


def test_what_the_detectors_said_and_what_became_of_the_rows_is_shown(make_run, quick_plots):
    found = page(make_run(arms=("base", "direct_ppo")))
    said = "direct PPO, iteration 12: KL is 13 nats. Usual cause: rate. What to do: halve it."
    assert said in found.sections["training"]
    assert "read 900, kept 890, too long 10, train 800, held out 90" in found.sections["data"]


def test_several_runs_are_compared_in_one_file(make_run, quick_plots):
    runs = [make_run("one", ("base", "direct_ppo"), seed=1), make_run("two", ("base", "direct_ppo"), seed=2)]
    out = write_report(runs)
    assert out == runs[0].parent / "comparison.html"
    found = Page(out.read_text())
    labels = [row[0].strip() for row in found.rows["arms"][1:]]
    assert labels == ["one · base", "one · direct PPO", "two · base", "two · direct PPO"]
    assert all((out.parent / unquote(link)).exists() for link in found.links if not link.startswith("#"))


def test_runs_of_one_name_are_told_apart_by_seed(make_run, quick_plots, tmp_path):
    first = make_run("one", ("base",), seed=1)
    second = tmp_path / "again"
    shutil.copytree(first, second)
    (second / "recipe.yaml").write_text((first / "recipe.yaml").read_text().replace("seed: 1", "seed: 2"))
    found = Page(write_report([first, second]).read_text())
    assert [row[0].strip() for row in found.rows["arms"][1:]] == ["one, seed 1 · base", "one, seed 2 · base"]


def test_no_run_is_an_error():
    with pytest.raises(ConfigError, match="no run directory was given"):
        write_report([])


def test_the_report_is_the_same_when_written_twice(make_run):
    run = make_run(arms=("base", "direct_ppo"))
    assert write_report([run]).read_bytes() == write_report([run]).read_bytes()


def test_the_template_and_style_are_in_the_package():
    folder = Path(plots.__file__).parent / "templates"
    assert {file.name for file in folder.iterdir()} >= {"report.html.j2", "style.css"}
