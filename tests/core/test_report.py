import json
import re
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest
from toys import PROFILE, TOY, Toy

from nanochat_core import report
from nanochat_core.artifacts import store
from nanochat_core.report.collect import published_blocks, summary
from nanochat_core.report.curves import TICKS, draw, machine_panels, panels
from nanochat_core.report.effort import energy, when
from nanochat_core.report.headline import headline
from nanochat_core.report.pages import Text
from nanochat_core.report.published import CORE_TASKS, D20
from nanochat_core.runner.compare import differences, find_run
from nanochat_core.runner.table import load_table

TOYS = load_table([str(TOY / "table.py")])


def one(path: Path) -> report.Finished:
    return report.read_finished(path, TOYS[path.parent.name])


def collect(rows: dict[str, Path], **more: int) -> report.Report:
    return report.collect(rows, TOYS, **more)


@pytest.fixture
def drawn(toy: Toy) -> dict[str, Path]:
    made = toy.plan(until="sft_eval")
    toy.make(made)
    return {name: job.path for name, job in made.jobs.items()}


@pytest.fixture
def rows(drawn: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> dict[str, Path]:
    """The same for tests that look at no curves, which take a second to draw."""
    monkeypatch.setattr(sys.modules["nanochat_core.report.collect"], "curve_svg", lambda *_: "<svg></svg>")
    return drawn


def test_the_numbers_come_from_the_results_under_their_public_names(rows: dict[str, Path]) -> None:
    found = collect(rows).metrics
    assert found["base/val_bpb_start"] == 3.2
    assert found["base/val_bpb"] == 1.5
    assert found["sft/chatcore"] == 0.5
    assert found["sft/spelling"] == 0.75
    assert "rl/reward" not in found


def test_each_name_of_a_whole_run_is_there() -> None:
    results = {
        "pretrain": {"val_bpb_start": 3.2, "val_bpb": 1.6, "params": 9},
        "base_loss": {"train_bpb": 1.4, "val_bpb": 1.5},
        "base_eval": {"core": 0.2, "capitals": 0.4},
        "mid_eval": {"chatcore": 0.1, "spelling": 0.3},
        "sft_eval": {"chatcore": 0.3, "spelling": 0.9},
        "rl": {"reward_start": 0.7, "reward": 0.8, "reward_se_start": 0.03, "reward_se": 0.02},
        "rl_eval": {"chatcore": 0.4, "spelling": 0.9},
    }
    table = load_table()
    found = report.headline_metrics(
        {
            name: report.Finished(Path(), {}, {"metrics": metrics}, [], table[name])
            for name, metrics in results.items()
        }
    )
    wanted = {
        "base/val_bpb_start",
        "base/val_bpb",
        "base/core",
        "mid/chatcore",
        "sft/chatcore",
        "rl/reward_start",
    }
    wanted |= {"rl/reward_se_start", "rl/reward_se"}
    wanted |= {"rl/reward", "base/capitals", "mid/spelling", "sft/spelling", "rl/spelling"}
    assert wanted <= set(found)
    assert found["base/val_bpb"] == 1.5  # of the whole validation set, where it was measured


def test_every_task_stands_beside_each_model_with_its_gain() -> None:
    metrics: dict[str, float | int | str | None] = {"mid/chatcore": 0.1, "mid/spelling": 0.25}
    metrics |= {
        "sft/chatcore": 0.3,
        "sft/spelling": 0.75,
        "rl/chatcore": 0.4,
        "rl/spelling": 0.5,
        "rl/reward": 0.8,
        "rl/reward_se": 0.02,
        "rl/chatcore_5": 0.2,
    }
    (table,) = report.task_table(metrics)
    assert isinstance(table, report.ReportTable)
    assert list(table.head) == ["task", "MID", "SFT", "RL", "gain"]
    assert list(map(list, table.rows)) == [
        ["spelling", "0.2500", "0.7500", "0.5000", "+0.2500"],
        ["ChatCORE without SpellingBee", "", "", "0.2000", ""],
        ["ChatCORE", "0.1000", "0.3000", "0.4000", "+0.3000"],
    ]


def test_chatcore_over_other_tasks_than_before_is_no_gain(rows: dict[str, Path]) -> None:
    metrics: dict[str, float | int | str | None] = {"mid/chatcore": 0.1, "mid/mmlu": 0.3, "mid/gsm8k": 0.2}
    metrics |= {"sft/chatcore": 0.3, "sft/mmlu": 0.4, "sft/gsm8k": 0.3, "sft/gsm8k_pass_at_4": 0.5}
    metrics |= {"rl/chatcore": 0.4, "rl/gsm8k": 0.5, "rl/reward": 0.8}
    (table,) = report.task_table(metrics)
    assert isinstance(table, report.ReportTable)
    gains = {line[0]: line[-1] for line in table.rows}
    assert gains["gsm8k"] == "+0.3000" and gains["mmlu"] == "+0.1000" and gains["ChatCORE"] == ""
    blocks = summary({name: one(path) for name, path in rows.items()}, metrics)
    (table,) = [block for block in blocks if isinstance(block, report.ReportTable)]
    assert list(map(list, table.rows))[-3:] == [
        ["mid", "ChatCORE", "", "0.1000", ""],
        ["sft", "ChatCORE", "0.1000", "0.3000", "+0.2000"],
        ["rl", "ChatCORE", "", "0.4000", ""],
    ]
    assert any("over other tasks" in block.text for block in blocks if isinstance(block, Text))


def test_only_the_mean_over_the_published_tasks_is_called_core() -> None:
    published = {task: 0.2 for task in CORE_TASKS}
    assert len(published) == 22 and headline({"core": 0.2, **published}) == "CORE 0.200"
    assert headline({"core": 0.2, "factbook_units": 0.2}) == "CORE (own tasks) 0.200"
    metrics: dict[str, float | int | str | None] = {"base/core": 0.2, "base/factbook_units": 0.2}
    (table,) = report.task_table(metrics)
    assert isinstance(table, report.ReportTable) and table.rows[0][0] == "CORE (own tasks)"
    (table,) = report.task_table(metrics | {f"base/{task}": 0.2 for task in CORE_TASKS})
    assert isinstance(table, report.ReportTable) and table.rows[0][0] == "CORE"


def test_the_report_says_when_and_how_fast_it_ran(rows: dict[str, Path]) -> None:
    for name, path in rows.items():
        result = json.loads((path / "result.json").read_text()) | {"finished": "2026-11-24T09:05:00Z"}
        (path / "result.json").write_text(json.dumps(result))
        events = [{"event": "started", "time": 1795305600.0 + (name == "sft")}]  # 22 November, midnight
        (path / "attempts.jsonl").write_text("\n".join(map(json.dumps, events)))
    steps = [{"step": i, "loss": 1.0, "tflops": rate} for i, rate in enumerate((1.0, 41.27, 41.3))]
    (rows["pretrain"] / "metrics.jsonl").write_text("\n".join(map(json.dumps, steps)))
    text = report.to_markdown(collect(rows))
    assert text.count("2026-11-22 00:00 to 2026-11-24 09:05 UTC") == 2
    assert re.search(r"\| stage \| time \| attempts \| energy \| TFLOP/s \|", text)
    assert re.search(r"\| pretrain \| .* \| 41.3 \|", text)
    assert when({"sft": one(rows["sft"])}).endswith("2026-11-24 09:05 UTC")
    (rows["sft"] / "attempts.jsonl").write_text("")
    assert when({"sft": one(rows["sft"])}) == "2026-11-24 09:05 to 09:05 UTC"
    assert re.search(r"\| versions \| .*prefect 3\.", text)


def test_energy_of_several_machines_is_said_to_be_of_one(rows: dict[str, Path]) -> None:
    assert "the first machine's alone" not in report.to_markdown(collect(rows))
    job = json.loads((rows["pretrain"] / "job.json").read_text())
    job["runtime"]["nnodes"] = 2
    (rows["pretrain"] / "job.json").write_text(json.dumps(job))
    assert "the first machine's alone: what 2 machines did" in report.to_markdown(collect(rows))


def test_a_short_stages_curves_name_what_they_go_over(rows: dict[str, Path]) -> None:
    readings = [{"time": 1000.0 + i, "memory_gb": 1.0 + i} for i in range(3)]
    for seconds, over in ((1, "seconds"), (600, "minutes"), (36000, "hours")):
        stretched = [reading | {"time": reading["time"] * seconds} for reading in readings]
        assert [panel.over for panel in machine_panels(stretched)] == [over]
    (loss,) = panels([{"step": 1, "loss": 5.0}, {"step": 12, "loss": 4.0}])
    assert (loss.title, loss.over) == ("loss", "step")
    (axes,) = draw([loss]).axes
    ticks = axes.get_xticks()
    assert (
        axes.get_xlabel() == "step" and len(ticks) <= TICKS + 1 and all(tick == int(tick) for tick in ticks)
    )


def test_a_stage_that_stopped_early_says_so(rows: dict[str, Path]) -> None:
    path = rows["sft"] / "result.json"
    result = json.loads(path.read_text())
    result["metrics"]["stopped"] = "stopped at step 3 because the reward fell; kept step 2"
    path.write_text(json.dumps(result))
    (_, blocks), *_ = collect(rows).sections
    said = "sft stopped at step 3 because the reward fell; kept step 2."
    assert said in [block.text for block in blocks if isinstance(block, Text)]


def test_a_reward_stands_beside_its_noise(rows: dict[str, Path]) -> None:
    path = rows["sft"] / "result.json"
    result = json.loads(path.read_text())
    result["metrics"] |= {"reward_start": 0.5, "reward": 0.75, "reward_se_start": 0.04, "reward_se": 0.03}
    path.write_text(json.dumps(result))
    (_, blocks), *_ = collect(rows).sections
    (table,) = [block for block in blocks if isinstance(block, report.ReportTable)]
    assert ["sft", "reward", "0.5000 ± 0.0400", "0.7500 ± 0.0300", "+0.2500"] in list(map(list, table.rows))
    assert not any("reward_se" in cell for row in table.rows for cell in row)
    assert any("± is the standard error" in block.text for block in blocks if isinstance(block, Text))


def test_the_page_needs_no_other_file_and_is_well_formed(drawn: dict[str, Path], tmp_path: Path) -> None:
    made = collect(drawn)
    report.write_report(made, tmp_path)
    page = (tmp_path / "report.html").read_text()
    assert not re.search(r"(src|href)=\"(?!#|data:)", page) and page.count("<svg") == 3

    class Balanced(HTMLParser):
        open: list[str] = []  # noqa: RUF012

        def handle_starttag(self, tag: str, attrs: object) -> None:
            if tag not in {"meta", "br", "img"}:
                self.open.append(tag)

        def handle_startendtag(self, tag: str, attrs: object) -> None:
            pass

        def handle_endtag(self, tag: str) -> None:
            assert self.open.pop() == tag

    parser = Balanced()
    parser.feed(page)
    assert parser.open == []
    text = (tmp_path / "report.md").read_text()
    for name in re.findall(r"!\[[^]]*\]\(([^)]+)\)", text):
        assert (tmp_path / name).is_file()


def test_what_a_stage_wrote_cannot_become_markup(rows: dict[str, Path]) -> None:
    (rows["sft"] / "samples.md").write_text("# one\n<script>alert(1)</script>\n# two\n# three\n")
    page = report.to_html(collect(rows, samples=2))
    assert "<script>" not in page and "&lt;script&gt;" in page
    assert "# two" in page and "# three" not in page


def test_interruptions_are_told(rows: dict[str, Path]) -> None:
    attempts = [
        {"event": "started", "time": 1.0, "previous_end": 0.0},
        {"event": "started", "time": 50.0, "previous_end": 20.0},
        {"event": "stopped", "time": 60.0, "why": "interrupted"},
        {"event": "started", "time": 90.0, "previous_end": 60.0},
        {"event": "finished", "time": 95.0},
    ]
    (rows["pretrain"] / "attempts.jsonl").write_text("\n".join(map(json.dumps, attempts)))
    text = report.to_markdown(collect(rows))
    assert "2 interruptions; nothing was done for 1:00 min:" in text
    assert "| pretrain | 1970-01-01 00:00 | 30 s | its process was ended from outside" in text
    assert "| pretrain | 1970-01-01 00:01 | 30 s | stopped (interrupted)" in text
    assert re.search(r"\| pretrain \| [^|]+ \| 3 \|", text)


def test_an_unfinished_stage_is_refused(rows: dict[str, Path]) -> None:
    (rows["mid"] / "result.json").unlink()
    with pytest.raises(ValueError, match="is not finished"):
        collect(rows)


def test_a_resumed_curve_counts_each_step_once(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    rows = [
        {"step": 1, "loss": 5.0},
        {"step": 2, "loss": 4.0},
        {"step": 1, "loss": 4.5},
        {"step": 2, "val_bpb": 2.0},
    ]
    path.write_text("\n".join(map(json.dumps, rows)) + '\n{"step": 3, "lo')
    assert report.read_rows(path) == [{"step": 1, "loss": 4.5}, {"step": 2, "loss": 4.0, "val_bpb": 2.0}]
    assert report.read_rows(tmp_path / "none") == []


def test_a_curve_needs_two_points_that_are_numbers() -> None:
    assert report.curve_svg([{"step": 1, "loss": 5.0}]) == ""
    assert report.curve_svg([{"step": 1, "loss": 5.0}, {"step": 2, "loss": float("nan")}]) == ""
    assert report.curve_svg([{"step": 1, "loss": 5.0}, {"step": 2, "loss": 4.0}]).startswith("<svg")


def test_the_report_stage_writes_all_of_it(toy: Toy, rows: dict[str, Path], tmp_path: Path) -> None:
    from nanochat_core.artifacts.stage import Job, Runtime
    from nanochat_core.stages import report as stage

    job = Job("report", stage.Config(), rows, tmp_path / "out", Runtime(), "x", TOYS)
    job.path.mkdir()
    metrics = stage.run(job.config, job)
    assert metrics["base/val_bpb"] == 1.5
    assert {str(path) for path in store.artefact_files(job.path)} >= {
        "report.md",
        "report.html",
        "curves/sft.svg",
    }


def test_every_number_of_a_table_is_one_of_a_result(rows: dict[str, Path]) -> None:
    made = collect(rows)
    results = {name: store.read_result(path) for name, path in rows.items()}
    known = {
        report.number(value)
        for result in results.values()
        if result is not None
        for value in result["metrics"].values()
        if isinstance(value, float)
    }
    known |= {report.number(value) for value in made.metrics.values() if isinstance(value, float)}
    differences = {
        report.signed(a - b)
        for result in results.values()
        if result is not None
        for a in result["metrics"].values()
        for b in result["metrics"].values()
        if isinstance(a, int | float) and isinstance(b, int | float)
    }
    shown = re.findall(r"(?<![\w.])[+-]?\d+\.\d{4}(?!\d)", report.to_markdown(made))
    assert len(shown) > 8
    for number in shown:
        assert number in (differences if number[0] in "+-" else known) or number in ORIENTATION, number


ORIENTATION = {report.number(run.numbers["base/core"]) for run in D20}  # of others, and named as theirs


def test_energy_is_what_the_meter_said_or_an_assumption_that_is_named(drawn: dict[str, Path]) -> None:
    text = report.to_markdown(collect(drawn))
    assert "Energy is assumed: this machine lets no meter be read" in text
    result = json.loads((drawn["pretrain"] / "result.json").read_text()) | {"seconds": 7200.0}
    (drawn["pretrain"] / "result.json").write_text(json.dumps(result))
    readings = [{"time": 1000.0 + 30 * i, "watts": 60.0, "meter": "GPU", "celsius": 61.0} for i in range(241)]
    lines = "\n".join(map(json.dumps, readings)) + '\n{"time": 99, "wat'
    (drawn["pretrain"] / "machine.jsonl").write_text(lines)
    job = json.loads((drawn["pretrain"] / "job.json").read_text())
    job["runtime"] |= {"price_per_kwh": 0.3, "price_per_hour": 2.0}
    (drawn["pretrain"] / "job.json").write_text(json.dumps(job))
    made = collect(drawn)
    text = report.to_markdown(made)
    assert re.search(
        r"\| pretrain \| 2:00 h \| 1 \| 120.0 Wh \| 4.04 \|", text
    )  # 60 W for 2 h; 2 x 2 + .12 x .3
    assert "what the GPU reported to draw" in text and "assumed where nothing could be read" in text
    assert made.metrics["run/cost"] == pytest.approx(4.036)
    curve = next(
        b for _, bs in made.sections for b in bs if isinstance(b, report.Curve) and b.name == "pretrain"
    )
    assert curve.svg.count('id="axes_') == 5  # loss, rate, tokens/s; and the machine's heat and power


def test_a_gap_between_two_attempts_draws_no_power(rows: dict[str, Path]) -> None:
    result = json.loads((rows["pretrain"] / "result.json").read_text()) | {"seconds": 120.0}
    (rows["pretrain"] / "result.json").write_text(json.dumps(result))
    times = [0.0, 30.0, 60.0, 86_400.0, 86_430.0]  # a day without power in between
    readings = [{"time": 1000 + t, "watts": 100.0, "meter": "GPU"} for t in times]
    (rows["pretrain"] / "machine.jsonl").write_text("\n".join(map(json.dumps, readings)))
    used = energy(one(rows["pretrain"]))
    assert used.kwh * 3.6e6 == pytest.approx(100 * 150, rel=0.01)  # two minutes and a half, never a day


def test_a_run_on_the_published_tasks_stands_beside_the_published_ones(rows: dict[str, Path]) -> None:
    finished = {name: one(path) for name, path in rows.items()}
    hub = finished["shards"]._replace(job={"config": {"source": "hub"}})
    metrics: dict[str, float | int | str | None] = {"base/core": 0.21, "sft/mmlu": 0.3, "base/own": 1.0}
    metrics |= {f"base/{task}": 0.2 for task in CORE_TASKS}
    table, note = published_blocks({"assets": hub}, metrics)
    assert isinstance(table, report.ReportTable) and isinstance(note, Text)
    assert list(map(list, table.rows)) == [
        ["BASE CORE", "0.2100", "0.2219", "0.2096", "0.2565"],
        ["SFT mmlu", "0.3000", "0.3151", "0.3267", ""],
    ]
    (said,) = published_blocks(finished, metrics)
    assert isinstance(said, Text) and "beside nobody else's" in said.text


def test_two_runs_stand_side_by_side(toy: Toy) -> None:
    toy.make(toy.plan())
    before = find_run(toy.base_dir, str(PROFILE))
    report_dir = toy.plan().jobs["report"].path
    toy.make(toy.plan("sft.steps=9"))
    after = find_run(toy.base_dir, str(PROFILE))
    assert differences(before.recipe, after.recipe) == {"sft.steps": (5, 9)}
    assert before.metrics == after.metrics and before.metrics["sft/chatcore"] == 0.5
    again = find_run(toy.base_dir, str(report_dir))  # an older run, by its report
    assert again.recipe == before.recipe and set(again.seconds) == set(before.seconds)
    with pytest.raises(ValueError, match="no finished run of nope"):
        find_run(toy.base_dir, "nope")
    with pytest.raises(ValueError, match="is no report"):
        find_run(toy.base_dir, str(toy.plan().jobs["sft"].path))


def test_answers_are_quoted_the_first_right_and_the_first_wrong_of_a_task(rows: dict[str, Path]) -> None:
    answers = [
        {"problem": 0, "correct": [True], "said": ["first"]},
        {"problem": 1, "correct": [True], "said": ["another right one"]},
        {"problem": 2, "correct": [False], "said": ["<b>third</b>"]},
    ]
    (rows["sft_eval"] / "answers").mkdir()
    (rows["sft_eval"] / "answers" / "spelling.jsonl").write_text("\n".join(map(json.dumps, answers)))
    page = report.to_html(collect(rows))
    assert (
        "spelling, right: first\nspelling, wrong: &lt;b&gt;third&lt;/b&gt;" in page
        and "another right" not in page
    )
