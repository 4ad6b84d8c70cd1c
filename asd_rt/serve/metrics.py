"""What the server counts, for Prometheus."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from asd_rt.machine import resident_memory_bytes

# Seconds: 1 ms to 4 s, each bound twice the last but for those around 24 and 30 blocks a second.
BLOCK_BOUNDS = (0.001, 0.002, 0.004, 0.008, 0.016, 0.033, 0.042, 0.063, 0.125, 0.25, 0.5, 1, 2, 4)


class Metrics:
    """All counters of one server; prometheus_client's are safe to use from any thread."""

    def __init__(self, places: int, place_bytes: int) -> None:
        """Metrics of a server that has `places` for live videos, of `place_bytes` each."""
        registry = CollectorRegistry()
        self._registry = registry
        self.block_seconds = Histogram(
            "asd_rt_block_seconds",
            "Time of a block: passes and decoding",
            ["kind"],
            buckets=BLOCK_BOUNDS,
            registry=registry,
        )
        self.missed = Counter(
            "asd_rt_deadline_missed",
            "Blocks that took longer than their deadline",
            registry=registry,
        )
        self.late = Counter(
            "asd_rt_late_blocks", "Live blocks that began a whole block late", registry=registry
        )
        self.sent = Counter("asd_rt_sent_frames", "Frames sent to watchers", registry=registry)
        self.dropped = Counter(
            "asd_rt_dropped_frames", "Frames left out for slow watchers", registry=registry
        )
        self.sessions = Gauge("asd_rt_sessions", "Live videos", registry=registry)
        self.lost = Gauge(
            "asd_rt_lost_sessions", "Live videos whose connection is lost", registry=registry
        )
        self.sockets = Gauge("asd_rt_sockets", "Open WebSockets", registry=registry)
        self.refused = Counter(
            "asd_rt_refused", "What was refused, by reason", ["reason"], registry=registry
        )
        self.clips = Counter("asd_rt_clips", "Clips, by how they ended", ["end"], registry=registry)
        Gauge("asd_rt_sessions_limit", "Places for live videos", registry=registry).set(places)
        Gauge("asd_rt_session_bytes", "Planned memory of a place", registry=registry).set(
            place_bytes
        )
        memory = Gauge("asd_rt_resident_bytes", "Resident memory", registry=registry)
        memory.set_function(resident_memory_bytes)

    def text(self) -> bytes:
        """The metrics in Prometheus' text format."""
        return generate_latest(self._registry)
