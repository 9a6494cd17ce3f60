"""README.md of a trained model: a model card for people and the hub, made from the files in the run's folder.

Names of models and files, labels and versions come from others: yaml quotes them in the header, `plain` and
`fenced` escape them in the rest.
"""

import re
from pathlib import Path
from typing import Any

import yaml
from jinja2 import Environment, FileSystemLoader, StrictUndefined, Template

from grpo_ds.memory.plan import MEMORY_NAMES
from grpo_ds.models.presets import EMBEDDED, PRESETS
from grpo_ds.models.shapes import ADAPTER_FILE
from grpo_ds.report import verdict
from grpo_ds.report.figures import confidence_rows, grade_rows, mean_change_lines, reward_rows
from grpo_ds.report.markdown import fenced, plain, table
from grpo_ds.report.run_files import memory_by_phase, read_json, read_run, read_settings
from grpo_ds.report.snippets import modelfile, transformers_code
from grpo_ds.run_folder.files import CARD_FILE, ENVIRONMENT_FILE, HELD_OUT_FILE, MERGED, SUMMARY_FILE
from grpo_ds.run_folder.status import CHANGED_INPUTS, STATUS_FILE
from grpo_ds.system.files import write_whole
from grpo_ds.task.hub_records import HUB_ID, hub_id, is_hub_id
from grpo_ds.task.records import NO_CONTEXT
from grpo_ds.task.rewards import READY_MADE
from grpo_ds.task.sources import SAMPLE
from grpo_ds.task.worked_examples import BIOMEDICAL

TEMPLATE = "model_card.md.jinja"
EMBEDDED_HUB_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"
SETTINGS = (
    *("loss_type", "num_iterations", "num_steps", "mu", "batch_size", "num_generations", "learning_rate"),
    *("lr_scheduler_type", "warmup_steps", "beta"),
    *("kl_estimator", "reference", "epsilon", "epsilon_high", "delta", "scale_rewards", "temperature"),
    *("max_prompt_length", "max_completion_length", "reward_funcs", "reward_weights", "balance_classes"),
    *("max_grad_norm", "weight_decay", "ds", "seed"),
)
ANSWERS = {"number": "with a number", "text": "with a text", "none": "none is right: the rewards decide"}
HUB_METRICS = {"accuracy": "accuracy", "f1": "macro_f1", "reward": "mean_reward"}  # the hub's name -> ours
ADAPTER_SETTINGS = ("lora_r", "lora_alpha", "lora_target", "load_in_4bit", "load_in_8bit")


def write_card(folder: Path) -> Path:
    """Write README.md into the folder of a run that is done, and into that of its merged model."""
    file, merged = folder / CARD_FILE, folder / MERGED
    write_whole(file, card(folder, is_adapter=(folder / ADAPTER_FILE).is_file()))
    if merged.is_dir():
        write_whole(merged / CARD_FILE, card(folder, is_adapter=False, is_merged=True))
    return file


def card(folder: Path, *, is_adapter: bool, is_merged: bool = False) -> str:
    config, environment = read_settings(folder), read_json(folder, ENVIRONMENT_FILE)
    held_out, summary = read_json(folder, HELD_OUT_FILE), read_json(folder, SUMMARY_FILE)
    before, after = held_out["before"], held_out["after"]
    return _template().render(
        header=_header(folder, config, after, is_adapter=is_adapter),
        name=folder.resolve().name,
        base=base_model(config["model"]) or Path(config["model"]).name,
        steps=summary["steps"],
        data={"name": _data_name(config), "trained_to": _trained_to(config), "table": _data(config, summary)},
        before=before,
        after=after,
        verdict=verdict.of(read_run(folder)),
        mean_changes=mean_change_lines(held_out),
        of_labels="p_right_change" in held_out,
        biomedical=config.get("subject", BIOMEDICAL) == BIOMEDICAL,
        grades=table(("", "before", "after"), _figure_rows(before, after)),
        is_adapter=is_adapter,
        is_merged=is_merged,
        snippet=fenced(transformers_code(folder, is_adapter=is_adapter), "python"),
        modelfile=fenced(modelfile(folder)),
        settings=table(("setting", "value"), _settings(config)),
        only_our_rewards=set(config["reward_funcs"].split(",")) <= set(READY_MADE),
        changed_inputs=read_json(folder, STATUS_FILE).get(CHANGED_INPUTS, []),
        memory=_memory(folder),
        environment=table(("", ""), _environment(environment)),
        versions=environment["versions"],
        has_context=config.get("context_field") != NO_CONTEXT,
        **{name: config[name] for name in ("few_shot", "prefill", "temperature", "max_prompt_length", "reward_funcs")},
    )


def base_model(name: str) -> str | None:
    """Return the hub id of --model, None for a local folder."""
    if name == EMBEDDED:
        return EMBEDDED_HUB_ID
    if name in PRESETS:
        return PRESETS[name].hub_id
    return name if HUB_ID.fullmatch(name) and not Path(name).exists() else None


def _template() -> Template:
    loader = FileSystemLoader(Path(__file__).parent)
    environment = Environment(loader=loader, undefined=StrictUndefined, trim_blocks=True)
    environment.filters["plain"] = plain
    return environment.get_template(TEMPLATE)


def _header(folder: Path, config: dict[str, Any], after: dict[str, Any], *, is_adapter: bool) -> str:
    """Return the YAML that the hub reads, without a base model or data set that others cannot find."""
    base, data = base_model(config["model"]), _data_name(config)
    scores = [(kind, after[figure]) for kind, figure in HUB_METRICS.items() if figure in after]
    metrics = [{"type": kind, "value": round(value, 4), "name": f"held-out {kind}"} for kind, value in scores]
    result = {
        "task": {"type": "text-generation"},
        "dataset": {"name": data, "type": hub_id(data) if _is_hub_data(config) else "own", "split": "held out"},
        "metrics": metrics,
    }
    header = {
        "library_name": "peft" if is_adapter else "transformers",
        "pipeline_tag": "text-generation",
        **({"base_model": base, "base_model_relation": "adapter" if is_adapter else "finetune"} if base else {}),
        **({"datasets": [hub_id(data)]} if _is_hub_data(config) else {}),
        "tags": ["grpo", "deepspeed", "grpo_ds", *(["lora"] if is_adapter else [])],
        "model-index": [{"name": folder.resolve().name, "results": [result]}],
    }
    return yaml.safe_dump(header, sort_keys=False, allow_unicode=True).rstrip()


def _figure_rows(before: dict[str, Any], after: dict[str, Any]) -> list[tuple[str, str, str]]:
    sides = before, after
    rows = [*grade_rows(sides), *confidence_rows(sides), *reward_rows(sides)]
    return [(name.strip(), show(before), show(after)) for name, show in rows]


def _settings(config: dict[str, Any]) -> list[tuple[str, Any]]:
    """Return the settings that have a value; files without their folders."""
    names = (*SETTINGS, *ADAPTER_SETTINGS) if config["lora_r"] else SETTINGS
    values = {name: config[name] for name in names if config.get(name) is not None}
    files = {name: re.sub(r"[^,]*/", "", values[name]) for name in ("reward_funcs", "ds")}
    return list({**values, **files}.items())


def _data(config: dict[str, Any], summary: dict[str, Any]) -> str:
    counts, closed, part = summary["questions"], _is_closed(config), config["eval_fraction"]
    share = f"by class, {part} of each set aside" if closed else f"{part} set aside"
    share += f", {config['eval_limit']} of them asked at most" if config.get("eval_limit") else ""
    rows = [
        ("source", _data_name(config)),
        *([("labels", config["labels"])] if closed else [("answers", ANSWERS[config["answers"]])]),
        ("trained on", f"questions drawn from {counts['train']}"),
        ("held out", f"{counts['held_out']} questions that were not used in training"),
        ("split", f"{share}, drawn by seed {config['seed']}"),
    ]
    return table(("", ""), rows)


def _data_name(config: dict[str, Any]) -> str:
    """Return a hub id, or the name of the file without its folders."""
    data = config["data"] or SAMPLE
    if data == SAMPLE:
        return "the sample that is part of grpo_ds"
    return data if _is_hub_data(config) else Path(data).name


def _is_hub_data(config: dict[str, Any]) -> bool:
    data = config["data"] or ""
    return is_hub_id(data) and not Path(data).exists()


def _is_closed(config: dict[str, Any]) -> bool:
    return config.get("answers", "labels") == "labels"


def _trained_to(config: dict[str, Any]) -> str:
    """Say what the model was trained to do."""
    if config.get("answers") == "none":
        return "to earn the rewards below"
    wanted = " or ".join(label.strip() for label in config["labels"].split(","))
    return f"to answer {wanted if _is_closed(config) else ANSWERS[config['answers']]} in the required form"


def _memory(folder: Path) -> str:
    """Return the table of memory by phase, without columns for GPU memory if none was used."""
    peaks = memory_by_phase(folder)
    names = {kind: name for kind, name in MEMORY_NAMES.items() if any(peak[kind] for peak in peaks.values())}
    columns = {f"{kind}{what}": f"{name}{what}" for kind, name in names.items() for what in ("", " planned")}
    rows = [(phase, *(_two_digits(peak[key]) for key in columns)) for phase, peak in peaks.items()]
    return table(("phase", *columns.values()), rows)


def _two_digits(gib: float | None) -> str:
    return "" if gib is None else f"{gib:.2f}"


def _environment(environment: dict[str, Any]) -> list[tuple[str, str]]:
    machine = {
        "CPU": f"{environment['cpu']}, {environment['threads']} threads",
        "RAM": f"{environment['ram_gib']} GiB",
        "GPU": ", ".join(environment["gpus"]) or "none",
        "ranks": str(environment["ranks"]),
    }
    return [
        *machine.items(),
        *((name, version or "not installed") for name, version in environment["versions"].items()),
    ]
