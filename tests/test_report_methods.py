"""pytest tests/test_report_methods.py: the report on a sweep over methods, of made-up runs."""

import json
import re
import shutil
from pathlib import Path

import pytest
from matplotlib.figure import Figure
from omegaconf import OmegaConf

import utils
from reporting import figures, methods, report
from reporting.runs import Section, by_method, read, sections
from settings.compose import compose, record

# By method the exact match for seeds 0, 1 and 2, the losses of two clients on records of
# their own, the aggregation error of two rounds, and MB each way.
MADE = {
    "fedavg": ([0.90, 0.92, 0.91], [0.30, 0.20], [0.5, 0.7], 8.0),
    "fedavg_random": ([0.60, 0.70, 0.65], [0.60, 0.10], [None, 0.4], 8.0),
    "fedavg_int8": ([0.89, 0.93, 0.90], [0.30, 0.30], [0.0, 0.0], 2.0),
}
PARTITIONERS = ("natural", "dirichlet")
QUESTIONS = 100


def write_run(job: Path, partitioner: str, method: str, seed: int) -> None:
    exact, own, errors, megabytes = MADE[method]
    overrides = [f"partitioner={partitioner}", f"method={method}", f"seed={seed}"]
    cfg = compose(" ".join(["experiment=methods", *overrides]))
    record(cfg, overrides, job)
    costs = {"bytes_down": 1e6 * megabytes, "bytes_up": 1e6 * megabytes}
    costs |= {"peak_memory_client": 1, "peak_memory_server": 1, "failures": 0}
    entry = {"train_loss": 1.0, "sampled": 2, **costs, "failures": [], "clients": []}
    rounds = [{**entry, "round": n} for n in (1, 2)]
    for one, error in zip(rounds, errors, strict=True):
        one["aggregation_error"] = error
    rounds[-1]["eval_loss"] = sum(own) / 2
    rounds[-1]["eval_clients"] = [
        {"partition": i, "num-examples": 20, "eval_loss": loss + seed / 100}
        for i, loss in enumerate(own)
    ]
    utils.write_json(job / "history.json", {"rounds": rounds})
    losses = {"train_loss_first": 2.0, "train_loss_last": 1.0}
    score = exact[seed]
    summary = {"rounds": 2, "seconds": 40.0 + seed, **losses, **costs}
    summary |= {"exact_match_before": 0.0, "exact_match_after": score}
    utils.write_json(job / "summary.json", summary)
    right = round(score * QUESTIONS)
    told = [1.0] * right + [0.0] * (QUESTIONS - right)
    questions = {"base": {}, "tuned": {"exact_match": told}}
    utils.write_json(job / "test_scores.json", questions)


@pytest.fixture(scope="module")
def sweep(tmp_path_factory) -> Path:
    """A sweep of 18 runs, as Hydra numbers them."""
    folder = tmp_path_factory.mktemp("sweep")
    jobs = [(p, m, s) for p in PARTITIONERS for m in MADE for s in range(3)]
    for number, job in enumerate(jobs):
        write_run(folder / str(number), *job)
    params = {"partitioner": "natural,dirichlet", "method": ",".join(MADE)}
    config = {"sweeper": {"params": params | {"seed": "0,1,2"}}}
    config["overrides"] = {"task": []}
    OmegaConf.save({"hydra": config}, folder / "multirun.yaml")
    report.write(folder)
    return folder


@pytest.fixture
def mine(sweep, tmp_path) -> Path:
    """A copy of the sweep that a test may change."""
    return shutil.copytree(sweep, tmp_path / "sweep")


def of(folder: Path) -> dict[str, Section]:
    return {part.title: part for part in sections(read(folder)[0])}


def cells(folder: Path, method: str) -> list[str]:
    """The row of a method in the table of natural partitions."""
    lines = methods.method_table(of(folder)["natural partitions"]).splitlines()
    [line] = [line for line in lines if line.startswith(f"| {method} |")]
    plain = line.replace("\u00a0", " ").replace("\\", "")
    return [cell.strip() for cell in plain.split("|")[1:-1]]


@pytest.mark.slow
def test_a_row_for_each_method_and_a_section_for_each_kind_of_partition(sweep):
    parts = of(sweep)
    assert [*parts] == ["natural partitions", "dirichlet partitions"]
    for part in parts.values():
        assert methods.rows(part) == [*MADE]


def test_the_table_holds_means_over_seeds_and_sums_over_rounds(sweep):
    # Student's t(0.975, 2) is 4.303: 4.303 * 0.01 / sqrt(3) is 2.5 points.
    assert cells(sweep, "fedavg") == [
        "fedavg",
        "91.0 [88.5, 93.5]",
        "-",
        "0.250",
        "-",
        "0.6",
        "8.0",
        "8.0",
        "41.0",
    ]
    # Differences: -30, -22 and -26 points. One of two clients has a lower loss, thrice; the
    # aggregation error is not known of one round.
    assert cells(sweep, "fedavg_random")[1:6] == [
        "65.0 [52.6, 77.4]",
        "-26.0 [-35.9, -16.1]",
        "0.350",
        "3 of 6",
        "0.4",
    ]
    assert cells(sweep, "fedavg_int8")[4:] == ["0 of 6", "0", "2.0", "2.0", "41.0"]


def test_what_is_not_known_is_a_dash(mine):
    for file in mine.glob("*/history.json"):
        history = json.loads(file.read_text())
        for entry in history["rounds"]:
            for name in ("aggregation_error", "eval_clients", "eval_loss"):
                entry.pop(name, None)
        utils.write_json(file, history)
    report.write(mine)
    assert cells(mine, "fedavg_random")[3:6] == ["-", "-", "-"]


def test_the_answer_names_the_best_its_equals_and_the_cheapest(sweep):
    assert methods.answer(of(sweep)["natural partitions"]) == (
        "fedavg has the best exact match: 91.0 [88.5, 93.5] %. Not told apart from it: "
        "fedavg_int8. Of these, fedavg_int8 sends least: 4.0 MB a run."
    )


def test_the_answer_tells_how_far_behind_the_least_bytes_are(mine):
    for file in mine.glob("*/summary.json"):
        if "random" in (file.parent / ".hydra/overrides.yaml").read_text():
            told = json.loads(file.read_text()) | {"bytes_up": 1e5, "bytes_down": 1e5}
            utils.write_json(file, told)
    text = methods.answer(of(mine)["natural partitions"])
    assert text.endswith(
        " fedavg_random sends 0.2 MB, and is 26.0 points behind the best."
    )


def test_both_forms_tell_the_same_and_the_page_holds_its_figure(sweep):
    text = (sweep / "report/report.md").read_text()
    page = (sweep / "report/report.html").read_text()
    assert "<title>Which method, and at what cost?</title>" in page
    assert page.count("<img") == text.count("](costs.png)") == 1
    assert 'src="data:image/png;base64,' in page
    for title in ("## Natural partitions", "## Dirichlet partitions"):
        assert title in text
        assert f"<h2>{title[3:]}</h2>" in page
    assert "python main.py partitioner=natural method=fedavg_int8 seed=2" in text


def test_the_figure_has_a_point_for_each_method_at_its_bytes(sweep, monkeypatch):
    kept = []
    monkeypatch.setattr(
        Figure, "savefig", lambda figure, *_, **more: kept.append(figure)
    )
    methods.draw_costs([*of(sweep).values()], "exact_match", sweep / "x.png")
    [figure] = kept
    assert len(figure.axes) == 2
    for axes in figure.axes:
        handles, labels = axes.get_legend_handles_labels()
        points = {
            label: handle.lines[0].get_xydata()[0]
            for handle, label in zip(handles, labels, strict=True)
        }
        assert {k: tuple(v.round(3)) for k, v in points.items()} == {
            "fedavg": (16.0, 91.0),
            "fedavg_random": (16.0, 65.0),
            "fedavg_int8": (4.0, pytest.approx(90.667, abs=1e-3)),
        }


def test_a_logarithmic_axis_tells_plain_numbers(tmp_path):
    with figures.figure(tmp_path / "log.png") as (axes,):
        axes.plot([15, 106], [1, 2])
        axes.set_xscale("log")
    told = {tick.get_text() for tick in axes.get_xticklabels(which="both")}
    assert {"20", "50", "100"} < told
    assert not any("$" in text for text in told)


def test_a_run_that_is_missing_is_named(mine):
    shutil.rmtree(mine / "17")
    (mine / "0/summary.json").unlink()
    text = (report.write(mine) / "report.md").read_text()
    assert "2 runs are missing" in text
    assert "partitioner=dirichlet method=fedavg_int8 seed=2 was never started" in (
        text.replace("\\", "")
    )


@pytest.mark.parametrize(
    ("key", "values", "compared"),
    [
        ("mode", ["local", "federated"], False),
        ("partitioner", ["iid", "natural"], False),
        ("strategy", ["fedavg", "fedprox"], True),
        ("sharing", ["ffa", "fedsa"], True),
    ],
)
def test_methods_are_whatever_varies_but_modes_partitions_and_seeds(
    key, values, compared, mine
):
    for number, job in enumerate(sorted(mine.glob("[0-9]*"))):
        words = [f"{key}={values[number % 2]}", f"seed={number // 2}"]
        OmegaConf.save(words, job / ".hydra/overrides.yaml")
    runs = read(mine)[0]
    assert by_method(runs) == compared
    if compared:
        [part] = sections(runs)
        assert methods.rows(part) == [f"{key}={value}" for value in values]


def test_the_sweep_of_the_experiment_is_of_files_of_conf():
    text = (utils.PROJECT / "conf/experiment/methods.yaml").read_text()
    [names] = re.findall(r"^      method: (\S+)$", text, re.M)
    assert len(names.split(",")) == len({*names.split(",")})
    for name in names.split(","):
        assert (utils.PROJECT / f"conf/method/{name}.yaml").is_file()
