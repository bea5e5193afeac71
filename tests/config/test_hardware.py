import re
from importlib import resources
from pathlib import Path

import pytest

from distri.config.hardware import list_hardware, load_cluster, parse_cluster
from distri.config.marked_yaml import MAX_BYTES, parse_marked
from distri.config.quantity import Dimension, parse_quantity
from distri.errors import HardwareError, UserError
from distri.simulator.hardware import Cluster, Figure, Tag

SHIPPED = [entry.name for entry in list_hardware()]
A100 = (resources.files("distri.simulator") / "data" / "hardware" / "a100-sxm.yaml").read_text("utf-8")


def changed(old: str, new: str) -> str:
    """The A100 file with its first `old` replaced."""
    assert old in A100, old
    return A100.replace(old, new, 1)


def line_of(text: str, part: str) -> int:
    return text[: text.index(part)].count("\n") + 1


def refusal(text: str) -> str:
    with pytest.raises(HardwareError) as caught:
        parse_cluster(text, "mine.yaml")
    assert isinstance(caught.value, UserError)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def figures(value: object) -> list[Figure]:
    if isinstance(value, Figure):
        return [value]
    children = value.values() if isinstance(value, dict) else value if isinstance(value, tuple) else ()
    children = (
        vars(value).values() if hasattr(value, "__dict__") and not isinstance(value, type) else children
    )
    return [figure for child in children if not isinstance(child, str) for figure in figures(child)]


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_files_load_and_every_figure_has_a_source(name: str) -> None:
    cluster = load_cluster(name)
    assert cluster.name == name
    found = figures(cluster)
    assert len(found) > 20
    assert all(len(figure.source.split()) > 2 for figure in found)
    assert all(isinstance(figure.tag, Tag) for figure in found)


@pytest.mark.parametrize("entry", list_hardware(), ids=lambda entry: entry.name)
def test_aliases_and_paths_name_the_same_cluster(entry) -> None:
    cluster = load_cluster(entry.name)
    assert load_cluster(entry.path) == cluster
    for alias in entry.aliases:
        assert load_cluster(alias) == cluster
        assert load_cluster(alias.upper()) == cluster
    assert cluster.aliases == entry.aliases


def test_aliases_are_unique() -> None:
    names = [name for entry in list_hardware() for name in (entry.name, *entry.aliases)]
    assert len(names) == len(set(names))


def test_what_was_asked_for_is_shipped() -> None:
    wanted = ["a100-sxm4-80gb", "a100-pcie", "h100-sxm", "h200", "l40s", "rtx4090", "cpu-gloo"]
    ranks = {name: load_cluster(name).num_ranks for name in (*wanted, "a100-sxm-2x8", "a100-sxm-4x8")}
    assert ranks == {**dict.fromkeys(wanted, 8), "a100-sxm-2x8": 16, "a100-sxm-4x8": 32}
    assert not load_cluster("rtx4090").model_of(0).peer_to_peer


def test_more_hosts_can_be_asked_for() -> None:
    cluster = load_cluster("a100-sxm", num_hosts=8)
    assert cluster.num_ranks == 64
    assert cluster.devices[63].node == "host7/gpu7"
    assert cluster.devices == load_cluster("a100-sxm-8x8").devices


def test_hosts_without_a_network_are_refused() -> None:
    with pytest.raises(HardwareError, match="2 hosts need a 'network' that joins them"):
        load_cluster("a100-pcie", num_hosts=2)
    with pytest.raises(HardwareError, match="0 hosts were asked for"):
        load_cluster("a100-sxm", num_hosts=0)


def test_data_sheet_values_of_the_a100() -> None:
    device = load_cluster("a100-sxm").model_of(0)
    assert device.peak_flops_per_s["float16"] == Figure(
        312e12, Tag.DATA_SHEET, device.peak_flops_per_s["float16"].source
    )
    assert device.memory_bytes.value == 80e9
    assert device.memory_bandwidth_bytes_per_s.value == pytest.approx(2.039e12)


def test_an_unknown_name_lists_what_there_is() -> None:
    with pytest.raises(HardwareError, match="unknown hardware 'b300'; shipped are a100-pcie, a100-sxm"):
        load_cluster("b300")


def test_a_file_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(HardwareError, match="the file cannot be read"):
        load_cluster(tmp_path / "none.yaml")


def test_a_users_own_file_extends_a_shipped_one(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("version: 1\nname: mine\ntitle: mine\nextends: a100-sxm\nnum_hosts: 3\n")
    assert load_cluster(path).num_ranks == 24
    path.write_text("version: 1\nname: mine\ntitle: mine\nextends: mine.yaml\n")
    with pytest.raises(
        HardwareError, match=r"mine.yaml, line 4: extends: files extend each other in a circle"
    ):
        load_cluster(path)
    path.write_text("version: 1\nname: mine\ntitle: mine\nextends: ../a100.yaml\n")
    with pytest.raises(HardwareError, match="neither a shipped name nor a file in the same folder"):
        load_cluster(path)


REFUSALS = {
    "unknown device model": (
        'name: "gpu[0-7]", model: A100-SXM4-80GB',
        'name: "gpu[0-7]", model: B100',
        "host.devices[0].model: unknown device model 'B100'; device_models has: A100-SXM4-80GB",
    ),
    "unknown device in a link": (
        'between: ["gpu[0-7]", nvswitch]',
        'between: ["gpu[0-8]", nvswitch]',
        "host.links[0].between: unknown device or node 'gpu8'; list it before linking it",
    ),
    "negative bandwidth": (
        "{value: 300 GB/s,",
        "{value: -300 GB/s,",
        "host.links[0].bandwidth_bytes_per_s.value: -3e+11 is negative",
    ),
    "negative latency": (
        "latency_s: {value: 0.3 us,",
        "latency_s: {value: -0.3 us,",
        "host.links[0].latency_s.value: -3e-07 is negative",
    ),
    "missing bandwidth": (
        "bandwidth_bytes_per_s: {value: 300 GB/s, tag: data sheet, source: aic}",
        "duplex: full",
        "host.links[0].bandwidth_bytes_per_s: the field is missing",
    ),
    "bytes for bits": (
        "{value: 200 Gb/s,",
        "{value: 200 GB/s,",
        (
            "network.links[0].bandwidth_bytes_per_s.value: 200 GB/s is outside what infiniband links have"
            " (1 to 110 GB/s); was 200 Gb/s meant (25 GB/s)?"
        ),
    ),
    "bits for bytes": (
        "{value: 300 GB/s,",
        "{value: 300 Gb/s,",
        (
            "host.links[0].bandwidth_bytes_per_s.value: '300 Gb/s' is in bits per second, which is"
            " how networks are"
            " quoted; use GB/s"
        ),
    ),
    "memory in bits": (
        "memory_bytes: {value: 80 GB,",
        "memory_bytes: {value: 80 Gb,",
        (
            "device_models.A100-SXM4-80GB.memory_bytes.value: '80 Gb' has the unit 'Gb', but this"
            " field is in bytes;"
            " use one of MB, GB, TB, MiB, GiB, TiB"
        ),
    ),
    "memory without its unit": (
        "memory_bytes: {value: 80 GB,",
        "memory_bytes: {value: 80,",
        (
            "device_models.A100-SXM4-80GB.memory_bytes.value: 80 is outside the plausible range"
            " 6.4e+07 to 1e+14 of"
            " memory_bytes"
        ),
    ),
    "bandwidth without its unit": (
        "{value: 300 GB/s,",
        "{value: 300,",
        (
            "host.links[0].bandwidth_bytes_per_s.value: 300 B/s is outside what nvlink links have (20"
            " to 1000 GB/s);"
            " write the unit, such as '300 GB/s'"
        ),
    ),
    "a unit of time for a bandwidth": (
        "{value: 300 GB/s,",
        "{value: 300 us,",
        (
            "host.links[0].bandwidth_bytes_per_s.value: '300 us' has the unit 'us', but this field is"
            " a bandwidth;"
            " use one of MB/s, GB/s, TB/s or Mb/s, Gb/s (bits)"
        ),
    ),
    "not a number": (
        "{value: 300 GB/s,",
        "{value: fast,",
        "host.links[0].bandwidth_bytes_per_s.value: 'fast' is not a number with a unit, such as '300 GB/s'",
    ),
    "infinite": (
        "{value: 300 GB/s,",
        "{value: 1e999,",
        "host.links[0].bandwidth_bytes_per_s.value: inf is not a finite number",
    ),
    "duplicate names": (
        "{name: nvswitch, kind: nvswitch}",
        "{name: gpu3, kind: nvswitch}",
        "host.nodes[0].name: the name 'gpu3' is given twice; names are unique within a host",
    ),
    "duplicate links": (
        'between: ["nic[0-7]", "pcie[0,0,1,1,2,2,3,3]"]',
        'between: [nvswitch, "gpu[0-7]"]',
        "host.links[2].between: nvswitch and gpu0 are linked twice; give one link with the total bandwidth",
    ),
    "a link to itself": (
        "between: [root0, root1]",
        "between: [root0, root0]",
        "host.links[4].between: 'root0' is linked to itself",
    ),
    "ends that do not match": (
        'between: ["gpu[0-7]", "pcie[0,0,1,1,2,2,3,3]"]',
        'between: ["gpu[0-7]", "pcie[0,1]"]',
        (
            "host.links[1].between: 'gpu[0-7]' names 8 nodes and 'pcie[0,1]' names 2; give as many at"
            " both ends, or"
            " one at one end"
        ),
    ),
    "a malformed range": (
        '{name: "gpu[0-7]", model',
        '{name: "gpu[7-0]", model',
        "host.devices[0].name: 'gpu[7-0]' has the malformed range '7-0'; write it as 0-7 or 0,0,1,1",
    ),
    "unknown key": ("num_hosts: 1", "hosts: 1", "hosts: unknown key"),
    "unknown nested key": ("peer_to_peer: true", "peer_to_peer: true\n    colour: 3", None),
    "unknown kind": (
        "      kind: nvlink",
        "      kind: nvlnk",
        (
            "host.links[0].kind: 'nvlnk' is none of 'nvlink', 'pcie', 'socket', 'memory',"
            " 'infiniband', 'ethernet'"
            " or 'virtual'"
        ),
    ),
    "missing source": (
        "{value: 300 GB/s, tag: data sheet, source: aic}",
        "{value: 300 GB/s, tag: data sheet}",
        "host.links[0].bandwidth_bytes_per_s.source: the field is missing",
    ),
    "unlisted source": (
        "{value: 300 GB/s, tag: data sheet, source: aic}",
        "{value: 300 GB/s, tag: data sheet, source: hearsay}",
        "host.links[0].bandwidth_bytes_per_s.source: the source 'hearsay' is not listed under 'sources'",
    ),
    "a figure without provenance": (
        "{value: 300 GB/s, tag: data sheet, source: aic}",
        "300 GB/s",
        None,
    ),
    "duplicate key": ("num_hosts: 1", "num_hosts: 1\nnum_hosts: 1", None),
    "another version": (
        "version: 1",
        "version: 2",
        "version: this distri reads version 1 of hardware files; got 2",
    ),
    "an implausible efficiency": (
        "floor_s: {value: 3 us,",
        "floor_s: {value: 3 s,",
        (
            "device_models.A100-SXM4-80GB.compute.streaming.floor_s.value: 3 is outside the plausible"
            " range 0 to"
            " 0.01 of floor_s"
        ),
    ),
}


@pytest.mark.parametrize("case", list(REFUSALS))
def test_a_malformed_file_is_refused_by_line_and_field(case: str) -> None:
    old, new, sentence = REFUSALS[case]
    text = changed(old, new)
    message = refusal(text)
    if sentence is not None:
        assert message.split(": ", 1)[1] == sentence
    line = int(re.match(r"mine.yaml, line (\d+): ", message).group(1))
    place = line_of(text, new)
    assert place - 2 <= line <= place + 3  # a missing field is reported where its mapping begins


def test_disconnected_ranks_are_refused() -> None:
    text = changed('between: ["gpu[0-7]", nvswitch]', 'between: ["gpu[0-6]", nvswitch]')
    text = text.replace('["gpu[0-7]", "pcie[0,0,1,1,2,2,3,3]"]', '["gpu[0-6]", "pcie[0,0,1,1,2,2,3]"]', 1)
    message = refusal(text)
    assert message.endswith(
        "host.links: rank 7 (host0/gpu7) is disconnected from rank 0: add a link or a switch that joins them"
    )
    assert message.startswith(f"mine.yaml, line {line_of(text, 'between: ')}: ")


def test_devices_without_peer_to_peer_need_host_memory() -> None:
    text = (resources.files("distri.simulator") / "data" / "hardware" / "rtx4090.yaml").read_text("utf-8")
    cut = text.replace('between: ["root[0-1]", "memory[0-1]"]', 'between: ["root[0,0]", "memory[0-1]"]')
    cut = cut.replace("between: [root0, root1]", "between: [root0, gpu7]")
    assert "it has no peer-to-peer access and no link to a host_memory" in refusal(cut)


def test_hostile_yaml_is_bounded() -> None:
    assert "nested deeper than 16 levels" in refusal("a: " + "[" * 5000 + "]" * 5000)
    assert "anchors and aliases" in refusal("a: &x [1]\nb: *x\n")
    assert "is not valid YAML" in refusal("a: [1\nb: 2\n")
    assert "is a mapping of keys to values" in refusal("just text")
    assert "a key must be a plain word" in refusal("? [a, b]\n: 1\n")
    assert "one YAML document" in refusal("a: 1\n---\nb: 2\n")
    assert "more than 20000 values" in refusal("a: [" + "1," * 21000 + "]")


def test_a_huge_file_is_refused_before_it_is_parsed(tmp_path: Path) -> None:
    path = tmp_path / "huge.yaml"
    path.write_bytes(b"#" * (MAX_BYTES + 1))
    with pytest.raises(HardwareError, match="larger than 256 KiB"):
        load_cluster(path)


def test_huge_counts_are_refused() -> None:
    assert "counts past 1024" in refusal(changed('{name: "gpu[0-7]", model', '{name: "gpu[0-99999]", model'))
    assert "more than 1024 devices in all" in refusal(changed("num_hosts: 1", "num_hosts: 4000"))


def test_marked_values_know_their_lines() -> None:
    marked = parse_marked("a: 1\nb:\n  - {c: 2.5e3, d: '7'}\n  - true\n", "f")
    assert marked.value == {"a": 1, "b": [{"c": 2500.0, "d": "7"}, True]}
    assert marked.where(("b", 0, "c")) == ("f", 3)
    assert marked.where(("b", 1)) == ("f", 4)
    assert marked.where(("b", 0, "nothing")) == ("f", 3)


@pytest.mark.parametrize(
    ("text", "dimension", "value"),
    [
        ("300 GB/s", Dimension.BYTES_PER_S, 300e9),
        ("200Gb/s", Dimension.BYTES_PER_S, 25e9),
        ("200 Gbit/s", Dimension.BYTES_PER_S, 25e9),
        ("80 GiB", Dimension.BYTES, 80 * 2**30),
        ("312 TFLOP/s", Dimension.FLOPS_PER_S, 312e12),
        ("25 us", Dimension.SECONDS, 25e-6),
        ("2.039e12", Dimension.BYTES_PER_S, 2.039e12),
    ],
)
def test_quantities_are_in_si_units(text: str, dimension: Dimension, value: float) -> None:
    assert parse_quantity(text, dimension) == pytest.approx(value)


def test_a_cluster_is_a_value() -> None:
    first, second = load_cluster("a100-sxm-2x8"), load_cluster("a100-sxm-2x8")
    assert first == second
    assert isinstance(first, Cluster)
    with pytest.raises(AttributeError):
        first.name = "other"
