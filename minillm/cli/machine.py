"""`minillm plan | doctor`: what a run takes, and what a machine has."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from minillm.cli.verb import Verb
from minillm.data.config import DataConfig
from minillm.doctor import advice, examine
from minillm.doctor import report as doctor_report
from minillm.run import RunConfig
from minillm.simulate import Plan, simulate
from minillm.simulate import report as simulation_report


@dataclass(frozen=True)
class Doctor:
    """Options of `doctor`."""

    seconds: Annotated[float, "time to measure in, over all devices", ">= 0"] = 10.0
    json: Annotated[bool, "one JSON object instead of a table"] = False


def plan(options: Plan) -> None:
    """Say what a run takes, and how to lay it out over GPUs."""
    found = simulate(options)
    print(json.dumps(found, indent=1) if options.json else simulation_report(found))


def doctor(options: Doctor) -> None:
    """Say what this machine has, how fast it is and what to set."""
    places = {"run.dir": str(Path(RunConfig.dir).parent), "data.cache_dir": DataConfig.cache_dir}
    found = examine(options.seconds, places)
    print(json.dumps(found | {"advice": advice(found)}, indent=1) if options.json else doctor_report(found))


VERBS = {
    "plan": Verb(
        plan, Plan, [], "[CONFIG.toml] --gpus N: memory, time and a layout of a run on N GPUs", reads_config=True
    ),
    "doctor": Verb(doctor, Doctor, [], "what this machine has, how fast it is, what to set"),
}
