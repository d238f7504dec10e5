"""``tpinv decode``: a fast server streams provisional tokens, an invariant one decides which are committed (inference/verified_elsewhere.py)."""

import argparse
import struct
import sys
from collections.abc import Sequence

from rich.console import Console

from tpinv.harness.outputs import check_outputs, write_json
from tpinv.inference import verified
from tpinv.inference.verified_elsewhere import Server, decisions_of, drafts_of


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--draft", required=True, metavar="URL", help="a server of vLLM's OpenAI API, of any kind and speed")
    parser.add_argument(
        "--verifier", required=True, metavar="URL", help="one that serves the same model with tpinv's plugin, at any TP size"
    )
    parser.add_argument("--prompt", action="append", default=[], metavar="TEXT", help="what to answer; several times for several requests")
    parser.add_argument("--prompt-ids", action="append", default=[], metavar="1,2,3", help="the same as token ids")
    parser.add_argument("--tokens", type=int, default=128, help="the most tokens of an answer (default 128)")
    parser.add_argument("--window", type=int, default=32, help="drafts between two verifications; no byte depends on it (default 32)")
    parser.add_argument("--temperature", type=float, default=0.0, help="0, the default, is greedy")
    parser.add_argument("--seed", type=int, default=0, help="of the first request; the others count on from it (default 0)")
    parser.add_argument("--top-k", type=int, default=0, help="default 0: all")
    parser.add_argument("--top-p", type=float, default=1.0, help="default 1: all")
    parser.add_argument("--stop-ids", default="", metavar="1,2,3", help="token ids that end an answer, such as the model's end of text")
    parser.add_argument(
        "--check", action="store_true", help="let the verifier answer alone too, and compare every token and log-probability"
    )
    parser.add_argument("--json", metavar="FILE", help="write requests, log-probabilities and counts")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """0, or with --check 1 where a byte differs."""
    check_outputs(arguments)
    if not arguments.prompt and not arguments.prompt_ids:
        raise ValueError("there is nothing to answer; give --prompt TEXT or --prompt-ids 1,2,3")
    if arguments.window < 1:
        raise ValueError(f"--window={arguments.window} must be at least 1")
    for option in ("draft", "verifier"):
        if not getattr(arguments, option).startswith(("http://", "https://")):
            raise ValueError(f"--{option} {getattr(arguments, option)} must be a server's address, such as http://localhost:8000")
    drafter, verifier = Server(arguments.draft), Server(arguments.verifier)
    prompts = [_ids("--prompt-ids", text) for text in arguments.prompt_ids] + [verifier.tokenize(text) for text in arguments.prompt]
    make = lambda: [_request(arguments, prompt, place) for place, prompt in enumerate(prompts)]  # noqa: E731
    requests, console = make(), Console(highlight=False)
    counts = verified.decode(requests, drafts_of(drafter), decisions_of(verifier), window=arguments.window, committed=_progress(requests))
    for place, request in enumerate(requests):
        text = verifier.detokenize(request.tokens) if arguments.prompt else " ".join(map(str, request.tokens))
        console.print(f"request {place}, {len(request.tokens)} tokens, {request.finished}:\n{text}", markup=False)
    share = counts.recomputed / counts.drafted if counts.drafted else 0.0
    console.print(
        f"{sum(len(request.tokens) for request in requests)} tokens in {counts.passes} passes; {counts.drafted} drafted, {counts.accepted} "
        f"kept, {counts.recomputed} recomputed ({share:.1%})"
    )
    differing = None
    if arguments.check:
        alone = make()
        verified.decode(alone, None, decisions_of(verifier))
        differing = sum(_bytes(a) != _bytes(b) for a, b in zip(requests, alone, strict=True))
        console.print(f"{differing} of {len(requests)} requests differ from the verifier alone, in tokens or log-probability bytes")
    if arguments.json:
        answers = [{"prompt": r.prompt, "tokens": r.tokens, "log_probs": r.log_probs, "finished": r.finished} for r in requests]
        write_json(arguments.json, {"window": arguments.window, "requests": answers, "counts": vars(counts), "differing": differing})
    return int(bool(differing))


def _request(arguments: argparse.Namespace, prompt: Sequence[int], place: int) -> verified.Request:
    stop = tuple((token,) for token in _ids("--stop-ids", arguments.stop_ids)) if arguments.stop_ids else ()
    return verified.Request(
        tuple(prompt), arguments.tokens, stop, arguments.temperature, arguments.seed + place, arguments.top_k, arguments.top_p
    )


def _ids(option: str, text: str) -> tuple[int, ...]:
    try:
        return tuple(int(token) for token in text.split(","))
    except ValueError:
        raise ValueError(f"{option} {text!r} is no list of token ids; write them as 1,2,3") from None


def _bytes(request: verified.Request) -> tuple[list[int], bytes]:
    return request.tokens, struct.pack(f"<{len(request.log_probs)}f", *request.log_probs)


def _progress(requests: Sequence[verified.Request]):
    def committed(request: verified.Request, count: int) -> None:
        if sys.stderr.isatty():
            print(f"\r{sum(len(r.tokens) for r in requests)} tokens committed", end="", file=sys.stderr, flush=True)

    return committed
