"""The preview of a searched plan: the choice on one screen, what lost and why, what would change the answer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from distri.cli.render import DIGITS, MAP_COLS, MAP_ROWS, console, scaled, table

if TYPE_CHECKING:
    from rich.table import Table

BAR = 16
MOST_ROWS = 16


def show_preview(found: Mapping[str, Any]) -> None:
    """Print a search's answer."""
    plan, search = found["plan"], found["search"]
    out = console()
    for line in headline(plan, search):
        out.print(line, markup=False, soft_wrap=True)
    for line in band_map(plan):
        out.print(f"  {line}", markup=False, soft_wrap=True)
    out.print(_devices(plan, search))
    out.print(_exchanges(plan))
    for line in verdict(plan, search):
        out.print(line, markup=False, soft_wrap=True)
    if search["runners_up"]:
        out.print(_runners(search))
    for line in afterthoughts(search):
        out.print(line, markup=False, soft_wrap=True)


def headline(plan: Mapping[str, Any], search: Mapping[str, Any]) -> list[str]:
    """What is drawn, on what, and how it is spread."""
    image, mesh = plan["image"], plan["mesh"]
    size = mesh["cfg"] * mesh["patch"]
    offered = "" if size == search["offered"] else f" of {search['offered']}"
    return [
        (
            f"{plan['model']['name']}: {image['height']}x{image['width']} pixels, {image['num_inference_steps']} steps "
            f"({plan['warmup_steps']} of them warm-up), guidance {'on' if image['guidance'] else 'off'}, "
            f"{plan['dtype']}"
        ),
        (
            f"on {size}{offered} {_s(size, 'device')} of {search['hardware']} ({search['title']}), "
            f"least {search['objective'].replace('-', ' ')}"
        ),
        (
            f"mesh: {mesh['cfg']} guidance {_s(mesh['cfg'], 'branch')} x {mesh['patch']} {_s(mesh['patch'], 'patch')} "
            f"= {size} {_s(size, 'rank')}; {search['layout']}; policy {search['policy']}; plan {plan['hash'][:12]}"
        ),
    ]


def _s(count: int, word: str) -> str:
    if count == 1:
        return word
    return f"{word}es" if word.endswith("ch") else f"{word}s"


def band_map(plan: Mapping[str, Any]) -> list[str]:
    """The latent in small: each character is the place of the patch that owns the spot."""
    bands = plan["bands"]
    rows = max(band["rows"][1] for band in bands)
    cols = max(band["cols"][1] for band in bands)
    starts = {band["rows"][0] for band in bands}
    is_even = len({band["rows"][1] - band["rows"][0] for band in bands}) == 1
    wanted = max(4, len(starts)) if is_even else MAP_ROWS
    down, across = min(wanted, 2 * MAP_ROWS, rows), min(MAP_COLS, cols)

    def owner(row: int, col: int) -> str:
        for place, band in enumerate(bands):
            if band["rows"][0] <= row < band["rows"][1] and band["cols"][0] <= col < band["cols"][1]:
                return DIGITS[place % len(DIGITS)]
        raise AssertionError(f"no patch owns {row}, {col}")

    return [
        "".join(
            owner((2 * y + 1) * rows // (2 * down), (2 * x + 1) * cols // (2 * across)) for x in range(across)
        )
        for y in range(down)
    ]


def memory_bar(used: float, limit: float) -> str:
    """A bar of fixed width: `#` is used, `.` is free."""
    filled = min(BAR, round(BAR * used / limit)) if limit else BAR
    return "#" * filled + "." * (BAR - filled)


def _devices(plan: Mapping[str, Any], search: Mapping[str, Any]) -> Table:
    made = table(
        "Ranks, and what each has in the whole run",
        "rank",
        "device",
        "patch",
        "rows",
        "columns",
        "MACs",
        "memory",
    )
    made.columns[2].justify = made.columns[6].justify = "left"
    made.columns[6].no_wrap = True
    patches = plan["mesh"]["patch"]
    shown = list(range(len(search["devices"])))
    is_alike = len(set(search["device_models"])) == 1
    for rank in shown[:MOST_ROWS]:
        place, memory = rank % patches, search["memory"][rank]
        band = plan["bands"][place]
        branch = f"{DIGITS[place % len(DIGITS)]}"
        if plan["mesh"]["cfg"] == 2:
            branch += " without prompt" if rank < patches else " with prompt"
        made.add_row(
            str(rank),
            str(search["devices"][rank]) + ("" if is_alike else f": {search['device_models'][rank]}"),
            branch,
            "-".join(str(edge) for edge in band["rows"]),
            "-".join(str(edge) for edge in band["cols"]),
            scaled(plan["macs_per_device"][rank]),
            f"{memory_bar(memory['total'], memory['limit'])} "
            f"{memory['total'] / 1e9:.1f}/{memory['limit'] / 1e9:.1f} GB",
        )
    if len(shown) > MOST_ROWS:
        made.add_row("...", f"and {len(shown) - MOST_ROWS} more", *[""] * 5)
    return made


def _exchanges(plan: Mapping[str, Any]) -> Table:
    made = table(
        "Exchanges, at one step of the steady phase",
        "kind", "warm-up", "steady", "layers", "buckets", "received by a rank, at most",
    )  # fmt: skip
    for kind in ("halo", "moments", "context", "output"):
        chosen = [exchange for exchange in plan["exchanges"] if exchange["kind"] == kind]
        if not chosen:
            continue
        moving = [e for e in chosen if kind == "output" or e["steady"] not in ("local", "frozen")]
        most = max(sum(e["bytes_received"][place] for e in moving) for place in range(plan["mesh"]["patch"]))
        coded = sorted({e["codec"] for e in chosen} - {"none"})
        made.add_row(
            kind,
            ", ".join(dict.fromkeys(e["warmup"] for e in chosen)),
            ", ".join([*dict.fromkeys(e["steady"] for e in chosen), *coded]),
            str(len(chosen)),
            str(len({e["bucket"] for e in chosen} - {None})) or "-",
            scaled(most, "B"),
        )
    return made


def verdict(plan: Mapping[str, Any], search: Mapping[str, Any]) -> list[str]:
    """What is predicted, and how sure the choice is."""
    p, counts = search["prediction"], search["counts"]
    lines = []
    if search["one_device_is_best"]:
        lines.append(
            f"One device is predicted to be best: {search['offered']} were offered, more would not lower the "
            f"{search['objective'].replace('-', ' ')}."
        )
    size = plan["mesh"]["cfg"] * plan["mesh"]["patch"]
    speed = (
        "" if size == 1 else f", {p['speedup']:.2f} times as fast as one device ({p['one_device_s']:.2f} s)"
    )
    lines.append(f"predicted: {p['latency_s']:.2f} s a picture{speed}")
    if size > 1:
        lines.append(
            f"  {p['compute_s']:.2f} s kernels, {p['exposed_s']:.2f} s waiting for transfers, "
            f"{p['hidden_s']:.2f} s of transfers hidden behind kernels; warm-up {p['warmup_s']:.2f} s"
        )
    quality = f"risk to the picture: {search['risk']}"
    if search["psnr_db"] is not None:
        quality += f", {search['psnr_db']:.1f} dB measured on the demo model"
    price = "" if p["price"] is None else f", price {p['price']:.5f} a picture"
    lines.append(f"  {p['device_seconds']:.2f} device-seconds{price}; {quality}")
    evaluated = counts["evaluated"]
    lines.append(
        f"searched: {counts['considered']:,} plans considered, {counts['bounded_away']:,} bounded away, "
        f"{counts['excluded']:,} without the memory, {evaluated} evaluated, {counts['simulated']} simulated; "
        f"none is better by more than {search['gap']:.1%}"
    )
    if search["bands"]:
        bands = search["bands"]
        lines.append(
            f"bands solved: {bands['share_of_ideal']:.0%} of the ideal speed, even ones "
            f"{bands['even_share_of_ideal']:.0%}; no split into whole units is faster by more than {bands['gap']:.1%}; "
            f"cheapest gather of uneven parts: {bands['gather']}"
        )
    return lines


def _runners(search: Mapping[str, Any]) -> Table:
    made = table("What lost, and why", "plan", "devices", "policy", "latency", "memory", "why it lost")
    for column in (2, 5):
        made.columns[column].justify = "left"
    for runner in search["runners_up"]:
        made.add_row(
            runner["layout"],
            str(runner["devices"]),
            runner["policy"],
            f"{runner['latency_s']:.2f} s",
            scaled(runner["memory_bytes"], "B"),
            runner["why"],
        )
    return made


def afterthoughts(search: Mapping[str, Any]) -> list[str]:
    """Devices that are left out, and what would change the answer."""
    lines = []
    reasons: dict[str, list[int]] = {}
    for item in search["left_out"]:
        reasons.setdefault(item["why"], []).append(item["device"])
    for why, devices in reasons.items():
        named = ", ".join(str(device) for device in devices)
        lines.append(f"left out: {_s(len(devices), 'device')} {named}: {why}")
    if search["what_if"]:
        lines.append("what would change the answer:")
        lines += [f"  {item['sentence']}" for item in search["what_if"]]
    return lines


def show_pareto(points: Sequence[Mapping[str, Any]]) -> None:
    """Print latency against device-seconds."""
    made = table(
        "Latency against device-seconds",
        "devices",
        "plan",
        "policy",
        "latency",
        "device-seconds",
        "beaten by none",
    )
    for column in (1, 2):
        made.columns[column].justify = "left"
    for point in points:
        made.add_row(
            str(point["devices"]), point["layout"], point["policy"], f"{point['latency_s']:.2f} s",
            f"{point['device_seconds']:.2f}", "yes" if point["is_best"] else "",
        )  # fmt: skip
    console().print(made)
