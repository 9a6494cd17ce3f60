"""Tables of the records that card.py wrote, between the markers of docs/memory.md and docs/performance.md."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from card_parts import ON_CPU, ROOT, Line, read_lines
from card_stages import STAGES
from fit import as_table, write_between

GIB = 2**30
PLACES = {"docs/memory.md": (3,), "docs/performance.md": (1, 2, 4, 5, 6)}  # the marker is "card"


def write_docs(out: Path, root: Path = ROOT) -> None:
    """Write every table for which there are records; a document without any stays as it is."""
    for document, stages in PLACES.items():
        found = [text for stage in stages if (text := section(stage, out))]
        if found:
            write_between(root / document, "card", "\n\n".join(found))
        print(f"{document}: {len(found)} tables" if found else f"{document}: no records in {out}, nothing was changed")


def section(stage: int, out: Path) -> str:
    """Return the tables of a stage, one for each card; "" without records of a card."""
    cards: dict[str, dict[str, Line]] = {}
    for line in read_lines(out / f"stage{stage}.jsonl"):
        if line.card != ON_CPU:
            cards.setdefault(line.card, {})[line.part] = line
    return "\n\n".join(f"{heading(stage, card, lines)}\n\n{table(stage, lines)}" for card, lines in cards.items())


def heading(stage: int, card: str, lines: dict[str, Line]) -> str:
    days = sorted({line.date for line in lines.values()})
    torches = ", ".join(sorted({line.torch for line in lines.values()}))
    when = days[0] if len(days) == 1 else f"{days[0]} to {days[-1]}"
    what = f"{STAGES[stage].title} (`benchmarks/card.py --stage {stage}`)"
    return f"**Measured on {card}**, {when}, torch {torches}: {what}."


def table(stage: int, lines: dict[str, Line]) -> str:
    """Return the table of a stage: its parts in order, those that gave no figures with the reason."""
    ordered = [lines[part.name] for part in STAGES[stage].parts if part.name in lines]
    with_figures = [line for line in ordered if line.figures]
    without = [f"{line.part}: {line.outcome}{because(line)}" for line in ordered if line.outcome != "passed"]
    body = TABLES[stage](with_figures if stage != 2 else ordered) if with_figures or stage == 2 else ""
    return "\n\n".join(filter(None, (body, "; ".join(without))))


def because(line: Line) -> str:
    last = next((text.strip() for text in reversed(line.why.splitlines()) if text.strip()), "")
    return f" ({last[:160]})" if last else ""


def rows(head: tuple[str, ...], cells: list[tuple[Any, ...]]) -> str:
    lines = [head, ("---",) * len(head), *cells]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def whole_runs(lines: list[Line]) -> str:
    def cells(line: Line) -> tuple[Any, ...]:
        run = line.figures
        first, resumed = run["seconds"]
        resumes = "yes" if run["resumed_bit_for_bit"] else f"no: {', '.join(run['metrics'] + run['files'])}"
        return line.part, run["steps"], f"{run['gpu_gib']:.2f}", f"{run['ram_gib']:.2f}", first, resumed, resumes

    head = ("run", "steps", "GPU GiB", "RAM GiB", "s", "s, resumed", "resumed bit for bit")
    return rows(head, [cells(line) for line in lines])


def checks(lines: list[Line]) -> str:
    return rows(("check", "outcome", "figures"), [(line.part, line.outcome, said(line.figures)) for line in lines])


def said(figures: dict[str, Any]) -> str:
    return "; ".join(f"{name}: {value}" for name, value in figures.items()).replace("|", "/")


def fits(lines: list[Line]) -> str:
    return as_table([line.figures for line in lines])


def decodes(lines: list[Line]) -> str:
    def cells(line: Line) -> tuple[Any, ...]:
        run = line.figures
        floor = run["floor_tokens_per_second"]
        ways = [run["tokens_per_second"].get(way) for way in ("kernels", "graphs")]
        shares = [f"{rate:.0f} ({rate / floor:.0%})" if rate else "" for rate in ways]
        return run["model"], run["rows"], *shares, f"{floor:.0f}", f"{run['copy_gb_per_second']:.0f}"

    head = ("model", "rows", "single kernels, tokens/s", "CUDA graphs, tokens/s", "the weights' floor", "copy, GB/s")
    return rows(head, [cells(line) for line in lines])


def logprobs(lines: list[Line]) -> str:
    cells = []
    for row in (row for line in lines for row in line.figures["rows"]):
        if row["note"]:
            cells.append((row["tokens"], row["name"], row["note"], "", "", ""))
            continue
        times = [number(row[f"{way}_seconds"], ".4f") for way in ("forward", "backward")]
        cells.append(
            (row["tokens"], row["name"], number(row["peak_megabytes"], ".0f"), *times, number(row["error"], ".1e"))
        )
    return rows(("tokens", "", "peak MB", "forward s", "backward s", "error"), cells)


def number(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


def steps(lines: list[Line]) -> str:
    from statistics import median

    cells = []
    for line in lines:
        for name in ("sample", "reference", "update", "total", "gpu_gib", "ram_gib"):
            ours, trl = (
                (max if name.endswith("gib") else median)(step[name] for step in line.figures[side])
                for side in ("ours", "TRL")
            )
            cells.append((line.part, name, f"{ours:.2f}", f"{trl:.2f}", f"{trl / ours:.2f}" if ours else ""))
    return rows(("", "s or GiB", "ours", "TRL", "TRL / ours"), cells)


TABLES: dict[int, Callable[[list[Line]], str]] = {
    1: whole_runs, 2: checks, 3: fits, 4: decodes, 5: logprobs, 6: steps,
}  # fmt: skip
