"""What one program costs in the sandbox: interpreters that wait ahead, beside a fresh start for each.

Both run the same short program behind the same walls, in turns, and the answer is waited for. `waiting`: the
pool had time to fill up, as while a model writes; `burst`: programs one after another, with none.

    uv run python benchmarks/sandbox.py [--json]
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable

from nanochat_core.infer.sandbox import AHEAD, available, run_once, run_program

PROGRAM = """\
from typing import List
def largest(numbers: List[int]) -> int:
    return max(numbers)
assert largest([3, 9, 2]) == 9
"""


def milliseconds(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return 1000 * (time.perf_counter() - start)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--programs", type=int, default=40)
    parser.add_argument("--json", action="store_true", help="end with one line of JSON")
    options = parser.parse_args()
    isolation = available()

    def waiting() -> None:
        assert run_program(PROGRAM, allow_weaker=True).error is None

    def fresh() -> None:
        assert run_once(PROGRAM, 5, 512, isolation).error is None

    waiting()
    spent: dict[str, list[float]] = {"waiting": [], "fresh": [], "burst": []}
    for _ in range(options.programs):
        time.sleep(0.3)
        spent["waiting"].append(milliseconds(waiting))
        time.sleep(0.3)
        spent["fresh"].append(milliseconds(fresh))
    for _ in range(options.programs):
        spent["burst"].append(milliseconds(waiting))
    medians = {name: statistics.median(times) for name, times in spent.items()}
    print(f"{isolation}, {AHEAD} interpreters ahead, {options.programs} programs each")
    print(f"{'':10}{'median ms':>11}{'worst ms':>10}{'fresh / it':>12}")
    for name, times in spent.items():
        print(f"{name:10}{medians[name]:11.1f}{max(times):10.1f}{medians['fresh'] / medians[name]:12.1f}")
    if options.json:
        ratio = medians["fresh"] / medians["waiting"]
        print(json.dumps({f"{name}_ms": medians[name] for name in medians} | {"ratio": ratio}))


if __name__ == "__main__":
    main()
