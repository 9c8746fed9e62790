"""What this machine has, how fast it is, and what to set for it: `minillm doctor`.

`machine.py` looks, `devices.py` measures, `report.py` says it and advises. Whatever cannot be found out is reported as
such: nothing here fails because of what is missing.
"""

from minillm.doctor.machine import examine
from minillm.doctor.report import advice, report

__all__ = ["advice", "examine", "report"]
