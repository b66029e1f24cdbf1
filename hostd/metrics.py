"""The metrics role: Prometheus on loopback, from the vault's counters and nothing else.

It holds no key and sees no request. Each scrape asks the vault anew; if the vault does not answer,
`hostd_up` is 0 and every other series is missing, so that stale monitoring looks bad, not green.
"""

from __future__ import annotations

import socket
import time
from typing import TYPE_CHECKING, Final
from wsgiref.simple_server import WSGIRequestHandler, make_server

from prometheus_client import CollectorRegistry
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.exposition import make_wsgi_app

import hostd
from hostd.ipc import counting
from hostd.ipc.channel import Channel, ChannelError, peer_of
from hostd.platform import confine, notify

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from prometheus_client.core import Metric

    from hostd.config import Config

SCRAPE_S: Final = 2.0
HELP: Final[dict[str, str]] = {
    "hostd_batch_requests": "Requests executed under one pass and one quote",
    "hostd_batch_seconds": "From execution to release of a batch",
    "hostd_channels": "Callers connected",
    "hostd_component_age_seconds": "Since the start of the oldest latest reading of this kind of component",
    "hostd_component_good": "1 if the latest readings of this kind of component are acceptable",
    "hostd_drifted_components": "Components that have drifted and that no officer has cleared",
    "hostd_findings_total": "Findings by component, code and severity",
    "hostd_gate_open": "1 if the gate is open to callers of this host",
    "hostd_hypervisors": "Hypervisor processes measured",
    "hostd_keys": "Keys by state",
    "hostd_keys_unlocked": "1 if the root key is in memory",
    "hostd_ledger_bytes": "Size of the ledger",
    "hostd_ledger_entries": "Entries in the ledger",
    "hostd_component_good_age_seconds": "Since the start of the last good reading, of the kind's oldest",
    "hostd_hints_total": "Hints of the measurer by kind of component",
    "hostd_random_readings_total": "Readings at random moments, by kind of component",
    "hostd_measurer_lost_total": "Times the measurer's connection was lost",
    "hostd_reactions_failed": "Reactions to open drifts that failed and are tried again",
    "hostd_reactions_total": "Steps that followed drift, by step and outcome",
    "hostd_reading_seconds": "Duration of a reading, by kind of component",
    "hostd_readings_total": "Readings by kind of component and status",
    "hostd_requests_total": "Gated requests by operation and outcome",
    "hostd_tpm_errors_total": "TPM commands that failed, by kind",
    "hostd_tpm_quote_seconds": "Duration of a quote, queueing included",
    "hostd_tpm_read_seconds": "Duration of reading the PCRs for a batch (gate.tpm = read), queueing included",
    "hostd_waiting_requests": "Requests waiting at the gate",
    "hostd_withheld_total": "Answers withheld after the second look",
}


def ask_vault(path: Path, uid: int) -> counting.Snapshot | None:
    """One snapshot; None if the vault does not answer in time or is somebody else."""
    deadline = time.monotonic() + SCRAPE_S
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
        sock.settimeout(SCRAPE_S)
        try:
            sock.connect(str(path))
            if peer_of(sock).uid != uid:
                return None
            channel: Channel[counting.Snapshot] = Channel(sock, counting.Snapshot)
            channel.send(counting.Scrape())
            while time.monotonic() < deadline:
                sock.settimeout(max(0.01, deadline - time.monotonic()))
                snapshots = channel.receive()
                if snapshots:
                    return snapshots[0]
        except (OSError, ChannelError):
            return None
    return None


class Collector:
    """Turns a snapshot into Prometheus metric families."""

    def __init__(self, path: Path, vault_uid: int) -> None:
        self._path = path
        self._uid = vault_uid

    def collect(self) -> Iterator[Metric]:
        snapshot = ask_vault(self._path, self._uid)
        up = GaugeMetricFamily("hostd_up", "1 if the vault answered this scrape")
        up.add_metric([], float(snapshot is not None))
        yield up
        info = GaugeMetricFamily("hostd_build_info", "Version of hostd", labels=["version"])
        info.add_metric([hostd.__version__], 1)
        yield info
        if snapshot is None:
            return
        families: dict[str, CounterMetricFamily | GaugeMetricFamily] = {}
        histograms: dict[str, HistogramMetricFamily] = {}
        for cls, samples in ((CounterMetricFamily, snapshot.counters), (GaugeMetricFamily, snapshot.gauges)):
            for sample in samples:
                family = families.get(sample.name)
                if family is None:
                    labels = [name for name, _ in sample.labels]
                    family = families[sample.name] = cls(sample.name, HELP[sample.name], labels=labels)
                family.add_metric([value for _, value in sample.labels], sample.value)
        for histogram in snapshot.histograms:
            name = histogram.name
            if name not in histograms:
                labels = [label for label, _ in histogram.labels]
                histograms[name] = HistogramMetricFamily(name, HELP[name], labels=labels)
            histograms[name].add_metric(
                [value for _, value in histogram.labels], list(_buckets(histogram)), histogram.total
            )
        yield from families.values()
        yield from histograms.values()


def _buckets(histogram: counting.Histogram) -> Iterator[tuple[str, float]]:
    """Cumulative, as Prometheus wants them."""
    so_far = 0
    for bound, count in zip((*histogram.bounds, float("inf")), histogram.counts, strict=True):
        so_far += count
        yield ("+Inf" if bound == float("inf") else str(bound)), float(so_far)


class _Quiet(WSGIRequestHandler):
    timeout = 5

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002
        return


def run(config: Config) -> None:
    """Serves `/metrics` until it is ended."""
    confine.undumpable()
    registry = CollectorRegistry(auto_describe=False)
    registry.register(Collector(config.run / "metrics.sock", config.uid_of("vault")))
    server = make_server(
        config.metrics.address, config.metrics.port, make_wsgi_app(registry), handler_class=_Quiet
    )
    if config.metrics.port == 0:
        # Only for tests and demonstrations, which want any free port.
        (config.run / "metrics.port").write_text(f"{server.server_port}\n")
    notify.notify(notify.READY)
    server.serve_forever()
