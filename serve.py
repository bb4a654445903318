"""Serves a checkpoint: a page in the browser, and an API that is compatible with OpenAI's.

python serve.py --checkpoint=out/ppo_ckpt.pt --reward=length
python serve.py --checkpoint=out/sft_ckpt.pt --reference=out/ckpt.pt --port=8000

The page colors each token by its probability, by what training changed (log policy / reference), or
by the critic's value, lists the alternatives to a token, and compares both models at the same seed.

GET  /v1/models[/NAME]; POST /v1/completions, /v1/chat/completions: OpenAI's API, and top_k
GET  /info; POST /score: for the page, log-probabilities, KL, values and reward of a response

One thread computes, the event loop does the rest. Requests share a batch (sample.Lane): rows join
as others end. A seed gives the same text alone, among others, and in sample.py.
"""

import argparse
import asyncio
import functools
import hmac
import json
import socket
import sys
from contextlib import aclosing, nullcontext
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

import common  # noqa: F401  first: it reports missing packages

# isort: split
import torch

import formats
import kernels
from checkpoint import check_generates, choose_device, load_checkpoint, model_from_checkpoint
from common import Refused, add_flags, flag, parse_args, run_main
from instruct import find_template
from model import Transformer, TransformerWithValueHead
from rlhf import ModelReward, load_reward, load_reward_model
from sample import Engine, Lane, Row, Text, encode_prompt, token_report
from tokenizer import check_same_tokenizer, own_tokenizer, stop_ids

try:
    import uvicorn
    from starlette.applications import Starlette
    from starlette.requests import ClientDisconnect
    from starlette.responses import HTMLResponse, JSONResponse, Response, StreamingResponse
    from starlette.routing import Route
    from uvicorn.protocols.http.h11_impl import H11Protocol
except ImportError as e:
    sys.exit(f"error: serve.py needs: pip install starlette uvicorn ({e})")

LOOPBACK, TOO_LONG = {"localhost", "127.0.0.1", "::1"}, "context_length_exceeded"
MAX_BODY, MAX_HEADERS, MAX_CONNECTIONS, SECONDS = 2**20, 2**14, 512, 15
PAUSE = 0.02  # seconds between two parts of a stream, at least


@dataclass
class Flags:
    "serving"

    checkpoint: str = flag("out/ckpt.pt", "checkpoint (.pt) to serve")
    reference: str = flag("", "checkpoint to compare with; default: the one that PPO or DPO stored")
    tokenizer: str = flag("", "tokenizer file; default: the one beside the checkpoint or in data/")
    template: str = flag("", "chat template: plain, llama2 or a .json file; default: the model's")
    reward: str = flag("", "reward that the page shows: length, FILE.py:FUNCTION or a reward model")
    target_len: int = flag(200, "length with the highest --reward=length, in tokens")
    host: str = flag("127.0.0.1", "address to listen on; one that others can reach needs --token")
    port: int = flag(8000, "port to listen on; 0: a free one")
    token: str = flag("", "secret that clients must send as their API key")
    max_batch: int = flag(16, "responses that are generated at a time, per model")
    max_queue: int = flag(64, "responses that may wait; further requests are refused")
    max_prompt: int = flag(0, "tokens per prompt at most; 0: what the context allows")
    max_new_tokens: int = flag(0, "tokens per response at most; 0: what the context allows")
    device: str = flag("", "cpu, cuda, cuda:1 or mps; default: the best available")
    dtype: str = flag("float32", "dtype of matrix products", ("float32", "bfloat16", "float16"))


# ----------------------------------------------------------------------------
# requests


class Service:
    """The models, and the answers to requests."""

    def __init__(self, args):
        self.args, device, path = args, choose_device(args.device), args.checkpoint
        checkpoint, name = load_checkpoint(path), Path(path).stem
        check_generates(checkpoint, path)
        self.tokenizer = own_tokenizer(checkpoint, path, args.tokenizer)
        self.bos, template = checkpoint.get("bos", True), checkpoint.get("template")
        named = args.template or template
        self.template = named and find_template(args.template, checkpoint, self.tokenizer)

        def load(other_path):
            other, own = load_checkpoint(other_path), checkpoint.get("tokenizer_hash")
            check_same_tokenizer(path, own, other_path, other.get("tokenizer_hash"))
            return other

        def build(weights, kind=Transformer, source=checkpoint):
            model = model_from_checkpoint({**source, "model": weights}, kind, dropout=0.0)
            return model.requires_grad_(False).eval().to(device)

        stage = checkpoint.get("ppo") or checkpoint.get("dpo") or {}
        models = {name: build(checkpoint["model"])}
        if args.reference:
            other, label = load(args.reference), Path(args.reference).stem
            check_generates(other, args.reference)
            models[label + "-reference" * (label == name)] = build(other["model"], source=other)
        elif "reference" in stage:
            models[f"{name}-reference"] = build(stage["reference"])
        self.models = list(models.values())  # the policy and, if there is one, its reference
        if len({m.args.vocab_size for m in self.models}) > 1:
            raise ValueError(f"{args.reference} has another vocabulary than {path}")
        shared = "value_head.weight" in checkpoint["model"]
        critic = checkpoint["model"] if shared else stage.get("critic")
        self.critic = critic and build(critic, TransformerWithValueHead)
        self.stops = stop_ids(self.tokenizer, self.template or None, checkpoint.get("end_ids"))
        self.lanes = {name: Lane(m, self.stops, args.max_batch) for name, m in models.items()}
        self.context = min(m.args.max_seq_len for m in self.models)
        self.longest = min(args.max_prompt or self.context, self.context - 1)  # prompt
        self.limit = min(args.max_new_tokens or self.context, self.context)  # response
        self.ids = range(min(self.models[0].args.vocab_size, self.tokenizer.n_words))
        kind, half = (device.partition(":")[0], getattr(torch, args.dtype)), args.dtype != "float32"
        autocast = functools.partial(torch.autocast, *kind) if half else nullcontext
        self.engine = Engine(list(self.lanes.values()), args.max_queue, autocast)
        if args.reward.endswith(".pt"):
            load(args.reward)
            judge = load_reward_model(args.reward, self.models[0].args, template)
            self.reward = ModelReward(judge, device, False, 1, autocast)
        else:
            how = args.reward, args.target_len, self.tokenizer.decode
            self.reward = load_reward(*how) if args.reward else None

    def check_ids(self, ids, most, name="prompt"):
        if type(ids) is not list or not all(type(i) is int and i in self.ids for i in ids):
            why = f"{name} must be text or token ids below {self.ids.stop}"
            raise Refused(400, why, param=name)
        if not 1 <= len(ids) <= most:
            why = f"it may have 1 to {most}, and the context holds {self.context}"
            raise Refused(400, f"the {name} has {len(ids)} tokens; {why}", TOO_LONG, name)
        return ids

    def prompts(self, body, chat):
        """The prompts of a request, as lists of token ids."""
        if chat and not self.template:
            raise Refused(400, "this model has no chat template: see --template", None, "messages")
        if chat:
            return [self.template.chat(self.tokenizer, body.get("messages"), self.longest)]
        if len(json.dumps(x := body.get("prompt") or "")) > 64 * self.context:  # slow to encode
            why = f"the prompt is too long for a context of {self.context} tokens"
            raise Refused(400, why, TOO_LONG, "prompt")
        xs = x if isinstance(x, list) and isinstance(x[0], (str, list)) else [x]
        xs = [encode_prompt(self.tokenizer, x, self.bos) if isinstance(x, str) else x for x in xs]
        return [self.check_ids(x, self.longest) for x in xs]

    def parse(self, body, chat, receive):
        """The parameters of a request, with its model and rows."""
        p = formats.api_parameters(body, chat, self.limit, list(self.lanes))
        p.prompts = self.prompts(body, chat)
        n, limit = p.n * len(p.prompts), p.max_tokens or min(256, self.limit)
        if n > self.args.max_batch:
            raise Refused(400, f"n: at most {self.args.max_batch} responses, not {n}", None, "n")
        uniform = torch.rand(n, limit, generator=torch.Generator().manual_seed(p.seed))
        pause = PAUSE if p.stream or p.stop else float("inf")
        how = (p.temperature, p.top_k, p.top_p), p.logprobs, receive, pause
        for i, u in enumerate(uniform):  # the random numbers of sample.py
            ids = p.prompts[i // p.n]
            p.rows.append(Row(i, ids, u[: self.context + 1 - len(ids)], *how))
        return p

    async def complete(self, request, body, chat=False):
        events = asyncio.Queue()
        p = await asyncio.to_thread(self.parse, body, chat, events.put_nowait)
        texts = [Text(self.tokenizer, [] if chat else row.prompt, p.stop) for row in p.rows]
        self.engine.submit(self.lanes[p.model], p.rows)
        pieces = self.engine.texts(p.rows, texts, events)
        if p.stream:
            events = formats.api_stream(p, self.tokenizer, pieces)
            return StreamingResponse(events, media_type="text/event-stream")
        texts, items, reasons = [""] * len(p.rows), [[] for _ in p.rows], [None] * len(p.rows)
        left = None, [], [], Refused(400, "the client has gone")
        gone = asyncio.ensure_future(request.receive())  # ends when the client disconnects
        gone.add_done_callback(lambda _: events.put_nowait(left))
        async with aclosing(pieces):
            async for i, text, new, reasons[i] in pieces:
                texts[i], items[i] = texts[i] + text, items[i] + new
        gone.cancel()
        done, usage = enumerate(zip(texts, items, reasons)), formats.api_usage(p, items)
        choices = [formats.api_choice(p, self.tokenizer, i, *x) for i, x in done]
        return JSONResponse({**formats.api_head(p), "choices": choices, "usage": usage})

    async def list_models(self, request, body):
        return JSONResponse(formats.api_models(list(self.lanes), request.path_params.get("name")))

    async def info(self, request, body):
        a, t = self.args, self.template
        shown = dict(models=list(self.lanes), chat=bool(t), system=bool(t and t.system))
        shown |= dict(critic=bool(self.critic), reward=a.reward, context=self.context)
        return JSONResponse(shown | dict(max_prompt=self.longest, max_new_tokens=self.limit))

    async def score(self, request, body):
        ids = [self.check_ids(body.get(x), self.context, x) for x in ("prompt", "response")]
        if (n := sum(map(len, ids))) > self.context + 1:
            raise Refused(400, f"{n} tokens do not fit a context of {self.context}", TOO_LONG)
        return JSONResponse(await self.engine.score(self.report, *ids))

    def report(self, prompt, response):
        tokens = token_report(self.models, self.critic, self.tokenizer, prompt, response)
        reward = None
        if self.reward:
            [reward] = self.reward([prompt], [response], [response[-1] in self.stops])
            reward = float(torch.as_tensor(reward).sum())  # a function may reward each token
        return {"tokens": tokens, "kl": sum(x["kl"] for x in tokens), "reward": reward}


# ----------------------------------------------------------------------------
# the server


def guard(request, args):
    """Refuses requests without the token, and those of other sites, also by DNS rebinding."""
    host, origin = request.headers.get("host", ""), request.headers.get("origin")
    try:
        name, source = urlsplit(f"//{host}").hostname, origin and urlsplit(origin).netloc
    except ValueError:
        name = source = ""
    if args.host in LOOPBACK and name not in LOOPBACK or origin and source != host:
        raise Refused(403, "this host or origin is not allowed")
    key = request.headers.get("authorization", "").removeprefix("Bearer ").encode()
    if args.token and request.url.path != "/" and not hmac.compare_digest(key, args.token.encode()):
        raise Refused(401, "the API key must be the server's --token", "invalid_api_key")


async def read_body(request):
    """The JSON object in the body of a request."""
    data = b""
    async for chunk in request.stream():
        data += chunk
        if len(data) > MAX_BODY:
            raise Refused(413, f"the body has more than {MAX_BODY} bytes")
    try:
        body = json.loads(data)
    except (ValueError, RecursionError) as e:
        raise Refused(400, f"the body is not JSON: {e}") from None
    if not isinstance(body, dict):
        raise Refused(400, "the body must be a JSON object")
    return body


def application(service, args):
    """The ASGI application."""
    page = (Path(__file__).parent / "assets/serve.html").read_text(encoding="utf-8")

    def refuse(e):  # not JSONResponse, which cannot send surrogates back
        return Response(json.dumps(formats.api_error(e)), e.status, media_type="application/json")

    def route(path, function, method="GET", **options):
        async def answer(request):
            try:
                guard(request, args)
                body = await read_body(request) if method == "POST" else ()
                return await function(request, body, **options)
            except (Refused, ValueError, ClientDisconnect) as e:
                return refuse(e if isinstance(e, Refused) else Refused(400, str(e)))

        return Route(path, answer, methods=[method])

    async def index(request, body):
        return HTMLResponse(page, headers={"X-Frame-Options": "DENY"})

    async def missing(request, e):
        return refuse(Refused(404, f"there is no {request.method} {request.url.path[:80]!r} here"))

    routes = [
        route("/", index),
        route("/info", service.info),
        route("/score", service.score, "POST"),
        route("/v1/models", service.list_models),
        route("/v1/models/{name}", service.list_models),
        route("/v1/completions", service.complete, "POST"),
        route("/v1/chat/completions", service.complete, "POST", chat=True),
    ]
    return Starlette(routes=routes, exception_handlers={404: missing, 405: missing})


class Connection(H11Protocol):
    """Closes a connection that waits for its client for SECONDS, or up to twice as long."""

    def connection_made(self, transport):
        super().connection_made(transport)
        # asyncio sets TCP_NODELAY only on sockets whose `proto` is IPPROTO_TCP; here it is 0.
        # Without TCP_NODELAY, a body waits 40 ms for the acknowledgement of its header.
        transport.get_extra_info("socket").setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if len(self.connections) > MAX_CONNECTIONS:
            transport.abort()
        self.check()

    def check(self, before=None):
        cycle, unsent = self.cycle, self.transport.get_write_buffer_size()
        waits = not cycle or cycle.response_complete or cycle.more_body or unsent
        state = (id(cycle), unsent) if waits else None
        if state and state == before:
            self.transport.abort()
        elif not self.transport.is_closing():
            self.loop.call_later(SECONDS, self.check, state)


async def serve(service, listener):
    options = dict(http=Connection, ws="none", lifespan="off", log_level="error", access_log=False)
    options |= dict(proxy_headers=False, server_header=False, timeout_graceful_shutdown=5)
    options |= dict(h11_max_incomplete_event_size=MAX_HEADERS)
    server = uvicorn.Server(uvicorn.Config(application(service, service.args), **options))
    engine, engine.server, engine.loop = service.engine, server, asyncio.get_running_loop()
    generation = engine.loop.run_in_executor(None, engine.run)
    try:
        await server.serve([listener])
    finally:
        server.should_exit = True
        engine.changed.set()
    await generation  # raises the error that ended it


def main(argv=None):
    parser = argparse.ArgumentParser(prog="serve.py", description=__doc__)
    add_flags(parser, Flags)
    args = parse_args(parser, argv)
    if args.host not in LOOPBACK and not args.token:
        raise ValueError(f"--host={args.host} is open to other computers: it needs --token=SECRET")
    if "target_len" in args.given and args.reward != "length":
        raise ValueError("--target_len has no effect without --reward=length")
    if args.max_batch < 1 or min(args.max_queue, args.max_prompt, args.max_new_tokens) < 0:
        raise ValueError("--max_batch must be at least 1, the other limits must not be negative")
    family = socket.AF_INET6 if ":" in args.host else socket.AF_INET
    try:
        listener = socket.create_server((args.host, args.port), family=family, backlog=128)
    except (OSError, OverflowError) as e:
        message = f"cannot listen on {args.host}, port {args.port}: {getattr(e, 'strerror', e)}"
        raise OSError(f"{message}; --port selects another") from None
    service = Service(args)
    service.engine.allocate()
    kernels.library()  # compiles kernels.c on first use
    host, port = listener.getsockname()[:2]
    address = f"http://{f'[{host}]' if ':' in host else host}:{port}/{'#SECRET' * bool(args.token)}"
    print(f"{', '.join(service.lanes)}: {address} (Ctrl-C ends)", flush=True)
    asyncio.run(serve(service, listener))


if __name__ == "__main__":
    run_main(main)
