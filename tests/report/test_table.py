"""The table at the end of a run."""

import io

from rich.console import Console

from direct_rlhf.report.table import print_results


def printed(run, width=80):
    out = io.StringIO()
    print_results(run, Console(file=out, width=width, color_system=None))
    return out.getvalue()


def test_it_holds_arms_intervals_words_and_paths(make_run):
    run = make_run(arms=("base", "sft", "direct_ppo"))
    (run / "report.html").write_text("")
    text = printed(run)
    assert "direct PPO" in text
    assert "[5.91, 6.71]" in text
    assert "Conversation better? better. Conversation score +3.50 [+3.00, +4.00]" in text
    assert "General skill kept? no difference shown." in text
    assert f"Report: {run / 'report.html'}" in text
    assert "Results:" not in text  # results.json was not written
    assert "miniature" in text


def test_it_fits_80_columns_with_five_arms(make_run):
    lines = printed(make_run()).splitlines()
    assert max(map(len, lines)) <= 80
    assert "…" not in "".join(lines)


def test_missing_is_said(make_run):
    run = make_run(arms=("base", "sft"))
    (run / "evaluation" / "sft" / "toxicity.json").unlink()
    (run / "evaluation" / "comparisons.json").unlink()
    text = printed(run, width=120)
    assert text.count("not measured") == 4 + 3  # four rates, three claims
