"""Verified decoding over two engines: what a decider commits, over its functions and over HTTP, and ``tpinv decode``."""

import http.server
import json
import threading

import pytest
import torch

from tpinv import ReductionTree
from tpinv.cli import main
from tpinv.inference import log_softmax, verified
from tpinv.inference.verified import Request
from tpinv.inference.verified_elsewhere import Completion, Job, Server, decisions_of, decisions_of_model, drafts_of

VOCABULARY, TREE = 40, ReductionTree(8)


class FakeEngine:
    """An engine whose logits are a function of the sequence. ``noise``: another engine, of the same model as one might say. ``ties``: two
    tokens are often equally likely."""

    def __init__(self, noise: float = 0.0, ties: bool = False):
        self.noise, self.ties, self.jobs, self.known = noise, ties, [], {}

    def logits(self, sequence) -> torch.Tensor:
        key = (*sequence[-3:], len(sequence))
        if key not in self.known:
            self.known[key] = self._logits(sequence)
        return self.known[key]

    def _logits(self, sequence) -> torch.Tensor:
        place = hash((*sequence[-3:], len(sequence)))
        row = torch.randn(VOCABULARY, generator=torch.Generator().manual_seed(place % 2**31)) * 2
        row = row + torch.randn(VOCABULARY, generator=torch.Generator().manual_seed(len(sequence) + 1)) * self.noise
        if self.ties and place % 3 == 0:
            row[[place % VOCABULARY, (place + 7) % VOCABULARY]] = row.max() + 1
        return row.bfloat16()

    def complete(self, jobs):
        return [self._complete(job) for job in jobs]

    def _complete(self, job: Job) -> Completion:
        self.jobs.append(job)
        request = Request(job.prompt, job.tokens, (), job.temperature, job.seed, job.top_k, job.top_p)
        while not request.finished:
            first = len(request.context) - 1
            request.commit(*verified.own_tokens(self.logits(request.context).unsqueeze(0), request, first, TREE))
        scored = ()
        if job.scored:
            scored = ({}, *(self._scored(job.prompt[:i], job.prompt[i]) for i in range(1, len(job.prompt))))
        return Completion(tuple(request.tokens), tuple(request.log_probs), scored)

    def _scored(self, sequence, token) -> dict[int, float]:
        """As vLLM has it: the prompt's token, and the two likeliest by topk, which breaks ties as it likes."""
        row = log_softmax(self.logits(sequence).unsqueeze(0), TREE)[0]
        likeliest = row.flip(0).topk(2).indices
        return {i: row[i].item() for i in (token, *(VOCABULARY - 1 - likeliest).tolist())}


def requests(**given) -> list[Request]:
    return [Request((3, 4, place), 18 + place, **({"seed": place} | given)) for place in range(4)]


def found(asked):
    return [(r.tokens, r.log_probs, r.finished) for r in asked]


def alone(engine, **given):
    asked = requests(**given)
    verified.decode(asked, None, decisions_of(engine))
    return found(asked)


SAMPLING = [{}, {"temperature": 1.0}, {"temperature": 0.7, "top_k": 9, "top_p": 0.9}]


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("sampling", SAMPLING, ids=["greedy", "random", "top-k"])
@pytest.mark.parametrize("window", [1, 8, 64])
def test_what_the_decider_gives_alone(ties, sampling, window):
    decider, drafter = FakeEngine(ties=ties), FakeEngine(noise=0.3)
    asked = requests(**sampling)
    counts = verified.decode(asked, drafts_of(drafter), decisions_of(decider), window=window)
    assert found(asked) == alone(FakeEngine(ties=ties), **sampling)
    plain = [drafter.complete([Job(r.prompt, r.limit, r.temperature, r.seed, r.top_k, r.top_p)])[0] for r in asked]
    assert any(list(a.tokens) != r.tokens for a, r in zip(plain, asked, strict=True)) and counts.accepted and counts.recomputed


@pytest.mark.parametrize("sampling", SAMPLING, ids=["greedy", "random", "top-k"])
def test_a_models_forward_decides(sampling):
    """An engine that drafts, a trainer that decides: what the engine would give, were it the trainer's model."""
    engine = FakeEngine(ties=True)
    logits_of = lambda tokens: torch.stack([engine.logits(tokens[: i + 1]) for i in range(len(tokens))])  # noqa: E731
    asked = requests(**sampling)
    verified.decode(asked, drafts_of(FakeEngine(noise=0.3)), decisions_of_model(logits_of, TREE), window=8)
    assert found(asked) == alone(FakeEngine(ties=True), **sampling)


def test_the_very_job_is_one_request_a_window():
    """Where the drafts are right and no two tokens are as likely; and that job gives what plain steps give."""
    engine = FakeEngine()
    asked = requests()
    counts = verified.decode(asked, drafts_of(FakeEngine()), decisions_of(engine), window=8)
    assert counts.recomputed == 0 and len(engine.jobs) == sum(1 + -(-(r.limit - 1) // 9) for r in asked)


def test_a_tie_is_the_samplers_business():
    engine = FakeEngine(ties=True)
    asked = requests()
    verified.decode(asked, drafts_of(FakeEngine(ties=True)), decisions_of(engine), window=8)
    broken = [job for job in engine.jobs if not job.scored]
    assert len(broken) > 8  # one for each prompt, one for each tie
    assert found(asked) == alone(FakeEngine(ties=True))


def test_a_decider_that_is_not_invariant_is_found_out():
    """The twin: scoring and decoding of another engine's arithmetic differ, and so does what is committed."""

    class Stock(FakeEngine):
        def _scored(self, sequence, token):
            return FakeEngine(noise=0.3)._scored(sequence, token)

    asked = requests()
    verified.decode(asked, drafts_of(FakeEngine(noise=0.3)), decisions_of(Stock()), window=8)
    assert found(asked) != alone(Stock())


# -- over HTTP -----------------------------------------------------------------------------------------------------------------------


class Handler(http.server.BaseHTTPRequestHandler):
    engine = FakeEngine()
    old = False  # a server that does not return token ids

    def do_GET(self):
        self._answer({"data": [{"id": "model"}]})

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if self.path == "/tokenize":
            self._answer({"tokens": [int(word) for word in body["prompt"].split()]})
        elif self.path == "/detokenize":
            self._answer({"prompt": " ".join(map(str, body["tokens"]))})
        elif len(body["prompt"]) + body["max_tokens"] > 200:
            self.send_error(400, "too long")
        else:
            assert body["model"] == "model" and body["ignore_eos"]
            top_k = max(0, body["top_k"])
            job = Job(
                tuple(body["prompt"]),
                body["max_tokens"],
                body["temperature"],
                body["seed"],
                top_k,
                body["top_p"],
                "prompt_logprobs" in body,
            )
            answer = self.engine.complete([job])[0]
            told = {"tokens": [f"token_id:{t}" for t in answer.tokens], "token_logprobs": answer.log_probs}
            scored = [{str(t): {"logprob": p, "rank": 1} for t, p in place.items()} or None for place in answer.scored]
            choice = {"logprobs": told, "prompt_logprobs": scored or None} | ({} if self.old else {"token_ids": answer.tokens})
            self._answer({"choices": [choice]})

    def _answer(self, value):
        text = json.dumps(value).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    def log_message(self, *arguments):
        pass


@pytest.fixture
def serve():
    started = []

    def make(**attributes):
        kind = type("Many", (http.server.ThreadingHTTPServer,), {"request_queue_size": 256})
        server = kind(("127.0.0.1", 0), type("Mine", (Handler,), attributes))
        threading.Thread(target=server.serve_forever, daemon=True).start()
        started.append(server)
        return f"http://127.0.0.1:{server.server_address[1]}"

    yield make
    for server in started:
        server.shutdown()
        server.server_close()


@pytest.mark.parametrize("sampling", SAMPLING, ids=["greedy", "random", "top-k"])
def test_over_http(serve, sampling):
    drafter, decider = Server(serve(engine=FakeEngine(noise=0.3), old=True)), Server(serve(engine=FakeEngine(ties=True)) + "/v1/")
    asked = requests(**sampling)
    verified.decode(asked, drafts_of(drafter), decisions_of(decider), window=8)
    assert found(asked) == alone(FakeEngine(ties=True), **sampling)


def test_the_command(serve, capsys, tmp_path):
    urls = ["--draft", serve(engine=FakeEngine(noise=0.3)), "--verifier", serve(engine=FakeEngine(ties=True))]
    written = tmp_path / "out.json"
    options = ["--tokens", "40", "--window", "8", "--check", "--json", str(written)]
    assert main(["decode", *urls, "--prompt", "3 4 0", "--prompt-ids", "3,4,1", *options]) == 0
    printed, told = capsys.readouterr().out, json.loads(written.read_text())
    assert "80 tokens in" in printed and "0 of 2 requests differ" in printed
    assert told["counts"]["drafted"] == told["counts"]["accepted"] + told["counts"]["recomputed"] and told["differing"] == 0
    assert [r["prompt"] for r in told["requests"]] == [[3, 4, 1], [3, 4, 0]]
    expected = Request((3, 4, 0), 40)
    verified.decode([expected], None, decisions_of(FakeEngine(ties=True)))
    assert told["requests"][1]["tokens"] == expected.tokens and told["requests"][1]["log_probs"] == expected.log_probs
    stop = str(expected.tokens[9])
    assert main(["decode", *urls, "--prompt", "3 4 0", "--stop-ids", stop, *options]) == 0
    assert json.loads(written.read_text())["requests"][0]["finished"] == "stop"


def test_the_command_says_where_bytes_differ(serve, capsys):
    class Stock(FakeEngine):
        def _scored(self, sequence, token):
            return FakeEngine(noise=0.3)._scored(sequence, token)

    urls = ["--draft", serve(engine=FakeEngine(noise=0.3)), "--verifier", serve(engine=Stock())]
    assert main(["decode", *urls, "--prompt-ids", "3,4,1", "--tokens", "40", "--check"]) == 1
    assert "1 of 1 requests differ" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ([], "nothing to answer"),
        (["--prompt-ids", "1,x"], "no list of token ids"),
        (["--prompt-ids", "1,2", "--stop-ids", "a"], "no list of token ids"),
        (["--prompt-ids", "1,2", "--tokens", "0"], "limit=0"),
        (["--prompt-ids", "1,2", "--window", "-1"], "window=-1"),
        (["--prompt-ids", "1,2", "--tokens", "300", "--window", "250"], "400"),
    ],
)
def test_errors_of_the_command(serve, capsys, arguments, match):
    url = serve()
    assert main(["decode", "--draft", url, "--verifier", url, *arguments]) == 2
    assert match in capsys.readouterr().err


def test_no_server(capsys):
    assert main(["decode", "--draft", "http://127.0.0.1:9", "--verifier", "http://127.0.0.1:9", "--prompt-ids", "1"]) == 2
    assert "is a vLLM server running there?" in capsys.readouterr().err
