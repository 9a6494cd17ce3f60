"""A memory plan as tables and as a line of text. No torch: a plan is printed before torch is imported."""

from rich.table import Table
from rich.text import Text

from grpo_ds.memory.plan import GIB, MEMORY_NAMES, MemoryKind, Plan
from grpo_ds.memory.select import Job, fits, remedies
from grpo_ds.system.invocation import command
from grpo_ds.terminal import escape_control_chars


def component_table(plan: Plan, title: str, kind: MemoryKind) -> Table:
    """Table of the components of each phase in one memory, in GiB."""
    heading = Text(escape_control_chars(f"{title}: {MEMORY_NAMES[kind]}, GiB"))
    table = Table(title=heading, title_justify="left")
    table.add_column("component")
    parts = [phase.components(kind) for phase in plan.phases]
    for phase in plan.phases:
        table.add_column(phase.name, justify="right")
    for component in dict.fromkeys(name for part in parts for name in part):
        table.add_row(component, *(f"{part[component] / GIB:.2f}" if component in part else "" for part in parts))
    table.add_section()
    table.add_row("sum", *(f"{sum(part.values()) / GIB:.2f}" for part in parts))
    return table


def phase_table(plan: Plan, gpu_gib: float | None, ram_gib: float) -> Table:
    """Table of the planned peak of each phase in each memory, and of the memory available."""
    sizes: dict[MemoryKind, float] = {"gpu": gpu_gib, "ram": ram_gib} if gpu_gib else {"ram": ram_gib}
    table = Table(title="Planned memory, GiB at the peak of each phase", title_justify="left", show_footer=True)
    table.add_column("", footer="available")
    for kind, size in sizes.items():
        table.add_column(MEMORY_NAMES[kind], footer=f"{size:.1f}", justify="right")
    for phase in plan.phases:
        table.add_row(phase.name, *(f"{phase.needed_in(kind) / GIB:.2f}" for kind in sizes))
    return table


def plan_line(job: Job, plan: Plan, gpu_gib: float | None, ram_gib: float) -> str:
    """Peaks and their phases, and, if the run does not fit this machine, changes that make it fit."""
    ram, gpu = plan.binding("ram"), plan.binding("gpu")
    card = (
        f"{gpu.needed_in('gpu') / GIB:.1f} of about {gpu_gib:.1f} GiB of GPU memory ({gpu.name}), " if gpu_gib else ""
    )
    line = f"Memory plan: {card}{ram.needed_in('ram') / GIB:.1f} of {ram_gib:.1f} GiB of RAM ({ram.name})"
    if fits(plan, gpu_gib or 0.0, ram_gib):
        return line
    changes = " and ".join(remedy.change for remedy in remedies(job, gpu_gib or 0.0, ram_gib))
    cure = f"it fits with {changes}" if changes else f"`{command('select')}` shows what fits"
    return f"{line}\nWarning: by this plan the run does not fit; {cure}."
