"""The command-line arguments of ``lmbridge serve``.

Rule: checks each value by itself; ``configuration`` checks how they fit together.
"""

from __future__ import annotations

import argparse

from lmbridge.cli import values
from lmbridge.cli.model import add_model_arguments


def add_arguments(parser: argparse.ArgumentParser) -> None:
    model = add_model_arguments(parser, default=None, note="(default: demo, unless --embed or --rerank is given)")
    model.add_argument(
        "--name", metavar="NAME", type=values.filled, help="the model's name for clients (default: from MODEL)"
    )
    _add_encoders(parser.add_argument_group("embeddings and reranking"))
    _add_address(parser.add_argument_group("the address"))
    _add_keys(parser.add_argument_group("who may use it"))
    _add_limits(parser.add_argument_group("limits"))
    _add_logs(parser.add_argument_group("page and logs"))


def _add_encoders(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--embed",
        metavar="MODEL",
        type=values.filled,
        help="an embedding model for /v1/embeddings: a folder or a Hugging Face id",
    )
    group.add_argument(
        "--rerank", metavar="MODEL", type=values.filled, help="a reranking model for /v1/rerank, /v2/rerank and /rerank"
    )
    group.add_argument(
        "--encoder-option",
        metavar="NAME=VALUE",
        type=values.option,
        action="append",
        default=[],
        help="an option of the engine of these two models, such as device=cpu; may be repeated",
    )


def _add_address(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--host", default="127.0.0.1", help="the address to listen on; 0.0.0.0 for all (default: 127.0.0.1)"
    )
    group.add_argument("--port", type=values.port, default=8000, help="0 picks a free port (default: 8000)")
    group.add_argument(
        "--allowed-host",
        metavar="HOST",
        type=values.host_name,
        action="append",
        default=[],
        help="a host name that clients may use for this server, besides localhost, that of --host and IP addresses; "
        ".example.org includes its subdomains, * allows any; may be repeated",
    )
    group.add_argument(
        "--cors-origin",
        metavar="ORIGIN",
        type=values.filled,
        action="append",
        default=[],
        help="allow browser requests from pages of this origin (default: only the server's own); may be repeated",
    )


def _add_keys(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--api-key",
        metavar="KEY",
        type=values.filled,
        action="append",
        default=[],
        help="require this key from clients (default: $LMBRIDGE_API_KEYS, else no key is required); may be repeated",
    )
    group.add_argument("--api-keys-file", metavar="FILE", help="a file with more keys, one per line")
    group.add_argument(
        "--admin-key",
        metavar="KEY",
        type=values.filled,
        help="enable POST /admin/swap with this key (default: $LMBRIDGE_ADMIN_KEY, else it is disabled)",
    )
    group.add_argument(
        "--allow-remote-code", action="store_true", help="let /admin/swap load models that run their own code"
    )


def _add_limits(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--threads",
        metavar="N",
        type=values.positive,
        default=512,
        help="most requests at once, waiting ones included (default: 512)",
    )
    group.add_argument(
        "--max-pending", metavar="N", type=values.positive, help="most requests waiting for a model (default: 1024)"
    )
    group.add_argument(
        "--max-pending-per-client",
        metavar="N",
        type=values.positive,
        help="most of them from one address, or with one API key (default: all)",
    )
    group.add_argument(
        "--timeout",
        metavar="SECONDS",
        type=values.more_than_zero,
        help="the timeout of a request (default: 600)",
    )
    group.add_argument(
        "--max-request-bytes", metavar="N", type=values.positive, help="the largest request body (default: 4194304)"
    )
    group.add_argument(
        "--heartbeat",
        metavar="SECONDS",
        type=values.more_than_zero,
        help="a silent stream sends a comment this often, to keep its connection open (default: 5)",
    )
    group.add_argument(
        "--drain-timeout",
        metavar="SECONDS",
        type=values.number,
        default=30.0,
        help="how long running answers may take to finish after a signal (default: 30)",
    )


def _add_logs(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--no-page", action="store_true", help="do not serve the web page at /")
    group.add_argument("--access-log", action="store_true", help="log each response to stderr, one line each")
    group.add_argument("--log-prompts", action="store_true", help="log clients' prompts to stderr")
