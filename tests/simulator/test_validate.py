import json
from pathlib import Path

import pytest

from distri.errors import UserError
from distri.simulator.calibrate import calibrate, used_keys, with_values, write_record, write_values
from distri.simulator.published import Quantity, read_rows, shipped_rows
from distri.simulator.validate import Validation, validate
from tests.simulator.helpers import cluster_of, graph_of


@pytest.fixture(scope="module")
def validation() -> Validation:
    return validate(read_rows(shipped_rows()), graph_of("sdxl"), cluster_of(), used_keys())


def test_predictions_are_within_five_percent_on_average_and_twelve_at_worst(validation: Validation) -> None:
    assert validation.mean_absolute_error <= 0.05
    assert validation.worst <= 0.12
    assert max(abs(row.error) for row in validation.rows) <= 0.12


def test_at_most_four_rows_were_used(validation: Validation) -> None:
    used = [row for row in validation.rows if row.is_used]
    assert 1 <= len(used) <= 4
    assert len(used) == len(used_keys())
    assert all(row.row.quantity is Quantity.LATENCY for row in used)
    assert len(validation.rows) == 14


def test_the_table_names_every_case(validation: Validation) -> None:
    table = validation.table()
    assert table.count("| used |") == len(used_keys())
    assert "3840x3840, 50 steps, 8 GPUs, displaced" in table
    assert "mean absolute error" in table


def test_calibration_finds_what_it_is_given(tmp_path: Path) -> None:
    rows = [row for row in read_rows(shipped_rows()) if row.gpus == 1]
    found = calibrate(rows, graph_of("sdxl"), cluster_of(), ("compute.convolution_efficiency",))
    assert 0.3 < found.values["compute.convolution_efficiency"] < 1
    assert all(abs(residual.error) < 0.05 for residual in found.residuals)
    record = tmp_path / "calibration.json"
    write_record(found, record)
    assert used_keys(record) == tuple(row.key for row in rows)
    assert "calibrated on 2 points" in found.source


def test_fitted_values_are_written_with_their_source(tmp_path: Path) -> None:
    from distri.config.hardware import list_hardware, load_cluster

    shipped = next(entry.path for entry in list_hardware() if entry.name == "a100-sxm")
    copy = tmp_path / "mine.yaml"
    copy.write_text(shipped.read_text(encoding="utf-8"), encoding="utf-8")
    rows = [row for row in read_rows(shipped_rows()) if row.gpus == 1]
    found = calibrate(rows, graph_of("sdxl"), cluster_of(), ("compute.kernel_gap_s",))
    write_values(found, copy)
    figure = load_cluster(copy).model_of(0).compute.kernel_gap_s
    assert figure.value == pytest.approx(found.values["compute.kernel_gap_s"], rel=1e-3)
    assert figure.tag.value == "fitted"


def test_impossible_calibrations_are_refused_in_a_sentence() -> None:
    rows = read_rows(shipped_rows())
    with pytest.raises(UserError, match="calibration takes 1 to 4 points, not 14"):
        calibrate(rows, graph_of("sdxl"), cluster_of())
    with pytest.raises(UserError, match="2 parameters cannot be fitted to 1 points"):
        calibrate(rows[:1], graph_of("sdxl"), cluster_of())
    with pytest.raises(UserError, match=r"unknown parameter 'compute\.luck'"):
        with_values(cluster_of(), {"compute.luck": 1.0})


def test_malformed_files_are_refused_in_a_sentence(tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    with pytest.raises(UserError, match="cannot be read"):
        read_rows(path)
    path.write_text("{", encoding="utf-8")
    with pytest.raises(UserError, match="not JSON"):
        read_rows(path)
    path.write_text(json.dumps({"latency_seconds": [{"height": 1}]}), encoding="utf-8")
    with pytest.raises(UserError, match="malformed row"):
        read_rows(path)
    path.write_text("{}", encoding="utf-8")
    with pytest.raises(UserError, match="no rows"):
        read_rows(path)


def test_other_rows_of_the_same_kind_are_read(tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    row = {
        "height": 2048,
        "width": 2048,
        "steps": 20,
        "gpus": 8,
        "method": "displaced",
        "cfg_split": True,
        "value": 2,
    }
    path.write_text(json.dumps({"latency_seconds": [row]}), encoding="utf-8")
    found = read_rows(path)
    assert found[0].cfg_split is True
    assert validate(found, graph_of("sdxl"), cluster_of()).rows[0].predicted > 0
