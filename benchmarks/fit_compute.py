"""Fit the analytic compute model's parameters to measured GEMM and attention times, and write them into
hardware files.

    python benchmarks/fit_compute.py --tables DIR [--write]

DIR holds tables as NVIDIA aiconfigurator publishes them (Apache-2.0): gemm_*.parquet (m, n, k, latency in
ms), enc_*.parquet (attention without a mask, equal numbers of queries and keys) and attn_a100.parquet
(causal, fitted with half the keys). Robust least squares of the logarithm of predicted / measured on a random
share of the 16-bit rows; the errors printed are of the rows left out. The model is the one that
`distri.simulator.compute` evaluates, here over arrays; a row is also evaluated by it, and the two must agree.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable
from importlib import resources
from pathlib import Path

import numpy as np
import pandas as pd
from scipy.optimize import least_squares

from distri.config.hardware import load_cluster
from distri.simulator.compute import (
    GEMM_TILES,
    MAX_SPLIT_WAVES,
    SPLITS,
    AnalyticCompute,
    KernelKind,
    OperationShape,
)
from distri.simulator.hardware import DeviceModel

TABLES = {
    "a100-sxm": ("gemm_a100", "attn_a100", 128),
    "h100-sxm": ("gemm_h100", "enc_h100", 192),
    "h200": ("gemm_h200", "enc_h200", 192),
    "l40s": ("gemm_l40s", "enc_l40s", 128),
}
"""Hardware file: table of GEMMs, of attention, and queries in a block of the attention kernel (FA3: 192)."""
BORROWED = {"a100-pcie": "a100-sxm", "rtx4090": "l40s"}
"""Hardware file without tables: whose parameters it takes, as an assumption."""
GEMM_NAMES = ("efficiency", "k_half", "tile_side", "memory_efficiency", "split_s", "floor_s")
GEMM_LOW = np.log([0.1, 1, 0.1, 0.2, 1e-7, 1e-7])
GEMM_HIGH = np.log([2.0, 2000, 200, 1.2, 3e-5, 2e-5])
GEMM_START = np.log([0.9, 100, 20, 0.8, 2e-6, 3e-6])
ATTENTION_NAMES = ("efficiency", "kv_half", "head_dim_half", "memory_efficiency", "floor_s")
ATTENTION_LOW = np.log([0.1, 1, 0.01, 0.1, 1e-7])
ATTENTION_HIGH = np.log([1.5, 2000, 200, 1.0, 3e-5])
ATTENTION_START = np.log([0.6, 100, 10, 0.6, 7e-6])
BLOCK = re.compile(
    r"(      # begin fitted \(benchmarks/fit_compute\.py\)\n).*?(      # end fitted\n)", re.DOTALL
)
TRAINING_SHARE = 0.15


def main() -> None:
    """Fit every device that has tables."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tables", type=Path, required=True, help="folder of the parquet tables")
    parser.add_argument(
        "--write", action="store_true", help="write the parameters into the shipped hardware files"
    )
    arguments = parser.parse_args()
    blocks = {name: fit_device(name, arguments.tables) for name in TABLES}
    blocks |= {name: borrowed(blocks[other], other) for name, other in BORROWED.items()}
    for name, block in blocks.items() if arguments.write else ():
        write(name, block)


def fit_device(name: str, tables: Path) -> str:
    """The YAML block of one device's parameters; prints the errors of the rows that were left out."""
    gemm_table, attention_table, tile_rows = TABLES[name]
    cluster = load_cluster(name)
    device = cluster.model_of(0)
    gemm, gemm_error = fit_gemm(name, device, pd.read_parquet(tables / f"{gemm_table}.parquet"))
    attention, attention_error = fit_attention(
        name, device, pd.read_parquet(tables / f"{attention_table}.parquet"), tile_rows
    )
    return block_of("gemm", gemm, gemm_table, gemm_error) + block_of(
        "attention", {**attention, "tile_rows": float(tile_rows)}, attention_table, attention_error
    )


def fit_gemm(name: str, device: DeviceModel, table: pd.DataFrame) -> tuple[dict[str, float], float]:
    """Parameters of the GEMM model and the median error of held-out rows, over shapes that denoisers have."""
    rows = table[(table.gemm_dtype == "bfloat16") & table.m.between(32, 32768)]
    rows = rows[rows.n.between(256, 20480) & rows.k.between(256, 20480)]
    m, n, k = (rows[column].to_numpy(float) for column in "mnk")
    seconds = rows.latency.to_numpy() * 1e-3
    training = np.random.default_rng(0).random(len(rows)) < TRAINING_SHARE

    def residuals(x: np.ndarray) -> np.ndarray:
        return np.log(
            gemm_seconds(np.exp(x), device, m[training], n[training], k[training]) / seconds[training]
        )

    values = np.exp(robust(residuals, GEMM_START, GEMM_LOW, GEMM_HIGH))
    error = gemm_seconds(values, device, m, n, k) / seconds - 1
    report(f"{name:9} gemm     ", error[~training], len(rows), training.sum())
    for low, high in ((32, 128), (129, 512), (513, 2048), (2049, 32768)):
        at = (m >= low) & (m <= high) & ~training
        median, bias = np.median(abs(error[at])), np.median(error[at])
        print(f"      m {low:5} to {high:5}: median {median:5.1%}, bias {bias:+5.1%}")
    return dict(zip(GEMM_NAMES, values, strict=True)), float(np.median(abs(error[~training])))


def gemm_seconds(
    values: np.ndarray, device: DeviceModel, m: np.ndarray, n: np.ndarray, k: np.ndarray
) -> np.ndarray:
    """`AnalyticCompute` over arrays."""
    efficiency, k_half, side_half, memory_efficiency, split_s, floor_s = values
    multiprocessors = device.num_multiprocessors.value
    rate = device.peak_flops_per_s["bfloat16"].value * efficiency / multiprocessors
    bandwidth = device.memory_bandwidth_bytes_per_s.value * memory_efficiency
    best = np.full(m.shape, np.inf)
    for rows, columns in GEMM_TILES:
        macs_per_k = rows * columns * (1 + side_half / np.sqrt(rows * columns))
        tiles = np.ceil(m / rows) * np.ceil(n / columns)
        best = np.minimum(best, 2 * np.ceil(tiles / multiprocessors) * macs_per_k * (k + k_half) / rate)
        for split in SPLITS:
            waves = np.ceil(tiles * split / multiprocessors)
            products = 2 * waves * macs_per_k * (np.ceil(k / split) + k_half) / rate
            products += 8 * split * m * n / bandwidth + split_s
            allowed = (tiles * split <= MAX_SPLIT_WAVES * multiprocessors) & (k >= 128 * split)
            best = np.where(allowed, np.minimum(best, products), best)
    moved = 2 * (m * n + n * k + m * k) / bandwidth
    return floor_s + (best**4 + moved**4) ** 0.25


def fit_attention(
    name: str, device: DeviceModel, table: pd.DataFrame, tile_rows: int
) -> tuple[dict[str, float], float]:
    """Parameters of the attention model and the median error of held-out rows."""
    is_causal = "num_key_value_heads" in table
    rows = table[table.num_heads == table.num_key_value_heads] if is_causal else table
    rows = rows[(rows.isl >= 64) & (rows.num_heads >= 2)]
    heads = (rows.batch_size * rows.num_heads).to_numpy(float)
    queries, head_dim = rows.isl.to_numpy(float), rows.head_dim.to_numpy(float)
    keys = queries / 2 if is_causal else queries
    seconds = rows.latency.to_numpy() * 1e-3
    training = np.random.default_rng(0).random(len(rows)) < 2 * TRAINING_SHARE

    def predicted(x: np.ndarray, at: np.ndarray) -> np.ndarray:
        moved = 2 * heads[at] * head_dim[at] * (2 * queries[at] + 2 * queries[at])
        return attention_seconds(
            np.exp(x), device, heads[at], queries[at], keys[at], head_dim[at], moved, tile_rows
        )

    low, high = ATTENTION_LOW.copy(), ATTENTION_HIGH.copy()
    if len(np.unique(head_dim)) == 1:  # one head dimension says nothing about its slope
        high[2] = low[2] + 1e-6
    x = robust(lambda x: np.log(predicted(x, training) / seconds[training]), ATTENTION_START, low, high)
    error = predicted(x, np.ones_like(training)) / seconds - 1
    report(f"{name:9} attention", error[~training], len(rows), training.sum())
    return dict(zip(ATTENTION_NAMES, np.exp(x), strict=True)), float(np.median(abs(error[~training])))


def attention_seconds(
    values: np.ndarray,
    device: DeviceModel,
    heads: np.ndarray,
    queries: np.ndarray,
    keys: np.ndarray,
    head_dim: np.ndarray,
    moved: np.ndarray,
    tile_rows: int,
) -> np.ndarray:
    """`AnalyticCompute` over arrays."""
    efficiency, kv_half, head_dim_half, memory_efficiency, floor_s = values
    multiprocessors = device.num_multiprocessors.value
    rate = device.peak_flops_per_s["bfloat16"].value * efficiency / multiprocessors
    rate = rate * head_dim / (head_dim + head_dim_half)
    waves = np.ceil(np.ceil(queries / tile_rows) * heads / multiprocessors)
    products = waves * tile_rows * 4 * head_dim * (keys + kv_half) / rate
    traffic = moved / (device.memory_bandwidth_bytes_per_s.value * memory_efficiency)
    return floor_s + (products**4 + traffic**4) ** 0.25


def robust(
    residuals: Callable[[np.ndarray], np.ndarray], start: np.ndarray, low: np.ndarray, high: np.ndarray
) -> np.ndarray:
    """Least squares that large residuals pull at only linearly (soft L1 beyond 10 %), inside bounds."""
    inside = np.clip(start, low + 1e-7, high - 1e-7)
    options = {"loss": "soft_l1", "f_scale": 0.1, "max_nfev": 60, "diff_step": 1e-3}
    return least_squares(residuals, inside, bounds=(low, high), **options).x


def report(title: str, error: np.ndarray, num_rows: int, num_training: int) -> None:
    """Print the errors of held-out rows."""
    median, tail, bias = np.median(abs(error)), np.quantile(abs(error), 0.9), np.median(error)
    print(
        f"{title} held out ({num_rows - num_training} of {num_rows} rows):"
        f" median {median:5.1%}, 9 in 10 within {tail:5.1%}, bias {bias:+5.1%}"
    )


def block_of(kind: str, values: dict[str, float], table: str, error: float) -> str:
    """One YAML mapping of figures."""
    source = f"aiconfigurator {table}, error {error:.1%}"
    lines = [f"      {kind}:\n"]
    for name, value in values.items():
        text = f"{value * 1e6:.4g} us" if name.endswith("_s") else f"{value:.4g}"
        lines.append(f'        {name}: {{value: {text}, tag: fitted, source: "{source}"}}\n')
    return "".join(lines)


def borrowed(block: str, other: str) -> str:
    """A block of a sibling device, marked as an assumption."""
    return re.sub(r'tag: fitted, source: ".*?"', f'tag: assumed, source: "as fitted to {other}"', block)


def write(name: str, block: str) -> None:
    """Replace the fitted block of a shipped hardware file, and check that the model agrees with itself."""
    path = Path(str(resources.files("distri.simulator") / "data" / "hardware" / f"{name}.yaml"))
    text, count = BLOCK.subn(lambda match: match.group(1) + block + match.group(2), path.read_text("utf-8"))
    if count != 1:
        raise SystemExit(f"{path} has no block '# begin fitted (benchmarks/fit_compute.py)'")
    path.write_text(text, "utf-8")
    device = load_cluster(name).model_of(0)
    values = np.array([getattr(device.compute.gemm, parameter).value for parameter in GEMM_NAMES])
    m, n, k = 1024, 1280, 5120
    shape = OperationShape(KernelKind.LINEAR, m, n, k, 1, 2 * (m * k + n * k), 2 * m * n, "bfloat16")
    array = gemm_seconds(values, device, *(np.array([float(x)]) for x in (m, n, k)))[0]
    gap_s = device.compute.kernel_gap_s.value
    assert abs((AnalyticCompute(device).cost(shape).device_s - gap_s) / array - 1) < 1e-9


if __name__ == "__main__":
    main()
