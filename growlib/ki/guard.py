"""What no step of training may take: found on the device, and read where the host reads from the device anyway."""

from typing import NamedTuple

import torch
from torch import Tensor

from growlib.errors import GrowError

NEVER = 1 << 62  # the step of what was not found


class Finding(NamedTuple):
    """A refusal in words."""

    who: str
    wrong: str
    valid: str


class Guard:
    """Remembers the first step of each finding.

    On the CPU a finding is raised at once. On another device it stays there: nothing waits for it, until `check` reads.
    What is found must do no harm in between: ids are brought into range, a teacher that says no numbers is not heard.

    Attributes:
        step: the number of the step at work; 0: it is no training, and the step is not named.
    """

    def __init__(self) -> None:
        self.step = 0
        self._first: dict[Finding, Tensor] = {}

    def add(self, bad: Tensor, finding: Finding) -> None:
        """Add whether, a scalar of any type, something was found in this step."""
        if costs_nothing(bad):
            if bool(bad):
                raise _refusal(finding, self.step)
            return
        known = self._first.get(finding, torch.tensor(NEVER, device=bad.device))
        self._first[finding] = torch.minimum(known, torch.where(bad != 0, self.step, NEVER))

    def within(self, ids: Tensor, count: int, finding: Finding) -> Tensor:
        """The ids, which index a table of `count` rows; those that are out of range are a finding."""
        if ids.device.type == "meta" or ids.numel() == 0:
            return ids
        self.add(((ids < 0) | (ids >= count)).any(), finding)
        return ids if costs_nothing(ids) else ids.clamp(0, count - 1)

    def check(self) -> None:
        """Read what was found; raises GrowError, and starts again."""
        if not self._first:
            return
        findings = list(self._first)
        by_device: dict[torch.device, list[Finding]] = {}
        for finding in findings:
            by_device.setdefault(self._first[finding].device, []).append(finding)
        first = {
            finding: step
            for group in by_device.values()
            for finding, step in zip(group, torch.stack([self._first[f] for f in group]).tolist(), strict=True)
        }
        self._first = {}
        finding = min(findings, key=first.__getitem__)
        if first[finding] != NEVER:
            raise _refusal(finding, first[finding])


def costs_nothing(tensor: Tensor) -> bool:
    """Whether the host can read a tensor without waiting."""
    return tensor.device.type == "cpu"


def _refusal(finding: Finding, step: int) -> GrowError:
    asked = f"{finding.who} in step {step}" if step else finding.who
    return GrowError(asked, finding.wrong, finding.valid)
