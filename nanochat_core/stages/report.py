"""The report over everything a profile ran: report.md, report.html, and the numbers both show."""

from nanochat_core.artifacts.stage import Job, Metrics, Recipe


class Config(Recipe):
    samples: int = 3  # answers quoted from each stage that left some


def run(cfg: Config, job: Job[Config]) -> Metrics:
    """Read the results of the rows before it and write them up."""
    from nanochat_core.report import collect, write_report

    report = collect(job.inputs, job.rows, samples=cfg.samples)
    write_report(report, job.path)
    return report.metrics
