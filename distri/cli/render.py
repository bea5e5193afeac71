"""Plans, graphs and results for people: tables on standard output, progress bars on standard error.

Where a stream is not a terminal there are no colours and no bars.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

from distri.core.partition import SplitAxis
from distri.core.plan import Exchange, Plan
from distri.core.planner import is_sent
from distri.core.policy import ExchangeKind, Phase
from distri.core.shape import Rect

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

MAP_ROWS, MAP_COLS = 12, 32
DIGITS = "0123456789abcdefghijklmnopqrstuvwxyz"


def console() -> Console:
    """Standard output; of a fixed width where it is not a terminal."""
    from rich.console import Console

    made = Console(highlight=False)
    return made if made.is_terminal else Console(highlight=False, width=100)


def table(title: str, *columns: str) -> Table:
    """An empty table; all columns but the first are right-aligned."""
    from rich.table import Table

    made = Table(title=title, title_justify="left", title_style="bold")
    for place, column in enumerate(columns):
        made.add_column(column, justify="right" if place else "left", overflow="fold")
    return made


def scaled(value: float, unit: str = "") -> str:
    """A number with a decimal prefix and three or four digits.

    >>> scaled(113_094_288_998_400), scaled(12_800_000, "B"), scaled(7)
    ('113.1 T', '12.80 MB', '7')
    """
    for prefix, size in (("P", 1e15), ("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if abs(value) >= size:
            number = value / size
            return f"{number:.{1 if number >= 100 else 2}f} {prefix}{unit}"
    return f"{value:g} {unit}".rstrip()


def show_plan(plan: Plan) -> None:
    """Print a plan: mesh, map of the patches, ranks, policies, exchanges."""
    out = console()
    image, mesh = plan.image, plan.mesh
    out.print(
        f"{plan.model.name}: {image.height}x{image.width} pixels, {image.num_inference_steps} steps "
        f"({plan.warmup_steps} of them warm-up), guidance {'on' if image.guidance else 'off'}, {plan.dtype}",
        markup=False,
    )
    out.print(
        f"mesh: {mesh.cfg} guidance {'branch' if mesh.cfg == 1 else 'branches'} x {mesh.patch} "
        f"{'patch' if mesh.patch == 1 else 'patches'} = {mesh.size} {'rank' if mesh.size == 1 else 'ranks'}; "
        f"split by {_cut(plan)}; policy {plan.policy.name}"
    )
    for line in patch_map(plan):
        out.print(f"  {line}", markup=False)
    out.print(_ranks(plan))
    out.print(_exchanges(plan))


def _cut(plan: Plan) -> str:
    axis = plan.partition.axis
    return "rows and columns in turn" if axis is SplitAxis.ALTERNATE else axis.value


def patch_map(plan: Plan) -> list[str]:
    """The latent in small: each character is the place of the patch that owns the spot; of each turn, side by side."""
    maps = [_map_of(plan, patches) for patches in plan.partition.turns]
    return ["   ".join(line) for line in zip(*maps, strict=True)]


def _map_of(plan: Plan, patches: Sequence[Rect]) -> list[str]:
    rows, cols = plan.latent.rows.size, plan.latent.cols.size
    down, across = min(MAP_ROWS, rows), min(MAP_COLS, cols)
    lines = []
    for y in range(down):
        row = (2 * y + 1) * rows // (2 * down)
        spots = [(row, (2 * x + 1) * cols // (2 * across)) for x in range(across)]
        lines.append("".join(_owner(patches, *spot) for spot in spots))
    return lines


def _owner(patches: Sequence[Rect], row: int, col: int) -> str:
    for place, patch in enumerate(patches):
        if patch.rows.start <= row < patch.rows.stop and patch.cols.start <= col < patch.cols.stop:
            return DIGITS[place % len(DIGITS)]
    raise AssertionError(f"no patch owns {row}, {col}")


def _ranks(plan: Plan) -> Table:
    made = table(
        "Ranks", "rank", "branch", "patch", "rows", "columns", "MACs of the run", "received per step"
    )
    for rank in range(plan.mesh.size):
        place = plan.mesh.patch_of(rank)
        seen = [patches[place] for patches in plan.partition.turns]
        branch = ("without prompt", "with prompt")[plan.mesh.branch_of(rank)] if plan.mesh.cfg == 2 else "all"
        made.add_row(
            str(rank),
            branch,
            DIGITS[place % len(DIGITS)],
            " / ".join(f"{patch.rows.start}-{patch.rows.stop}" for patch in seen),
            " / ".join(f"{patch.cols.start}-{patch.cols.stop}" for patch in seen),
            scaled(plan.macs_per_device[rank]),
            scaled(plan.bytes_received_per_step[rank], "B"),
        )
    return made


def _exchanges(plan: Plan) -> Table:
    made = table(
        "Exchanges, at one step of the steady phase",
        "kind",
        "warm-up",
        "steady",
        "layers",
        "buckets",
        "received by a rank, at most",
    )
    for kind in ExchangeKind:
        chosen = [exchange for exchange in plan.exchanges if exchange.kind is kind]
        if not chosen:
            continue
        made.add_row(
            kind.value,
            _policies(chosen, Phase.WARMUP),
            _policies(chosen, Phase.STEADY),
            str(len(chosen)),
            str(len({exchange.bucket for exchange in chosen} - {None})) or "-",
            scaled(_most_received(plan, chosen), "B"),
        )
    return made


def _policies(exchanges: Sequence[Exchange], phase: Phase) -> str:
    return ", ".join(dict.fromkeys(exchange.policy(phase).value for exchange in exchanges))


def _most_received(plan: Plan, exchanges: Sequence[Exchange]) -> int:
    moving = [e for e in exchanges if is_sent(e)]
    return max(sum(e.bytes_received[place] for e in moving) for place in range(plan.mesh.patch))


def show_result(title: str, rows: Sequence[tuple[str, str]]) -> None:
    """Print named values."""
    made = table(title, "what", "value")
    for name, value in rows:
        made.add_row(name, value)
    console().print(made)


@contextmanager
def progress_bar(title: str, is_shown: bool = True) -> Iterator[Callable[[int, int], None] | None]:
    """A callback (done, all) that moves a bar on standard error; None where nobody watches."""
    from rich.console import Console

    err = Console(stderr=True)
    if not is_shown or not err.is_terminal:
        yield None
        return
    from rich.progress import Progress

    with Progress(console=err, transient=True) as bars:
        task = bars.add_task(title, total=None)

        def advance(done: int, total: int) -> None:
            bars.update(task, completed=done, total=total)

        yield advance


@contextmanager
def late_progress_bar(title: str, after_s: float = 1.0) -> Iterator[Callable[[int, int], None]]:
    """As `progress_bar`, but it appears only when the work has taken longer than `after_s`."""
    import time

    start = time.monotonic()
    with ExitStack() as opened:
        bars: list[Callable[[int, int], None] | None] = []

        def advance(done: int, total: int) -> None:
            if not bars and time.monotonic() - start > after_s:
                bars.append(opened.enter_context(progress_bar(title)))
            if bars and bars[0] is not None:
                bars[0](done, total)

        yield advance


def show_totals(title: str, totals: Mapping[str, Any]) -> None:
    """Print a layer graph's sums, by kind of operation."""
    made = table(title, "kind", "operations", "MACs", "weights", "activations")
    for name, row in [*totals["kinds"].items(), ("total", totals)]:
        made.add_row(
            name,
            str(row["operations"]),
            scaled(row["macs"]),
            scaled(row["weight_bytes"], "B"),
            scaled(row["activation_bytes"], "B"),
        )
    out = console()
    out.print(made)
    needs = ", ".join(f"{count} {name}" for name, count in totals["exchanges"].items())
    out.print(f"{scaled(totals['parameters'])} parameters; when split, the layers need: {needs}")
