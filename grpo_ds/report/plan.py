"""A memory plan as a person reads it. No torch here: a plan is printed before anything heavy is loaded."""

from rich.table import Table
from rich.text import Text

from grpo_ds.memory.plan import GIB, Plan, Where
from grpo_ds.memory.select import Job, fits, remedies
from grpo_ds.system.invocation import command
from grpo_ds.terminal import escape_control_chars

PLACES: dict[Where, str] = {"gpu": "card", "host": "host"}


def components(plan: Plan, title: str, where: Where) -> Table:
    """What each phase consists of, in GiB."""
    table = Table(title=Text(escape_control_chars(f"{title}: GiB on the {PLACES[where]}")), title_justify="left")
    table.add_column("component")
    parts = [phase.gpu if where == "gpu" else phase.host for phase in plan.phases]
    for phase in plan.phases:
        table.add_column(phase.name, justify="right")
    for component in dict.fromkeys(name for part in parts for name in part):
        table.add_row(component, *(f"{part[component] / GIB:.2f}" if component in part else "" for part in parts))
    table.add_section()
    table.add_row("sum", *(f"{sum(part.values()) / GIB:.2f}" for part in parts))
    return table


def phases(plan: Plan, gpu_gib: float | None, ram_gib: float) -> Table:
    """What each phase takes of each memory, and how much there is."""
    sizes: dict[Where, float] = {"gpu": gpu_gib, "host": ram_gib} if gpu_gib else {"host": ram_gib}
    table = Table(title="Planned memory, GiB at the peak of each phase", title_justify="left", show_footer=True)
    table.add_column("", footer="there is")
    for where, size in sizes.items():
        table.add_column(PLACES[where], footer=f"{size:.1f}", justify="right")
    for phase in plan.phases:
        table.add_row(phase.name, *(f"{phase.bytes_on(where) / GIB:.2f}" for where in sizes))
    return table


def in_a_line(job: Job, plan: Plan, gpu_gib: float | None, ram_gib: float) -> str:
    """Peaks, the phases that make them, whether they fit this machine, and what would make them."""
    host, gpu = plan.binding("host"), plan.binding("gpu")
    card = f"{gpu.needed_on('gpu') / GIB:.1f} of {gpu_gib:.1f} GiB on the card ({gpu.name}), " if gpu_gib else ""
    line = f"Memory plan: {card}{host.needed_on('host') / GIB:.1f} of {ram_gib:.1f} GiB of RAM ({host.name})"
    if fits(plan, gpu_gib or 0.0, ram_gib):
        return line
    changes = " and ".join(remedy.change for remedy in remedies(job, gpu_gib or 0.0, ram_gib))
    cure = f"it would with {changes}" if changes else f"`{command('select')}` shows what does"
    return f"{line}\nWarning: by this plan the run does not fit; {cure}."
