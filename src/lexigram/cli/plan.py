"""`lexigram plan`: what a run will do, before it does anything."""

from collections.abc import Mapping
from pathlib import Path

from lexigram.cli.arguments import Cache, Count, MaxRam
from lexigram.cli.recipes import takes_recipe
from lexigram.cli.screen import console, say
from lexigram.estimation import estimated_seconds
from lexigram.memory import parsed
from lexigram.planning import Plan
from lexigram.planning import plan as make_plan
from lexigram.recipe import Recipe
from lexigram.reporting import tables

EXAMPLES = (
    "lexigram plan demo --calibration demo",
    "lexigram plan Qwen/Qwen3-0.6B --ratio 0.3 --calibration c4.jsonl --max-ram 2GiB",
)


@takes_recipe
def plan(recipe: Recipe, cache: Cache = None, workers: Count = None, max_ram: MaxRam = None) -> None:
    """Say what compressing MODEL would come to: forms, bytes, memory, disk, and time by a short measurement.

    Takes the options of `compress` and writes nothing.
    """
    prepared = planned(recipe, cache, workers, max_ram)
    show_plan(prepared, estimated_seconds(prepared))


def planned(recipe: Recipe, cache: Path | None, workers: int | None, max_ram: str | None) -> Plan:
    """The plan by options as they are written."""
    return make_plan(recipe, cache=cache, workers=workers, max_ram=None if max_ram is None else parsed(max_ram))


def show_plan(prepared: Plan, seconds: Mapping[str, float]) -> None:
    """Print it, with what every stage takes."""
    console.print(tables.plan_table(prepared))
    console.print(tables.stages_table(prepared, seconds))
    say(
        f"about {tables.size(prepared.memory_bytes)} of memory, {tables.size(prepared.disk_bytes)} on disk; "
        f"device {prepared.device}, forward pass in {str(prepared.compute_dtype).removeprefix('torch.')}"
    )
    if warning := short_memory(prepared):
        say(warning)


def short_memory(prepared: Plan) -> str | None:
    """What to say where the machine has less memory than is predicted; None where it suffices, or nobody knows."""
    if prepared.room is None or not prepared.beyond_room:
        return None
    fewer = f", take fewer workers than {prepared.way.workers}" if prepared.way.workers > 1 else ""
    return (
        f"no more than {tables.size(prepared.room)} of memory are there for it: the system may end the run; free some{fewer}, "
        "or take a larger machine"
    )
