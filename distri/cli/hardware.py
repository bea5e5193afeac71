"""`distri hardware`: the machines that distri knows, what it knows of them and from where, and whether a file holds."""

from __future__ import annotations

from typing import Any

import click

from distri.cli.hardware_tables import describe_cluster, show_cluster
from distri.cli.options import json_option
from distri.cli.output import print_json
from distri.cli.render import console, scaled, table
from distri.config.hardware import list_hardware, load_cluster
from distri.errors import HardwareError


@click.group("hardware", context_settings={"help_option_names": ["-h", "--help"]})
def command() -> None:
    """Say what is known of machines: devices, links, collectives, each figure with its source.

    \b
    Examples:
      distri hardware list
      distri hardware show a100-sxm
      distri hardware validate my-cluster.yaml
    """


@command.command("list")
@json_option
def list_command(as_json: bool) -> None:
    """List the machines that ship with distri."""
    found = [(entry, load_cluster(entry.path)) for entry in list_hardware()]
    if as_json:
        print_json(
            {
                "hardware": [
                    {
                        "name": entry.name,
                        "title": cluster.title,
                        "aliases": list(entry.aliases),
                        "devices": cluster.num_ranks,
                        "hosts": cluster.num_hosts,
                    }
                    for entry, cluster in found
                ]
            }
        )
        return
    made = table("Hardware", "name", "devices", "hosts", "memory of a device", "title", "other names")
    for column in (4, 5):
        made.columns[column].justify = "left"
    for entry, cluster in found:
        memory = scaled(cluster.model_of(0).memory_bytes.value, "B")
        made.add_row(
            entry.name,
            str(cluster.num_ranks),
            str(cluster.num_hosts),
            memory,
            cluster.title,
            ", ".join(entry.aliases),
        )
    console().print(made)


@command.command("show")
@click.argument("name")
@click.option("--hosts", type=int, metavar="N", help="So many hosts in place of the file's own number.")
@json_option
def show_command(name: str, hosts: int | None, as_json: bool) -> None:
    """Print one machine, a shipped NAME or the path of a YAML file: every figure with its tag and source.

    \b
    Examples:
      distri hardware show rtx4090
      distri hardware show a100-sxm-2x8 --hosts 4 --json
    """
    cluster = load_cluster(name, hosts)
    if as_json:
        print_json(describe_cluster(cluster))
    else:
        show_cluster(cluster)


@command.command("validate")
@click.argument("names", nargs=-1, required=True, metavar="FILE...")
@json_option
def validate_command(names: tuple[str, ...], as_json: bool) -> None:
    """Read hardware files and refuse what is malformed or contradicts itself, by file, line and field.

    Exit status 2 if any file is refused.

    \b
    Examples:
      distri hardware validate my-cluster.yaml other.yaml
    """
    findings = [_finding(name) for name in names]
    if as_json:
        print_json({"files": findings})
    else:
        for finding in findings:
            click.echo(finding["error"] or f"{finding['file']} holds: {finding['summary']}")
    refused = sum(finding["error"] is not None for finding in findings)
    if refused:
        raise HardwareError(
            f"{refused} of {len(findings)} files refused" if len(findings) > 1 else _error_of(findings)
        )


def _finding(name: str) -> dict[str, Any]:
    try:
        cluster = load_cluster(name)
    except HardwareError as error:
        return {"file": name, "error": str(error), "summary": None}
    devices = "device" if cluster.num_ranks == 1 else "devices"
    hosts = "host" if cluster.num_hosts == 1 else "hosts"
    summary = f"{cluster.num_ranks} {devices} on {cluster.num_hosts} {hosts}, {len(cluster.links)} links"
    return {"file": name, "error": None, "summary": summary}


def _error_of(findings: list[dict[str, Any]]) -> str:
    (finding,) = findings
    return str(finding["error"])
