"""Fit `t = a + c sqrt(S) + f S / B` to measured tables of collectives, and write the rows into hardware
files.

    python benchmarks/fit_collectives.py --tables DIR [--write]

DIR holds nccl-tests tables as parquet, as NVIDIA aiconfigurator publishes them (Apache-2.0): columns op_name,
num_gpus, message_size (elements), nccl_dtype, version, latency (ms). Rows of 16-bit data of one library
version are fitted to (least squares of the relative error, coefficients not negative); the 8-bit rows, and
those of the other table of the same machine where there is one, are held out. Prints the errors of both.
"""

from __future__ import annotations

import argparse
import re
from importlib import resources
from pathlib import Path

import numpy as np
import pandas as pd
from scipy.optimize import nnls

from distri.simulator.collective import bus_factor
from distri.simulator.hardware import Collective

TABLES = {
    "a100-sxm": ("nccl_a100_sxm_comm_nccl_2.27.3", "nccl_a100_sxm_comm_nccl_2.27.3"),
    "h100-sxm": ("nccl_h100_sxm_comm_nccl_2.29.2", "nccl_h100_sxm_comm_nccl_2.27.3"),
    "h200": ("nccl_h200_sxm_comm_nccl_2.29.2", "nccl_h200_sxm_comm_nccl_2.26.2"),
    "l40s": ("nccl_l40s_comm_nccl_2.27.3", "nccl_l40s_comm_nccl_2.27.3"),
}
"""Hardware file: (table fitted to, table held out)."""
OPERATIONS = {
    "all_gather": Collective.ALL_GATHER,
    "all_reduce": Collective.ALL_REDUCE,
    "alltoall": Collective.ALL_TO_ALL,
    "reduce_scatter": Collective.REDUCE_SCATTER,
}
ELEMENT_BYTES = {"half": 2, "int8": 1}
BLOCK = re.compile(r"(  # begin fitted \(benchmarks/fit_collectives\.py\)\n).*?(  # end fitted\n)", re.DOTALL)


def main() -> None:
    """Fit every machine that has a table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tables", type=Path, required=True, help="folder of the parquet tables")
    parser.add_argument("--write", action="store_true", help="write the rows into the hardware files")
    arguments = parser.parse_args()
    for name, (fitted, held_out) in TABLES.items():
        training, test = read(arguments.tables, fitted, "half"), read(arguments.tables, held_out, "int8")
        rows = fit_machine(name, training, test)
        if arguments.write:
            write(name, rows, f"{fitted}.parquet, 16-bit rows")


def read(folder: Path, table: str, dtype: str) -> pd.DataFrame:
    """One table's rows of a dtype, with bytes and seconds."""
    frame = pd.read_parquet(folder / f"{table}.parquet")
    frame = frame[frame.nccl_dtype == dtype]
    return frame.assign(num_bytes=frame.message_size * ELEMENT_BYTES[dtype], seconds=frame.latency * 1e-3)


def fit_machine(name: str, fitted: pd.DataFrame, held_out: pd.DataFrame) -> list[str]:
    """One line of YAML for each collective and size of group; prints errors in and out of sample."""
    lines = []
    for (operation, num_ranks), group in fitted.groupby(["op_name", "num_gpus"]):
        collective = OPERATIONS[operation]
        factor = bus_factor(collective, num_ranks)
        coefficients = fit(group.num_bytes.to_numpy(float), group.seconds.to_numpy(), factor)
        error = errors(coefficients, factor, group)
        others = held_out[(held_out.op_name == operation) & (held_out.num_gpus == num_ranks)]
        held = errors(coefficients, factor, others)
        print(
            f"{name:9} {collective:15} n={num_ranks}  error mean {error.mean():5.1%} max {error.max():5.1%}"
            f"   held out mean {held.mean():5.1%} max {held.max():5.1%}"
        )
        fixed_s, root, per_byte = coefficients
        lines.append(
            f"    - {{collective: {collective}, num_ranks: {num_ranks}, fixed_s: {fixed_s * 1e6:.3f} us,"
            f" seconds_per_root_byte: {root:.4e},\n"
            f"       bandwidth_bytes_per_s: {1e-9 / per_byte:.3f} GB/s, mean_error: {error.mean():.3f}}}\n"
        )
    return lines


def fit(num_bytes: np.ndarray, seconds: np.ndarray, factor: float) -> tuple[float, float, float]:
    """(a in s, c in s per root byte, 1/B in s per byte), least squares of the relative error."""
    columns = [np.ones_like(num_bytes), np.sqrt(num_bytes), factor * num_bytes]
    terms = np.stack(columns, axis=1) / seconds[:, None]
    scale = terms.max(axis=0)
    solution, _ = nnls(terms / scale, np.ones_like(seconds))
    fixed_s, root, per_byte = solution / scale
    return float(fixed_s), float(root), float(per_byte)


def errors(coefficients: tuple[float, float, float], factor: float, frame: pd.DataFrame) -> np.ndarray:
    """|predicted / measured - 1| of every row."""
    fixed_s, root, per_byte = coefficients
    predicted = fixed_s + root * np.sqrt(frame.num_bytes) + per_byte * factor * frame.num_bytes
    return np.abs(predicted / frame.seconds - 1).to_numpy()


def write(name: str, rows: list[str], table: str) -> None:
    """Replace the fitted block of a shipped hardware file."""
    path = Path(str(resources.files("distri.simulator") / "data" / "hardware" / f"{name}.yaml"))
    source = f'"least squares on nccl-tests times collected by NVIDIA aiconfigurator,\n    {table}"'
    block = f"  fits_tag: fitted\n  fits_source: {source}\n  fits:\n{''.join(rows)}"
    text, count = BLOCK.subn(lambda match: match.group(1) + block + match.group(2), path.read_text("utf-8"))
    if count != 1:
        raise SystemExit(f"{path} has no block '# begin fitted (benchmarks/fit_collectives.py)'")
    path.write_text(text, "utf-8")


if __name__ == "__main__":
    main()
