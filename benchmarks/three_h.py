"""Helpful, honest, harmless over several seeds: is the balance better by mixing the data or by merging the models?

Each seed is a whole run of `world-3h` with nothing changed but `seed`; runs that are already there (`--root`) go on or
are taken as they are. Goals are the papers' claims about the means on the test questions, and whatever comes out is
recorded: a claim holds where the 95 % interval over the seeds (Student's t, paired by seed) lies above 0.
"""

import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

from common import arguments, finish, run_recipe
from direct_rlhf.report import three_h
from direct_rlhf.report.read import read_run
from direct_rlhf.report.words import show_estimate

GOALS = {
    "merge": "the merge chosen on validation questions beats the mixture chosen there (mean of the H's)",
    "r_tsvm": "R-TSVM beats the best other merge by 1 to 3 %",
}
NOTE = """\
{seeds} seeds; means over them with the 95 % interval of Student's t, wide for so few. Scores are 1 to 10. In words:

{claims}"""


def studied(root: Path, seeds: list[int], overrides: list[str]) -> three_h.Study:
    runs = []
    for seed in seeds:
        path = root / f"world-3h-{seed}"
        if not (path / three_h.FILE).exists():
            run_recipe("world-3h", path.name, root, f"seed={seed}", *overrides, "--resume")
        runs.append(read_run(path))
    study = three_h.read_study(runs)
    if study is None:
        raise SystemExit(f"{root}: not every run ended with a {three_h.FILE}")
    return study


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--root", type=Path, help="where the runs are or are made; default: a temporary folder")
    parser.add_argument("overrides", nargs="*", help="a.b=c, for studies; never for the recorded figures")
    options = parser.parse_args()
    seeds = options.seeds[:1] if options.quick else options.seeds
    with tempfile.TemporaryDirectory() as folder:
        study = studied(options.root or Path(folder), seeds, options.overrides)
    measured: dict[str, Any] = {}
    metrics = (*study.kinds, three_h.MEAN, three_h.WORST, three_h.GENERAL)
    table = [["paradigm", "route", "model", *metrics]]
    words, held = [], True
    for paradigm in study.paradigms:
        for claim in three_h.claims(study, paradigm):
            words.append(f"- {three_h.PARADIGMS[paradigm]}: {claim.question} *{claim.judgement}*. {claim.sentence}")
            held = held and claim.tone == "good"
        for name in study.models(paradigm, "base", "expert", "mixture", "merge", "ablation"):
            values = {metric: study.value(name, metric) for metric in metrics}
            measured[name] = {metric: asdict(value) if value else None for metric, value in values.items()}
            shown = [show_estimate(values[metric], metric == three_h.GENERAL) for metric in metrics]
            table.append([paradigm, str(study.of(name)[0]["route"]), three_h.label(study, name), *shown])
    note = NOTE.format(seeds=len(seeds), claims="\n".join(words))
    finish("three_h", measured, GOALS, held=held, options=options, table=table, note=note)


if __name__ == "__main__":
    main()
