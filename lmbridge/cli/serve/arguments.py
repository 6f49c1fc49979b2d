"""The arguments of ``lmbridge serve``.

Rule: a value that can be judged alone is judged here.
"""

from __future__ import annotations

import argparse

from lmbridge.cli import values
from lmbridge.cli.model import add_model_arguments


def add_arguments(parser: argparse.ArgumentParser) -> None:
    model = add_model_arguments(parser, default=None, note="(default: demo, unless --embed or --rerank is given)")
    model.add_argument(
        "--name", metavar="NAME", type=values.filled, help="what clients call the model (default: as it is named here)"
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
        help="an embedding model for /v1/embeddings: a folder or a hub id",
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
        help="an option of the engine of these two, such as device=cpu; may be repeated",
    )


def _add_address(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--host", default="127.0.0.1", help="the address to listen on; 0.0.0.0 for every one (default: 127.0.0.1)"
    )
    group.add_argument("--port", type=values.port, default=8000, help="0 takes a free one (default: 8000)")
    group.add_argument(
        "--allowed-host",
        metavar="HOST",
        type=values.host_name,
        action="append",
        default=[],
        help="a name that clients may call this server by, besides localhost, HOST and IP addresses; .example.org "
        "includes its subdomains, * allows any; may be repeated",
    )
    group.add_argument(
        "--cors-origin",
        metavar="ORIGIN",
        type=values.filled,
        action="append",
        default=[],
        help="let pages of this origin ask from a browser (default: only the server's own); may be repeated",
    )


def _add_keys(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--api-key",
        metavar="KEY",
        type=values.filled,
        action="append",
        default=[],
        help="ask clients for this key (default: $LMBRIDGE_API_KEYS, else none is asked for); may be repeated",
    )
    group.add_argument("--api-keys-file", metavar="FILE", help="a file of more keys, one per line")
    group.add_argument(
        "--admin-key",
        metavar="KEY",
        type=values.filled,
        help="allow POST /admin/swap with this key (default: $LMBRIDGE_ADMIN_KEY, else nobody may)",
    )
    group.add_argument(
        "--allow-remote-code", action="store_true", help="let /admin/swap load models that bring code of their own"
    )


def _add_limits(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--threads",
        metavar="N",
        type=values.positive,
        default=512,
        help="requests at once, those that wait included (default: 512)",
    )
    group.add_argument(
        "--max-pending", metavar="N", type=values.positive, help="requests that may wait for a model (default: 1024)"
    )
    group.add_argument(
        "--max-pending-per-client",
        metavar="N",
        type=values.positive,
        help="how many of them may come from one address, or with one API key (default: all)",
    )
    group.add_argument(
        "--timeout",
        metavar="SECONDS",
        type=values.more_than_zero,
        help="the longest that a request may take (default: 600)",
    )
    group.add_argument(
        "--max-request-bytes", metavar="N", type=values.positive, help="the largest request body (default: 4194304)"
    )
    group.add_argument(
        "--heartbeat",
        metavar="SECONDS",
        type=values.more_than_zero,
        help="after this much silence a stream sends a comment (default: 5)",
    )
    group.add_argument(
        "--drain-timeout",
        metavar="SECONDS",
        type=values.number,
        default=30.0,
        help="on a signal, how long running answers may take to finish (default: 30)",
    )


def _add_logs(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--no-page", action="store_true", help="do not serve the page at /")
    group.add_argument("--access-log", action="store_true", help="log each response to stderr, a line each")
    group.add_argument("--log-prompts", action="store_true", help="log what clients ask, to stderr")
