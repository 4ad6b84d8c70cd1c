"""Live video from several engines behind one address, on this machine or on a Ray cluster.

python examples/ray_serve.py --replicas 2 --port 8000        # then open http://127.0.0.1:8000
"""

from __future__ import annotations

import argparse
import logging
import os
import signal
import sys
import threading
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

from asd_rt.engines import best_engine
from asd_rt.errors import AsdError, BackendError
from asd_rt.machine import usable_cores
from asd_rt.manifest import read_manifest
from asd_rt.serve.access import TOKEN_VARIABLE, access_of

EXAMPLES = """examples:
  python examples/ray_serve.py --replicas 2 --port 8000
  python examples/ray_serve.py --address auto --replicas 8 --gpus 1     # on a cluster that runs already
  ASD_RT_TOKEN=... python examples/ray_serve.py --host 0.0.0.0

Each replica has an engine and sessions of its own. Clients stay with their replica; when one dies, only its
sessions end. docs/serve.md says how to kill one and watch. Ctrl-C stops them.
"""
OBJECT_STORE_BYTES = 128 << 20  # frames do not go through it


def make_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        description="Serve live video from several engines by Ray Serve.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--replicas", type=int, default=2, metavar="N", help="default: 2")
    parser.add_argument("--engine", type=Path, help="engine file (default: the best one here)")
    parser.add_argument("--host", default="127.0.0.1", metavar="ADDRESS")
    parser.add_argument("--port", type=int, default=8000, metavar="N")
    parser.add_argument(
        "--sessions", type=int, metavar="N", help="live videos of a replica (default: by memory)"
    )
    parser.add_argument(
        "--threads", type=int, metavar="N", help="of a replica (default: its share of the cores)"
    )
    parser.add_argument(
        "--gpus", type=float, default=0.0, metavar="N", help="cards of a replica (default: 0)"
    )
    parser.add_argument(
        "--address", metavar="ADDRESS", help="of a Ray cluster (default: a new one on this machine)"
    )
    return parser


def serve(args: argparse.Namespace) -> None:
    """Start the replicas, and wait for a signal.

    Raises:
        AsdError: anything the user can mend.
    """
    if find_spec("ray") is None:
        raise BackendError(
            "Ray cannot be imported; install it: pip install 'asd-rt[cpu,serve,ray]'"
        )
    if args.replicas < 1:
        raise BackendError(f"--replicas must be at least 1, found {args.replicas}")
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # it tells nobody
    import ray

    from asd_rt.serve import replicas
    from asd_rt.serve.pool import plan_pool

    access = access_of(args.host, os.environ.get(TOKEN_VARIABLE) or None, [])
    engine = (args.engine or best_engine()).resolve()
    plan_pool(engine, read_manifest(engine), args.sessions, None)  # before Ray tells it in its way
    proxies = {replicas.CALLBACK_VARIABLE: replicas.CALLBACK}
    os.environ |= proxies  # of a cluster that begins here
    local = {"object_store_memory": OBJECT_STORE_BYTES}
    elsewhere = {"runtime_env": {"env_vars": proxies}}
    try:
        ray.init(
            args.address,
            include_dashboard=False,
            log_to_driver=False,
            logging_level=logging.ERROR,
            **(elsewhere if args.address else local),
        )
    except (ConnectionError, ValueError) as error:
        raise BackendError(
            f"--address {args.address}: there is no Ray cluster ({first_line(error)}); start one with ray "
            "start --head, or leave --address out"
        ) from error
    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    try:
        replica = replicas.Replica(
            engine,
            access,
            sessions=args.sessions,
            threads=threads_of(args),
        )
        cpus = min(1.0, usable_cores() / args.replicas)
        try:
            replicas.start(replica, args.replicas, args.host, args.port, cpus, args.gpus)
        except RuntimeError as error:
            raise BackendError(
                f"Ray could not start the replicas ({first_line(error)}); Ray's logs say why: "
                "/tmp/ray/session_latest/logs/serve"
            ) from error
        print(f"http://{args.host}:{args.port}  {engine}, {args.replicas} replicas", flush=True)
        wait_for_signal()
    finally:
        replicas.stop()
        ray.shutdown()


def threads_of(args: argparse.Namespace) -> int | None:
    """CPU threads of a replica: those asked for, else its share of this machine where that is what it has.

    On a card there are none to ask for, and machines of a cluster count their own cores.
    """
    if args.threads or args.gpus or args.address:
        threads: int | None = args.threads
        return threads
    return max(1, usable_cores() // args.replicas)


def first_line(error: Exception) -> str:
    """What an error says in its first line."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def wait_for_signal() -> None:
    """Until Ctrl-C or SIGTERM."""
    asked = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: asked.set())
    asked.wait()


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code."""
    args = make_parser().parse_args(argv)
    try:
        serve(args)
    except AsdError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
