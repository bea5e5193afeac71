"""What a plan does to the picture: a measured table where there is one, the order of risks everywhere.

`data/quality.json` holds rows of (policy table, patches, warm-up steps, steps, PSNR against the single device), drawn
with the demo model by `benchmarks/quality_table.py`. A plan is looked up cautiously: the row of its own table with at
least as many patches and at most as large a share of warm-up. Where nothing as cautious was measured there is no
figure, and a plan without a figure meets no quality budget. All-fresh plans change nothing, so they meet every budget.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Final

from distri.core.codec import Codec
from distri.core.policy import Phase, Policy, PolicyTable
from distri.errors import PlanError
from distri.search.request import Risk

DATA: Final = Path(__file__).parent / "data" / "quality.json"
QUALITY_SCHEMA: Final = 1
_RISKS: Final = {
    Policy.FRESH: Risk.FRESH,
    Policy.CORRECTED: Risk.CORRECTED,
    Policy.SHIFTED: Risk.CORRECTED,
    Policy.STALE: Risk.STALE,
    Policy.EXTRAPOLATED: Risk.CODED,
    Policy.FROZEN: Risk.LOCAL,
    Policy.LOCAL: Risk.LOCAL,
}


@dataclass(frozen=True)
class QualityRow:
    """One measured setting: mean PSNR of `num_pictures` pictures against the single device's from the same noise."""

    policy: str
    patches: int
    warmup_steps: int
    num_inference_steps: int
    psnr_db: float
    num_pictures: int = 1

    @property
    def warmup_share(self) -> float:
        """Share of the steps that are warm-up."""
        return self.warmup_steps / self.num_inference_steps


@dataclass(frozen=True)
class QualityTable:
    """All rows, and where they come from."""

    rows: tuple[QualityRow, ...] = ()
    provenance: str = "none measured"

    def psnr_db(self, policy: str, patches: int, warmup_steps: int, num_inference_steps: int) -> float | None:
        """The cautious figure for a setting; None where nothing as cautious was measured."""
        share = warmup_steps / num_inference_steps + 1e-9
        found = [row for row in self.rows if row.policy == policy and row.warmup_share <= share]
        enough = [row for row in found if row.patches >= patches]
        if not enough:
            return None
        nearest = min(row.patches for row in enough)
        return max(row.psnr_db for row in enough if row.patches == nearest)

    @property
    def best_db(self) -> float:
        """The best figure of any row, infinite for none."""
        return max((row.psnr_db for row in self.rows), default=math.inf)


@cache
def load_quality(path: Path = DATA) -> QualityTable:
    """Read a table.

    Raises:
        PlanError: it is not one of this schema.
    """
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        if data["schema"] != QUALITY_SCHEMA:
            raise PlanError(f"{path.name}: a quality table of schema {QUALITY_SCHEMA} is required")
        rows = tuple(QualityRow(**row) for row in data["rows"])
        return QualityTable(rows, data["provenance"]["command"] if rows else "none measured")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise PlanError(f"{path.name}: not a quality table: {error!r}") from error


def risk_of(table: PolicyTable) -> Risk:
    """The worst that a table does to any exchange in the steady phase.

    Stale halos and contexts are the method itself; what tells tables apart is how they treat moments and whether values
    are rounded on the way: `corrected` is the published default, `stale` leaves the moments as they were, `local` drops
    them.
    """
    worst = Risk.FRESH
    for rule in table.rules:
        if rule.phase is Phase.WARMUP:
            risk = Risk.LOCAL if rule.policy is Policy.LOCAL else Risk.FRESH
        elif rule.policy is Policy.STALE and rule.kind.value != "moments":
            is_plain = rule.codec is Codec.NONE and rule.reach is None
            risk = Risk.CORRECTED if is_plain else Risk.CODED
        else:
            risk = _RISKS[rule.policy]
        worst = max(worst, risk, key=lambda found: found.order)
    return worst
