"""The first minutes with a card: stages of at most nine minutes each, the most telling first.

1 whole runs of a tiny model, each resumed in its middle; 2 kernels, determinism, full memory; 3 planned and measured
memory of 1.5B and 3B under 12, 16 and 24 GB; 4 decoding; 5 log-probs; 6 a step beside TRL's.

Needs no pip and no network (`make card-pack` makes what an offline machine lacks). Each part of a stage is a line in
OUT/stageN.jsonl, written when it ends; a second call continues with the parts that have not passed yet.

    python benchmarks/card.py [--stage 1] [--budget_s 540] [--out benchmarks/results] [--only TEXT] [--again]
    python benchmarks/card.py --stage 1 --device cpu       the tiny runs, without a card
    python benchmarks/card.py --docs                       write the tables into docs/, from what is in OUT

Exit codes: 0 all passed; 1 a part failed; 69 no card; 75 parts are left, the same command continues with them.
"""

import argparse
import json
import signal
import subprocess
import sys
from pathlib import Path

from card_parts import ON_CPU, ROOT, Line, Record, run_stage
from card_stages import STAGES, without_weights

FAILED, NO_CARD, LEFT = 1, 69, 75  # the last two are sysexits' "unavailable" and "try again"
WITHOUT_A_CARD = (1,)  # stages that --device cpu can run
PROBE = """
import json, torch
card = torch.cuda.get_device_name() if torch.cuda.is_available() else ""
print(json.dumps({"card": card, "torch": torch.__version__}))
"""


def main() -> None:
    arguments = parse_arguments()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # ends the part, too
    if arguments.docs:
        from card_tables import write_docs

        return write_docs(arguments.out)
    stages = [arguments.stage] if arguments.stage else list(STAGES)
    if arguments.device == "cpu" and not set(stages) <= set(WITHOUT_A_CARD):
        sys.exit("--device cpu runs stage 1 alone: the others measure a card.")
    machine = probe()
    if arguments.device == "cuda" and not machine["card"]:
        print(f"{named(stages)}: no card that torch {machine['torch']} can use; nothing was run.")
        sys.exit(NO_CARD)
    sys.exit(max((run(stage, arguments, machine) for stage in stages), key=(0, LEFT, FAILED).index))


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stage", type=int, choices=list(STAGES), help="one stage; default: all, one after another")
    parser.add_argument("--budget_s", type=float, default=540, help="seconds for each stage (default 540)")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results", help="folder of the records")
    parser.add_argument("--only", default="", metavar="TEXT", help="only the parts with this text in their name")
    parser.add_argument("--again", action="store_true", help="also run the parts that have passed")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--docs", action="store_true", help="write the tables into docs/ and run nothing")
    return parser.parse_args()


def probe() -> dict[str, str]:
    """Return the names of the card and of torch's version, asked in a process that then leaves the card alone."""
    asked = subprocess.run([sys.executable, "-c", PROBE], capture_output=True, text=True)
    return json.loads(asked.stdout) if asked.returncode == 0 else {"card": "", "torch": "(not installed)"}


def named(stages: list[int]) -> str:
    return ", ".join(f"stage {stage} ({STAGES[stage].title})" for stage in stages)


def run(number: int, arguments: argparse.Namespace, machine: dict[str, str]) -> int:
    """Run one stage; return its exit code."""
    on_cpu = arguments.device == "cpu"
    record = Record(arguments.out / f"stage{number}.jsonl", ON_CPU if on_cpu else machine["card"], machine["torch"])
    parts = [part for part in STAGES[number].parts if arguments.only in part.name]
    print(f"{named([number])} on {record.card}, into {record.file}", flush=True)
    with without_weights():
        lines = run_stage(
            parts, record, budget_s=arguments.budget_s, again=arguments.again,
            environment={"CUDA_VISIBLE_DEVICES": ""} if on_cpu else {},
        )  # fmt: skip
    return exit_code(lines)


def exit_code(lines: list[Line]) -> int:
    outcomes = {line.outcome for line in lines}
    return FAILED if "failed" in outcomes else LEFT if outcomes & {"left", "cut"} else 0


if __name__ == "__main__":
    main()
