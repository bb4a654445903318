"""serve.py: the numbers of sample.py and of plain forward passes, OpenAI's own client, hostile
requests and slow clients, and the page in a headless browser."""

import argparse
import asyncio
import functools
import http.client
import importlib
import json
import math
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from unittest.mock import patch

import pytest
import torch

import kernels
import sample
import tinystories
from checkpoint import checkpoint_args, save_checkpoint
from common import Refused, add_flags, flag_names, parse_args, printable, run_main
from formats import api_parameters
from model import KVCache, ModelArgs, Transformer, TransformerWithValueHead, generate
from tokenizer import Tokenizer

pytest.importorskip("starlette", reason="needs starlette: pip install -r tests/requirements.txt")
pytest.importorskip("uvicorn", reason="needs uvicorn: pip install -r tests/requirements.txt")

import serve  # noqa: E402

ROOT = Path(serve.__file__).parent
VOCAB, CONTEXT = 320, 128
ARGS = dict(dim=16, n_layers=2, n_heads=2, n_kv_heads=1, multiple_of=8, max_seq_len=CONTEXT)


def make_model(seed, kind=Transformer):
    torch.manual_seed(seed)
    net = kind(ModelArgs(vocab_size=VOCAB, **ARGS))
    with torch.no_grad():
        net.output.weight.mul_(15)  # some tokens are much more likely than others
        net.output.weight[1:3] *= 0.7
        if kind is TransformerWithValueHead:
            torch.nn.init.normal_(net.value_head.weight)
    return net.eval()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tokenizer, a policy with a critic and its reference, and a model with a chat template."""
    folder = tmp_path_factory.mktemp("serve")
    tinystories.synthesize(folder, 60, 1)
    tinystories.train_vocab(folder, VOCAB)
    policy, reference = make_model(1), make_model(2)
    critic = make_model(3, TransformerWithValueHead)
    parts = {"model": policy.state_dict(), "model_args": checkpoint_args(policy.args)}
    parts |= {"iter_num": 7, "tokenizer_hash": Tokenizer(folder / f"tok{VOCAB}.model").hash}
    turns = {"turn": "{bos}{user}\n{reply}{eos}", "system": "{bos}{system}\n{user}\n{reply}{eos}"}
    save_checkpoint(folder / "chat.pt", {**parts, "template": turns})
    save_checkpoint(folder / "base.pt", {**parts, "model": reference.state_dict()})
    ppo = {"reference": reference.state_dict(), "critic": critic.state_dict()}
    save_checkpoint(folder / "tuned.pt", {**parts, "ppo": ppo})
    return folder


@pytest.fixture(scope="module")
def tokenizer(folder):
    return Tokenizer(folder / f"tok{VOCAB}.model")


def flags(*argv):
    parser = argparse.ArgumentParser(prog="serve.py")
    add_flags(parser, serve.Flags)
    return parse_args(parser, ["--device=cpu", *map(str, argv)])


@contextmanager
def running(*argv):
    """A server in a thread of this process; a namespace with its service and port."""
    args = flags(*argv)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        service, server = serve.Service(args), argparse.Namespace()
        server.service, server.port = service, listener.getsockname()[1]
        made = []

        async def main():
            closed = asyncio.Event()
            made.extend((asyncio.get_running_loop(), closed))
            task = asyncio.create_task(serve.serve(service, listener))
            await closed.wait()
            service.engine.server.should_exit = True
            await task

        thread = threading.Thread(target=lambda: asyncio.run(main()))
        thread.start()
        while not hasattr(service.engine, "server") or not service.engine.server.started:
            time.sleep(0.01)
            assert thread.is_alive()
        try:
            yield server
        finally:  # else a test that fails would not end
            made[0].call_soon_threadsafe(made[1].set)
            thread.join(20)
        assert not thread.is_alive()


@pytest.fixture(scope="module")
def server(folder):
    """The policy beside its reference, with the length reward."""
    with running(f"--checkpoint={folder}/tuned.pt", "--reward=length", "--max_queue=300") as s:
        yield s


@pytest.fixture(scope="module")
def chat_server(folder):
    with running(f"--checkpoint={folder}/chat.pt", f"--reference={folder}/base.pt") as s:
        yield s


def ask(server, path, body=None, **headers):
    """The status and the JSON of an answer."""
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=30)
    data = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
    names = {name.replace("_", "-"): value for name, value in headers.items()}
    connection.request("GET" if body is None else "POST", path, data, names)
    answer = connection.getresponse()
    text = answer.read()
    connection.close()
    return answer.status, json.loads(text)


def complete(server, **body):
    status, answer = ask(server, "/v1/completions", body)
    assert status == 200, answer
    return answer


def expected(seed, prompt, n, sampling=(1.0, 0, 1.0), stops=(1, 2), model=None):
    """The response of `generate` to one prompt at a seed."""
    uniform = torch.rand(1, n, generator=torch.Generator().manual_seed(seed))
    model = model or make_model(1)
    [ids] = generate(model, [prompt], n, *sampling, stop_ids=stops, uniform=uniform).responses()
    return ids


# ----------------------------------------------------------------------------
# the same numbers as elsewhere

SAMPLINGS = [(1.0, 0, 1.0), (0.7, 0, 1.0), (1.0, 5, 1.0), (1.3, 0, 0.8), (0.0, 0, 1.0)]


@pytest.mark.parametrize("temperature, top_k, top_p", SAMPLINGS)
def test_text_is_that_of_sample(server, folder, capsys, temperature, top_k, top_p):
    sampling = dict(temperature=temperature, top_k=top_k, top_p=top_p)
    words = [f"--{k}={v}" for k, v in sampling.items()]
    for seed, prompt in (5, "Tom saw a"), (6, ""):
        more = [f"--start={prompt}", f"--seed={seed}", "--max_new_tokens=70", "--device=cpu"]
        sample.main([f"--checkpoint={folder}/tuned.pt", *more, *words])
        out = capsys.readouterr().out
        answer = complete(server, prompt=prompt, seed=seed, max_tokens=70, **sampling)
        assert printable(prompt + answer["choices"][0]["text"]) + "\n" == out


def test_several_samples_are_those_of_sample(server, folder, capsys):
    more = ["--start=Tom", "--seed=3", "--num_samples=3", "--max_new_tokens=20", "--device=cpu"]
    sample.main([f"--checkpoint={folder}/tuned.pt", *more])
    out = capsys.readouterr().out.split("\n" + "-" * 15 + "\n")[:3]
    choices = complete(server, prompt="Tom", seed=3, n=3, max_tokens=20)["choices"]
    assert [printable("Tom" + c["text"]) for c in choices] == out
    assert [c["index"] for c in choices] == [0, 1, 2]


def test_a_request_does_not_depend_on_others(server, tokenizer):
    """Requests of different lengths and settings that share a batch, more than it has rows, give
    what each gives alone; log-probabilities in some of them change nothing."""
    rng, bodies, want = random.Random(1), [], []
    for seed in range(24):
        temperature, top_k, top_p = rng.choice(SAMPLINGS)
        body = dict(prompt="Tom saw a big dog"[: rng.randrange(18)], seed=seed)
        body |= dict(max_tokens=rng.randrange(1, 60), return_token_ids=True)
        body |= dict(temperature=temperature, top_k=top_k, top_p=top_p)
        bodies.append(body | rng.choice([{}, {"logprobs": 3}]))
        prompt = tokenizer.encode(body["prompt"], bos=True, eos=False)
        want.append(expected(seed, prompt, body["max_tokens"], (temperature, top_k, top_p)))
    with ThreadPoolExecutor(24) as pool:
        answers = list(pool.map(lambda body: complete(server, **body), bodies))
    assert [a["choices"][0]["token_ids"] for a in answers] == want
    for answer, ids, body in zip(answers, want, bodies):
        reason = answer["choices"][0]["finish_reason"]
        assert reason == ("stop" if ids[-1] in (1, 2) else "length")
        prompt = len(tokenizer.encode(body["prompt"], bos=True, eos=False))
        assert answer["usage"]["prompt_tokens"] == prompt
        assert answer["usage"]["completion_tokens"] == len(ids)
        assert answer["usage"]["total_tokens"] == prompt + len(ids)
    assert len({len(ids) for ids in want}) > 10  # they ended at different times


def test_equal_settings_share_the_fast_path(server, monkeypatch):
    """Requests with equal settings and without log-probabilities are sampled by sample_tokens,
    several tokens per call."""
    calls, advance = [], sample.Lane.advance
    monkeypatch.setattr(
        sample.Lane, "advance", lambda lane: calls.append(len(lane.slots)) or advance(lane)
    )
    monkeypatch.setattr(sample.Lane, "one_token", None)
    for lane in server.service.lanes.values():
        lane.steps = 32
    answer = complete(server, prompt="", seed=4, max_tokens=96, n=4)
    assert answer["usage"]["completion_tokens"] > 3 * len(calls)


def test_logprobs_are_those_of_a_forward_pass(server, tokenizer):
    for seed, temperature in (1, 1.0), (2, 0.5):
        body = dict(prompt="Tom", seed=seed, temperature=temperature, max_tokens=40, logprobs=4)
        [choice] = complete(server, **body, return_token_ids=True)["choices"]
        prompt, ids = choice["prompt_token_ids"], choice["token_ids"]
        with torch.no_grad():
            logits = make_model(1)(torch.tensor([prompt + ids]))[0, len(prompt) - 1 : -1]
        want = torch.log_softmax(logits, -1)
        got = choice["logprobs"]
        chosen = want[range(len(ids)), ids]
        assert torch.allclose(torch.tensor(got["token_logprobs"]), chosen, atol=1e-4)
        assert "".join(got["tokens"]) == choice["text"]
        assert got["text_offset"][1:] == [
            len("".join(got["tokens"][:i])) for i in range(1, len(ids))
        ]
        for top, row in zip(got["top_logprobs"], want):
            values, order = row.topk(4)
            names = [tokenizer.token_text(int(i)) for i in order]
            assert list(top) == list(dict.fromkeys(names))
            if len(set(names)) == 4:
                assert torch.allclose(torch.tensor(list(top.values())), values, atol=1e-4)


def logs(*probabilities):
    return [math.log(p) for p in probabilities]


def test_score(server, tokenizer):
    """Log-probabilities, KL, values, alternatives and reward against plain forward passes."""
    models = [make_model(1), make_model(2)]
    prompt = tokenizer.encode("Tom saw", bos=True, eos=False)
    response = expected(9, prompt, 60)
    status, got = ask(server, "/score", {"prompt": prompt, "response": response})
    assert status == 200
    with torch.no_grad():
        tokens = torch.tensor([prompt + response])
        p, q = (
            m(tokens)[0, len(prompt) - 1 : -1].double().softmax(-1) for m in models
        )  # naive: no log_softmax
        critic = make_model(3, TransformerWithValueHead)
        values = critic.values(critic.hidden(tokens))[0, len(prompt) - 1 : -1]
    total = 0
    for i, (token, x) in enumerate(zip(response, got["tokens"])):
        assert x["id"] == token
        assert x["logprobs"] == pytest.approx(logs(p[i, token], q[i, token]), abs=1e-4)
        kl = sum(float(a) * float((a / b).log()) for a, b in zip(p[i], q[i]))
        assert x["kl"] == pytest.approx(kl, rel=1e-3, abs=1e-5)
        assert x["value"] == pytest.approx(float(values[i]), abs=1e-4)
        total += kl
        for probabilities, top in zip((p, q), x["top"]):
            order = probabilities[i].argsort(descending=True)[:10]
            assert len(top) == 10
            for t, (text, a, b) in zip(order, top):
                assert text == tokenizer.token_text(int(t))
                assert [a, b] == pytest.approx(logs(p[i, t], q[i, t]), abs=1e-4)
    assert got["kl"] == pytest.approx(total, rel=1e-3)
    assert got["reward"] == pytest.approx(-abs(200 - len(prompt) - len(response)) / 100)
    assert ask(server, "/score", {"prompt": prompt, "response": []})[0] == 400
    assert ask(server, "/score", {"prompt": prompt, "response": [VOCAB]})[0] == 400
    room = CONTEXT + 1 - len(prompt)  # the last token is only predicted
    assert ask(server, "/score", {"prompt": prompt, "response": [3] * room})[0] == 200
    assert ask(server, "/score", {"prompt": prompt, "response": [3] * (room + 1)})[0] == 400


ON_A_GPU = """
import json, sys
import simulated_cuda
simulated_cuda.install()
import argparse, torch, common, sample, serve
parser = argparse.ArgumentParser()
common.add_flags(parser, serve.Flags)
service = serve.Service(common.parse_args(parser, ["--device=cuda", "--checkpoint=" + sys.argv[1]]))
lane, got = service.lanes["tuned"], [[] for _ in range(6)]
with torch.inference_mode():
    for i in range(6):
        uniform = torch.rand(30, generator=torch.Generator().manual_seed(i))
        how = ((0.7, 5, 1.0) if i == 4 else (1.0, 0, 1.0)), (2 if i == 4 else -1)
        lane.waiting.append(sample.Row(i, [1, 300, 301][: 1 + i % 3], uniform, *how, None))
        while i > 3 and lane.busy():
            for row, new, *_ in lane.advance():
                got[row.index] += new
    report = service.report([1, 300], got[0])
print(json.dumps([got, report["kl"]]))
"""


def test_on_a_gpu(folder):
    """The shared batch and the report are those of a CPU, on a simulated CUDA device."""
    import simulated_cuda

    if reason := simulated_cuda.unavailable():
        pytest.skip(reason)
    command = [sys.executable, "-c", ON_A_GPU, f"{folder}/tuned.pt"]
    paths = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    done = subprocess.run(
        command, env={**os.environ, "PYTHONPATH": paths}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    got, kl = json.loads(done.stdout.splitlines()[-1])
    for i, ids in enumerate(got):
        sampling = (0.7, 5, 1.0) if i == 4 else (1.0, 0, 1.0)
        assert ids == expected(i, [1, 300, 301][: 1 + i % 3], 30, sampling)
    tokens = torch.tensor([[1, 300, *got[0]]])
    with torch.no_grad():
        p, q = (make_model(k)(tokens)[0, 1:-1].softmax(-1) for k in (1, 2))
    assert kl == pytest.approx(float((p * (p / q).log()).sum()), rel=1e-3)


def test_the_reference_generates_too(server, tokenizer):
    names = [m["id"] for m in ask(server, "/v1/models")[1]["data"]]
    assert [ask(server, f"/v1/models/{x}")[1]["id"] for x in names] == names
    for path in "/v1/models/other", "/v1/models/%20", "/v1/models/%ff":
        status, answer = ask(server, path)
        assert (status, answer["error"]["code"]) == (404, "model_not_found")
        assert answer["error"]["message"] == f"model must be one of: {', '.join(names)}"
    assert names == ["tuned", "tuned-reference"] == ask(server, "/info")[1]["models"]
    texts = []
    for name, seed in zip(names, (1, 2)):
        answer = complete(server, model=name, prompt="Tom", seed=8, max_tokens=30)
        prompt = tokenizer.encode("Tom", bos=True, eos=False)
        ids = expected(8, prompt, 30, model=make_model(seed))
        texts.append(answer["choices"][0]["text"])
        assert "Tom" + texts[-1] == tokenizer.decode(prompt + ids)
        assert answer["model"] == name
    assert texts[0] != texts[1]


def test_text_of_random_tokens(tokenizer):
    """Piece by piece, a text is that of all tokens, also where bytes are no characters."""
    rng = random.Random(0)
    for _ in range(2000):
        prompt = [1] * rng.randrange(2) + [rng.randrange(3, VOCAB) for _ in range(rng.randrange(3))]
        ids = [rng.randrange(VOCAB) for _ in range(rng.randrange(1, 12))]
        if rng.random() < 0.5:
            letters = "".join(rng.choice("añ €中a b😀 \n") for _ in range(6))
            ids = tokenizer.encode(letters, bos=False, eos=False)
        start = tokenizer.decode(prompt)
        text = sample.Text(tokenizer, prompt)
        pieces = [text.add(i) for i in ids] + [text.add(last=True)]
        text, n = sample.Text(tokenizer, prompt), rng.randrange(len(ids))
        at_once = text.add(*ids[:n]), text.add(*ids[n:], last=True)
        if not start.endswith("\ufffd"):
            assert start + "".join(pieces) == tokenizer.decode(prompt + ids)
            assert "".join(at_once) == "".join(pieces)
    assert not any(piece.endswith("\ufffd") for piece in pieces[:-1])


def test_stop_strings():
    """`show` returns the text before the stop string that ends first, whatever the pieces are."""
    rng = random.Random(0)
    for _ in range(3000):
        whole = "".join(rng.choice("ab") for _ in range(rng.randrange(12)))
        stops = ["".join(rng.choice("ab") for _ in range(rng.randrange(1, 5))) for _ in range(2)]
        text, shown, rest = sample.Text(argparse.Namespace(decode=None), [], stops), "", whole
        while not text.stopped:
            n = rng.randrange(1, 4)
            piece, rest = rest[:n], rest[n:]
            shown += text.show(piece, not rest)
            assert whole.startswith(shown)
            if not rest:
                break
        ends = [n for n in range(len(whole) + 1) if whole[:n].endswith(tuple(stops))]
        assert text.stopped == bool(ends)
        starts = [ends[0] - len(s) for s in stops if ends and whole[: ends[0]].endswith(s)]
        assert shown == whole[: min(starts, default=len(whole))]


# ----------------------------------------------------------------------------
# OpenAI's client


@pytest.fixture
def client(server):
    openai = pytest.importorskip("openai", reason="needs openai")
    url = f"http://127.0.0.1:{server.port}/v1"
    with openai.OpenAI(base_url=url, api_key="none", max_retries=0) as client:
        yield client


def test_openai_completions(client, tokenizer):
    listed = list(client.models.list())
    assert [m.id for m in listed] == ["tuned", "tuned-reference"]
    assert [client.models.retrieve(m.id) for m in listed] == listed
    settings = dict(model="tuned", prompt="Tom saw", max_tokens=40, seed=5)
    whole = client.completions.create(**settings, logprobs=2)
    prompt = tokenizer.encode("Tom saw", bos=True, eos=False)
    ids = expected(5, prompt, 40)
    assert "Tom saw" + whole.choices[0].text == tokenizer.decode(prompt + ids)
    assert whole.object == "text_completion" and whole.id.startswith("cmpl-")
    used = whole.usage
    assert (used.prompt_tokens, used.completion_tokens) == (len(prompt), len(ids))
    options = dict(stream=True, stream_options={"include_usage": True}, logprobs=2)
    *parts, last = client.completions.create(**settings, **options)
    assert "".join(p.choices[0].text for p in parts) == whole.choices[0].text
    assert [t for p in parts for t in p.choices[0].logprobs.tokens] == (
        whole.choices[0].logprobs.tokens
    )
    offsets = [x for p in parts for x in p.choices[0].logprobs.text_offset]
    assert offsets == whole.choices[0].logprobs.text_offset
    assert last.choices == [] and last.usage == used
    assert [p.choices[0].finish_reason for p in parts[:-1]] == [None] * (len(parts) - 1)
    assert parts[-1].choices[0].finish_reason == whole.choices[0].finish_reason
    several = client.completions.create(**{**settings, "prompt": ["Tom", [1, 300]]}, n=2)
    assert [c.index for c in several.choices] == [0, 1, 2, 3]
    assert several.usage.prompt_tokens == len(tokenizer.encode("Tom", bos=True, eos=False)) + 2
    # without a seed, texts differ
    texts = {client.completions.create(model="tuned", prompt="T").choices[0].text for _ in "ab"}
    assert len(texts) == 2


def test_openai_stop(client):
    settings = dict(model="tuned", prompt="Tom saw", max_tokens=60, seed=5)
    text = client.completions.create(**settings).choices[0].text
    stop = text[20:24]
    for more in {"stop": stop}, {"stop": ["never there", stop]}:
        got = client.completions.create(**settings, **more)
        assert got.choices[0].text == text[: text.index(stop)]
        assert got.choices[0].finish_reason == "stop"
        assert 0 < got.usage.completion_tokens <= 60
        parts = list(client.completions.create(**settings, **more, stream=True))
        assert "".join(p.choices[0].text for p in parts) == got.choices[0].text
        assert parts[-1].choices[0].finish_reason == "stop"


def test_offsets_where_a_stream_holds_text_back(server, client, monkeypatch):
    """Text that may be the beginning of a stop string is sent later than its tokens."""
    monkeypatch.setattr(serve, "PAUSE", 0)  # each token is a part
    settings = dict(model="tuned", prompt="Tom saw", max_tokens=40, seed=5, logprobs=0)
    text = client.completions.create(**settings).choices[0].text
    often = sorted(set(text) - {"\ufffd"}, key=text.count)[-4:]
    settings["stop"] = [f"{c}\0never" for c in often]
    [whole] = client.completions.create(**settings).choices
    parts = [p.choices[0] for p in client.completions.create(**settings, stream=True)]
    assert "".join(p.text for p in parts) == whole.text and len(parts) > 10
    offsets = [x for p in parts for x in p.logprobs.text_offset]
    assert offsets == whole.logprobs.text_offset


def test_openai_chat(chat_server, folder, tokenizer, capsys, monkeypatch):
    openai = pytest.importorskip("openai", reason="needs openai")
    url = f"http://127.0.0.1:{chat_server.port}/v1"
    client = openai.OpenAI(base_url=url, api_key="none", max_retries=0)
    messages = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Hello"}]
    settings = dict(model="chat", seed=3, max_completion_tokens=40)
    whole = client.chat.completions.create(
        messages=messages, **settings, logprobs=True, top_logprobs=3
    )
    reply = whole.choices[0].message
    assert reply.role == "assistant" and whole.object == "chat.completion"
    prompt = tokenizer.encode("Be kind.\nHello\n", bos=True, eos=False)
    assert whole.usage.prompt_tokens >= len(prompt) - 2
    # sample.py --chat has the same reply
    lines = iter(["Hello"])
    monkeypatch.setattr(sample, "read_line", lambda prompt: next(lines, None))
    more = ["--chat", "--system=Be kind.", "--seed=3", "--max_new_tokens=40", "--device=cpu"]
    sample.main([f"--checkpoint={folder}/chat.pt", *more])
    assert f"Assistant: {printable(reply.content)}\n" in capsys.readouterr().out
    content = whole.choices[0].logprobs.content
    assert "".join(x.token for x in content) == reply.content
    assert b"".join(bytes(x.bytes) for x in content).decode() == reply.content
    assert all(len(x.top_logprobs) == 3 for x in content)
    assert len(content) == whole.usage.completion_tokens
    parts = list(client.chat.completions.create(messages=messages, **settings, stream=True))
    assert parts[0].choices[0].delta.role == "assistant"
    assert all(p.choices[0].delta.role is None for p in parts[1:])
    assert "".join(p.choices[0].delta.content or "" for p in parts) == reply.content
    assert parts[0].object == "chat.completion.chunk"
    # several turns, of which the oldest are dropped where the context is full
    for n in 1, 40:
        turns = [
            {"role": role, "content": "Tom saw a big dog"} for role in ("user", "assistant")
        ] * n + [{"role": "user", "content": [{"type": "text", "text": "Hi"}]}]
        got = client.chat.completions.create(model="chat", messages=turns, max_tokens=5)
        assert 10 < got.usage.prompt_tokens < CONTEXT


def test_keys_of_messages(chat_server):
    """What OpenAI's client sends with a message is accepted; other keys are refused."""
    path, hello = "/v1/chat/completions", {"role": "user", "content": "Hello", "name": "Tom"}
    empty = dict.fromkeys(["refusal", "audio", "function_call", "tool_calls", "parsed", "other"])
    answer = {"role": "assistant", "content": "Hi", "annotations": [{"type": "url_citation"}]}
    messages = [hello, answer | empty | {"refusal": ""}, hello | {"tool_calls": []}]
    assert ask(chat_server, path, dict(messages=messages, max_tokens=1))[0] == 200
    for name in "nonsense", "nonsense" * 20, "tool_calls":
        error = refusal(chat_server, path, messages=[{**hello, name: [3]}])
        assert name[:30] in error["message"] and error["param"] == "messages"
        assert len(error["message"]) < 200
    openai = pytest.importorskip("openai", reason="needs openai")
    url = f"http://127.0.0.1:{chat_server.port}/v1"
    create = openai.OpenAI(base_url=url, api_key="none").chat.completions.create
    reply = create(model="chat", messages=[hello], max_tokens=5).choices[0].message
    assert create(model="chat", messages=[hello, reply, hello], max_tokens=5).usage.total_tokens


def test_openai_errors(client, chat_server):
    openai = pytest.importorskip("openai", reason="needs openai")
    create = client.completions.create
    with pytest.raises(openai.NotFoundError) as e:
        create(model="gpt", prompt="x")
    assert e.value.code == "model_not_found" and "tuned" in e.value.message
    with pytest.raises(openai.BadRequestError) as e:
        create(model="tuned", prompt="x " * CONTEXT)
    assert e.value.code == "context_length_exceeded"
    assert e.value.type == "invalid_request_error"
    for more in dict(temperature=-1), dict(echo=True), dict(logit_bias={"5": 2}):
        with pytest.raises(
            openai.BadRequestError, match=next(iter(more)) if "n" not in more else ""
        ):
            create(model="tuned", prompt="x", **more)
    with pytest.raises(openai.BadRequestError, match="temprature"):
        create(model="tuned", prompt="x", extra_body={"temprature": 1})
    with pytest.raises(openai.BadRequestError, match="no chat template"):
        client.chat.completions.create(model="tuned", messages=[{"role": "user", "content": "x"}])
    url = f"http://127.0.0.1:{chat_server.port}/v1"
    chat = openai.OpenAI(base_url=url, api_key="none", max_retries=0).chat.completions
    for messages in (
        [],
        [{"role": "assistant", "content": "x"}],
        [{"role": "user", "content": "x"}, {"role": "assistant", "content": "x"}],
        [{"role": "user", "content": "x " * CONTEXT}],
        [{"role": "user"}],
        [{"role": "tool", "content": "x"}],
    ):
        with pytest.raises(openai.BadRequestError):
            chat.create(model="chat", messages=messages)


@pytest.mark.parametrize(
    "body",
    [
        {"max_tokens": 0},
        {"max_tokens": "5"},
        {"max_tokens": 1.5},
        {"max_tokens": True},
        {"temperature": "hot"},
        {"temperature": float("nan")},
        {"temperature": 1e999},
        {"temperature": 1e-7},
        {"top_p": 2},
        {"top_k": -1},
        {"n": 0},
        {"seed": 2**64},
        {"stop": 5},
        {"stop": ["a"] * 5},
        {"stop": [""]},
        {"stop": [5]},
        {"stop": 0},
        {"stop": {}},
        {"stream_options": []},
        {"stream": "yes"},
        {"stream_options": 5},
        {"stream_options": {"include_usage": True}},
        {"stream": True, "stream_options": {"nonsense": 1}},
        {"logprobs": 21},
        {"tools": [{}]},
        {"unknown": 1},
    ],
    ids=str,
)
def test_wrong_parameters(body):
    for chat in False, True:
        with pytest.raises(Refused) as e:
            api_parameters(body, chat)
        assert e.value.status == 400


@pytest.mark.parametrize("logprobs", [None, False])
def test_top_logprobs_need_logprobs(logprobs):
    with pytest.raises(Refused, match="top_logprobs has no effect without logprobs") as e:
        api_parameters({"logprobs": logprobs, "top_logprobs": 3}, True)
    assert (e.value.status, e.value.param) == (400, "top_logprobs")
    assert api_parameters({"logprobs": logprobs, "top_logprobs": 0}, True).logprobs == -1
    assert api_parameters({"logprobs": True, "top_logprobs": 3}, True).logprobs == 3


def test_neutral_parameters():
    body = dict(best_of=1, echo=False, presence_penalty=0.0, user="me", seed=None, tools=[])
    body |= dict(tool_choice="none", parallel_tool_calls=True)
    assert api_parameters(body, False).logprobs == -1
    assert api_parameters({"logprobs": True, "max_completion_tokens": 7}, True).max_tokens == 7
    for options in {}, {"include_usage": None, "other": None}, {"include_obfuscation": False}:
        assert not api_parameters({"stream": True, "stream_options": options}, True).usage
    assert not api_parameters({"stream_options": None}, True).usage


# ----------------------------------------------------------------------------
# safety


def test_queue_limit(folder):
    """What does not fit into the queue is refused with 429, and everything else is answered."""
    settings = f"--checkpoint={folder}/base.pt", "--max_batch=2", "--max_queue=3"
    with running(*settings) as s, ThreadPoolExecutor(30) as pool:
        body = dict(prompt="", max_tokens=100, seed=1, stop=["\x00never"], logprobs=1)
        done = list(pool.map(lambda _: ask(s, "/v1/completions", body), range(30)))
        statuses = [status for status, _ in done]
        assert set(statuses) == {200, 429} and statuses.count(200) >= 5
        texts = {answer["choices"][0]["text"] for status, answer in done if status == 200}
        assert len(texts) == 1
        [error] = {a["error"]["message"] for status, a in done if status == 429}
        assert "3 responses are waiting" in error
        assert ask(s, "/v1/completions", {"n": 3})[0] == 400  # more than rows
        assert not s.service.lanes["base"].busy()


def test_score_has_the_queue_limit(folder):
    """Scores wait in the queue too: more of them than --max_queue are refused with 429."""
    with (
        running(f"--checkpoint={folder}/base.pt", "--max_queue=1") as s,
        ThreadPoolExecutor(20) as p,
    ):
        body = dict(prompt=[1] * 20, response=[5] * 20)
        statuses = list(p.map(lambda _: ask(s, "/score", body)[0], range(40)))
        assert set(statuses) == {200, 429}
        assert ask(s, "/score", body)[0] == 200 and not s.service.engine.calls


def test_refusals_say_what_is_waiting():
    engine = sample.Engine([], 5, None)
    engine.server = argparse.Namespace(should_exit=False)
    engine.calls.extend([None] * 6)
    with pytest.raises(Refused, match="5 scores are waiting already"):
        asyncio.run(engine.score(None))
    with pytest.raises(Refused, match="5 responses are waiting already"):
        engine.submit(argparse.Namespace(waiting=[], slots=[]), [None] * 6)
    lane = argparse.Namespace(waiting=[None] * 2, slots=[None, "busy"])
    engine.submit(lane, [None] * 4)  # five wait, and one can begin
    assert len(lane.waiting) == 6
    with pytest.raises(Refused):
        engine.submit(lane, [None])


def test_scores_do_not_hold_up_responses(folder, monkeypatch):
    """A response ends while 32 clients always wait for scores."""
    monkeypatch.setattr(serve.Service, "report", lambda *_: time.sleep(0.05) or {})
    ended, body = threading.Event(), dict(prompt=[1], response=[5])

    def score(server):
        while not ended.is_set():
            assert ask(server, "/score", body)[0] == 200

    with running(f"--checkpoint={folder}/base.pt") as s, ThreadPoolExecutor(33) as pool:
        scores = [pool.submit(score, s) for _ in range(32)]
        wait_until(lambda: s.service.engine.calls)
        try:
            assert pool.submit(complete, s, prompt="Tom", max_tokens=20).result(timeout=5)
        finally:
            ended.set()
        assert [x.result() for x in scores] == [None] * 32


def test_an_engine_that_cannot_start_ends_the_server(folder, monkeypatch):
    """Without a batch no request would ever be answered."""
    monkeypatch.setattr(sample.Lane, "new_batch", lambda lane: 1 / 0)
    service = serve.Service(flags(f"--checkpoint={folder}/base.pt"))
    with socket.create_server(("127.0.0.1", 0)) as listener, pytest.raises(ZeroDivisionError):
        asyncio.run(asyncio.wait_for(serve.serve(service, listener), 20))


@pytest.mark.parametrize("what", ["DefaultCPUAllocator: can't allocate memory", ""])
def test_caches_that_do_not_fit(folder, monkeypatch, capsys, what):
    """One line that names the flags, before the address is printed."""

    def new_cache(*args):
        raise RuntimeError(what) if what else MemoryError

    monkeypatch.setattr(Transformer, "new_cache", new_cache)
    monkeypatch.setattr(kernels.FastTransformer, "new_cache", new_cache)
    with pytest.raises(SystemExit) as e:
        words = f"--checkpoint={folder}/base.pt", "--port=0", "--max_batch=9", "--device=cpu"
        run_main(lambda: serve.main(words))
    out, err = capsys.readouterr()
    assert e.value.code == 1 and out == "" and len(err.splitlines()) == 1
    assert err.startswith(f"error: out of memory: 9 KV caches of {CONTEXT} tokens")
    assert "--max_batch" in err and "--max_seq_len" in err


def test_no_request_is_queued_at_shutdown():
    engine = sample.Engine([], 5, None)
    engine.server = argparse.Namespace(should_exit=True)
    with pytest.raises(Refused) as e:
        engine.submit(argparse.Namespace(waiting=[], slots=[None]), [])
    assert e.value.status == 503


def test_limits_of_tokens(folder):
    limits = "--max_prompt=9", "--max_new_tokens=11"
    with running(f"--checkpoint={folder}/base.pt", *limits) as s:
        assert ask(s, "/v1/completions", {"prompt": [5] * 10})[0] == 400
        assert ask(s, "/v1/completions", {"max_tokens": 12})[0] == 400
        for body in {"prompt": [5] * 9, "max_tokens": 11}, {}:
            assert complete(s, **body, seed=2)["usage"]["completion_tokens"] <= 11
        assert ask(s, "/info")[1]["max_new_tokens"] == 11


def test_number_of_tokens_by_default(server, monkeypatch):
    """256, or what --max_new_tokens or the rest of the context allows if that is less."""

    def lengths(**body):
        parsed = server.service.parse({"prompt": [5] * 9, **body}, False, None)
        return [len(row.uniform) for row in parsed.rows]

    assert lengths() == [CONTEXT + 1 - 9] and lengths(max_tokens=3, n=2) == [3, 3]
    for name, value in ("context", 1000), ("longest", 999):
        monkeypatch.setattr(server.service, name, value)
    for limit, tokens in (1000, 256), (257, 256), (256, 256), (200, 200):
        monkeypatch.setattr(server.service, "limit", limit)
        assert lengths() == [tokens]
    assert lengths(prompt=[5] * 900) == [101]


def refusal(server, path="/v1/completions", **body):
    status, answer = ask(server, path, body)
    assert status in (400, 404), answer
    return answer["error"]


def test_refusals_name_the_numbers_and_the_field(server, chat_server, folder, tokenizer):
    """A message has the number of tokens and the limit that applies; `param` is the field."""
    text = "Tom saw a big dog. " * 40
    n = len(tokenizer.encode(text, bos=True, eos=False))
    error = refusal(server, prompt=text)
    assert f"the prompt has {n} tokens" in error["message"] and n > CONTEXT
    assert f"context holds {CONTEXT}" in error["message"]
    assert f"1 to {CONTEXT - 1}" in error["message"]
    assert (error["code"], error["param"]) == ("context_length_exceeded", "prompt")
    error = refusal(server, prompt="x" * 65 * CONTEXT)
    assert (error["code"], error["param"]) == ("context_length_exceeded", "prompt")
    error = refusal(server, prompt=[VOCAB])
    assert f"token ids below {VOCAB}" in error["message"]
    assert (error["code"], error["param"]) == (None, "prompt")  # not too long
    for prompt in 0, False, {}:
        error = refusal(server, prompt=prompt)
        assert error["param"] == "prompt" and "must be text or token ids" in error["message"]
    for value in "twenty", CONTEXT + 1, 0:
        error = refusal(server, prompt="Tom", max_tokens=value)
        assert error["message"] == f"max_tokens must be a whole number from 1 to {CONTEXT}"
        assert error["param"] == "max_tokens"
    messages = [{"role": "user", "content": "Hi"}]
    error = refusal(
        chat_server, "/v1/chat/completions", messages=messages, max_completion_tokens=999
    )
    assert error["param"] == "max_completion_tokens" and str(CONTEXT) in error["message"]
    assert refusal(server, messages=messages)["param"] == "messages"  # of the other endpoint
    error = refusal(chat_server, "/v1/chat/completions", messages=messages, prompt="Hi")
    assert error["param"] == "prompt"
    messages[0]["content"] *= 64 * CONTEXT
    error = refusal(chat_server, "/v1/chat/completions", messages=messages)
    assert (error["code"], error["param"]) == ("context_length_exceeded", "messages")
    bodies = dict(temperature=-1), dict(stop=[""]), dict(stop=5), dict(n=17), dict(stream_options=1)
    for body in *bodies, dict(unknown=1):
        assert refusal(server, **body)["param"] == [*body][0]
    for model in "gpt", ["gpt"], []:
        error = refusal(server, model=model)
        assert error["message"].endswith("tuned, tuned-reference") and error["param"] == "model"
    assert refusal(server, "/score", prompt=[1], response=["a"])["param"] == "response"
    assert ask(server, "/v1/completions", b"[]")[1]["error"]["param"] is None
    assert ask(server, "/none")[1]["error"]["param"] is None
    with running(f"--checkpoint={folder}/base.pt", "--max_prompt=9", "--max_new_tokens=11") as s:
        assert "has 10 tokens; it may have 1 to 9" in refusal(s, prompt=[5] * 10)["message"]
        assert "from 1 to 11" in refusal(s, max_tokens=12)["message"]


def test_a_chat_with_long_old_turns(chat_server):
    """Only the system prompt and the last message must fit: older turns are dropped."""
    path, old = "/v1/chat/completions", []
    for role in "user", "assistant":
        old.append({"role": role, "content": "Tom saw a big dog. " * 200})
    system, last = {"role": "system", "content": "Be kind."}, {"role": "user", "content": "more"}
    for first in [], [system]:
        status, answer = ask(chat_server, path, dict(messages=[*first, *old * 10, last]))
        assert status == 200 and answer["usage"]["prompt_tokens"] < 30
    system["content"] *= 1000
    for messages in [*old * 10, old[0]], [system, last]:
        error = refusal(chat_server, path, messages=messages)
        assert (error["code"], error["param"]) == ("context_length_exceeded", "messages")
        assert str(CONTEXT - 1) in error["message"]
    assert error["message"].startswith("the system prompt and the last message are too long")


def test_refusals_of_messages_name_the_field(server, chat_server):
    path, hello = "/v1/chat/completions", {"role": "user", "content": "Hello"}
    for messages in (
        None,
        "Hello",
        [],
        [{"role": "tool", "content": "x"}],
        [{"role": "user"}],
        [hello, hello],
        [hello, {**hello, "role": "assistant"}],
        [{**hello, "content": [{"type": "image_url"}]}],
        [{**hello, "content": [{"type": "text", "text": "Hello", "mood": "x"}]}],
    ):
        assert refusal(chat_server, path, messages=messages)["param"] == "messages"
    assert refusal(server, path, messages=[hello])["param"] == "messages"  # no template


def test_a_full_context_ends_a_response(server):
    answer = complete(server, prompt=[5] * (CONTEXT - 3), max_tokens=100, seed=1, stop=None)
    assert answer["usage"]["completion_tokens"] <= 4
    [choice] = answer["choices"]
    assert choice["finish_reason"] in ("length", "stop")


def test_host_and_origin(server):
    here = f"127.0.0.1:{server.port}"
    for host in here, "localhost", "localhost:1234", "[::1]:99":
        assert ask(server, "/info", Host=host)[0] == 200
    for host in "evil.com", f"evil.com:{server.port}", "127.0.0.1.evil.com", "", "[::1", "a b":
        status, answer = ask(server, "/info", Host=host)
        assert status == 403 and "error" in answer
    assert ask(server, "/info", Host=here, Origin=f"http://{here}")[0] == 200
    evil = f"http://{here}.evil.com", "http://127.0.0.1.evil.com", "http://127.0.0.1:1"
    for origin in *evil, "http://evil.com", "null", f"http://localhost:{server.port}", "http://[":
        assert ask(server, "/v1/completions", {"n": 1}, Host=here, Origin=origin)[0] == 403


def test_token(folder):
    with running(f"--checkpoint={folder}/base.pt", "--token=s3cret") as s:
        for path in "/info", "/v1/models":
            status, answer = ask(s, path)
            assert status == 401 and answer["error"]["code"] == "invalid_api_key"
            assert ask(s, path, Authorization="Bearer s3cre")[0] == 401
        assert ask(s, "/info", Authorization="Bearer s3cret")[0] == 200
        connection = http.client.HTTPConnection("127.0.0.1", s.port)
        connection.request("GET", "/")  # the page holds no secret; it sends the token
        answer = connection.getresponse()
        assert answer.status == 200 and b"sessionStorage" in answer.read()
        connection.close()


def test_no_files_and_limits(server):
    for path in (
        "/../serve.py",
        "/assets/serve.html",
        "/%2e%2e/etc/passwd",
        "//etc/passwd",
        "/x" * 90,
    ):
        status, answer = ask(server, path)
        assert status == 404 and "error" in answer
    assert ask(server, "/v1/completions")[0] == 404  # GET
    assert ask(server, "/info", {})[0] == 404  # POST
    body = b'{"prompt": "' + b"a" * serve.MAX_BODY + b'"}'
    assert ask(server, "/v1/completions", body)[0] == 413
    assert ask(server, "/v1/completions", body[:200_000] + b'"}')[0] == 400
    for body in b"", b"{", b"[1]", b"\xff", b"[" * 5000, b'{"prompt": "\\ud800"}':
        status, answer = ask(server, "/v1/completions", body)
        assert status == 400 and answer["error"]["message"]


def test_surrogates_are_sent_back(server, chat_server):
    """An answer may name what a client sent, also characters that UTF-8 cannot represent."""
    name = "\ud800"
    assert refusal(server, prompt="a", **{name: 1})["param"] == name
    assert refusal(server, prompt="a", model=name)["param"] == "model"
    hello = {"role": "user", "content": "Hello"}
    for message in (
        {**hello, name: 1},
        {**hello, "role": name},
        {**hello, "content": [{"type": name}]},
    ):
        error = refusal(chat_server, "/v1/chat/completions", messages=[message])
        assert error["param"] == "messages"


def test_a_client_that_leaves_within_its_body(folder, capfd):
    with running(f"--checkpoint={folder}/base.pt") as server:
        for path in "/v1/completions", "/v1/chat/completions", "/score":
            with patch.object(serve, "read_body", wraps=serve.read_body) as read:
                head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Length: 50\r\n\r\n{{"
                with socket.create_connection(("127.0.0.1", server.port)) as s:
                    s.sendall(head.encode())
                    wait_until(lambda: read.called)
        assert complete(server, prompt="Tom", max_tokens=2)["choices"]
        wait_until(lambda: not server.service.engine.server.server_state.tasks)
    assert capfd.readouterr().err == ""


def raw(server, data, wait=0.0, timeout=10):
    """What the server sends back to bytes."""
    with socket.create_connection(("127.0.0.1", server.port), timeout=timeout) as s:
        try:
            s.sendall(data)
            time.sleep(wait)
            s.shutdown(socket.SHUT_WR)
            out = b""
            while block := s.recv(65536):
                out += block
        except (ConnectionError, TimeoutError):
            return b"closed"
        return out


VALUES = [
    None,
    True,
    -1,
    0,
    1,
    2**70,
    1.5,
    1e308,
    "",
    "x",
    "\ud800",
    [],
    [[]],
    {},
    [5],
    ["a"],
    [-1],
]
NAMES = "model prompt messages max_tokens temperature top_k top_p n seed stop stream".split()
NAMES += "logprobs top_logprobs stream_options return_token_ids response logit_bias".split()


def hostile(rng):
    """A random request, most of them not valid."""
    kind = rng.randrange(6)
    if kind == 0:
        return rng.randbytes(rng.randrange(300))
    path = rng.choice(["/v1/completions", "/v1/chat/completions", "/score", "/info", "/%00", "*"])
    body = {rng.choice(NAMES): rng.choice(VALUES) for _ in range(rng.randrange(4))}
    body.setdefault("max_tokens", 2)
    if kind == 1:
        body["prompt"] = [rng.choice(VALUES) for _ in range(rng.randrange(4))]
        body["messages"] = [{"role": rng.choice(VALUES), "content": rng.choice(VALUES)}]
    data = json.dumps(body).encode()
    if kind == 2:
        data = data[: rng.randrange(len(data))]
    length = len(data) if kind != 3 else rng.choice([0, len(data) + 5, -1, 10**12, "x"])
    head = (
        f"{rng.choice(['POST', 'POST', 'GET', 'HEAD', 'X'])} {path} HTTP/1.1\r\nHost: localhost\r\n"
    )
    head += f"Content-Length: {length}\r\nConnection: close\r\n"
    if kind == 4:
        head += "X: " + "y" * rng.choice([10, 20_000]) + "\r\n"
    data = head.encode() + b"\r\n" + data
    if kind == 5:
        i = rng.randrange(len(data))
        data = data[:i] + rng.randbytes(3) + data[i + rng.randrange(3) :]
    return data


def test_hostile_requests(server, capfd):
    """A thousand random requests: no crash, no internal error, and others are served meanwhile."""
    rng = random.Random(4)
    requests = [hostile(rng) for _ in range(1000)]
    good = dict(prompt="Tom", seed=1, max_tokens=8)
    want = complete(server, **good)["choices"]
    with ThreadPoolExecutor(8) as pool:
        answers = pool.map(lambda data: raw(server, data), requests)
        served = [complete(server, **good)["choices"] for _ in range(20)]
        statuses = [a[9:12] for a in answers if a.startswith(b"HTTP/1.1")]
    assert all(x == want for x in served)
    assert len(statuses) > 700 and not [s for s in statuses if s.startswith(b"5")]
    assert {b"200", b"400", b"404"} <= set(statuses)
    assert complete(server, **good)["choices"] == want
    assert capfd.readouterr().err == ""
    wait_until(lambda: not any(lane.busy() for lane in server.service.lanes.values()))


def wait_until(condition, seconds=10):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


def test_slow_clients(folder, monkeypatch):
    """Clients that do not complete a header or a body, or do not read, keep nobody waiting and are
    disconnected. A client that reads slowly is served."""
    monkeypatch.setattr(serve, "SECONDS", 0.4)
    head = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\n"
    starts = [b"", b"POST /v1", head, head + b"Content-Length: 50\r\n\r\n{"]
    with running(f"--checkpoint={folder}/base.pt") as s:
        slow = [socket.create_connection(("127.0.0.1", s.port)) for _ in range(80)]
        for i, connection in enumerate(slow):
            connection.sendall(starts[i % len(starts)])
        t0 = time.monotonic()
        assert complete(s, prompt="Tom", seed=1, max_tokens=5)
        assert time.monotonic() - t0 < 3
        for connection in slow:
            connection.settimeout(10)
            try:
                assert connection.recv(100) == b""
            except ConnectionError:
                pass
            connection.close()
        # a response that takes longer than SECONDS
        advance = sample.Lane.advance
        monkeypatch.setattr(sample.Lane, "advance", lambda lane: time.sleep(0.1) or advance(lane))
        body = dict(prompt="Tom", seed=1, max_tokens=15, logprobs=1, temperature=0.1)
        assert len(complete(s, **body)["choices"][0]["logprobs"]["tokens"]) > 8


def test_too_many_connections(folder, monkeypatch):
    monkeypatch.setattr(serve, "MAX_CONNECTIONS", 5)
    with running(f"--checkpoint={folder}/base.pt") as s:
        waiting = [socket.create_connection(("127.0.0.1", s.port)) for _ in range(5)]
        time.sleep(0.2)
        with pytest.raises((ConnectionError, http.client.HTTPException)):
            ask(s, "/info")
        for connection in waiting:
            connection.close()
        time.sleep(0.2)
        assert ask(s, "/info")[0] == 200


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_frees_its_row(folder, monkeypatch, stream):
    advance = sample.Lane.advance
    monkeypatch.setattr(sample.Lane, "advance", lambda lane: time.sleep(0.02) or advance(lane))
    with running(f"--checkpoint={folder}/base.pt", "--max_batch=1") as s:
        lane = s.service.lanes["base"]
        body = json.dumps(dict(max_tokens=120, stream=stream, seed=1, logprobs=1, temperature=0.1))
        request = f"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}"
        connection = socket.create_connection(("127.0.0.1", s.port))
        connection.sendall(f"{request}\r\n\r\n{body}".encode())
        wait_until(lambda: any(row and row.length > 2 for row in lane.slots))
        [row] = lane.slots
        connection.close()
        wait_until(lambda: not lane.busy())
        assert row.length < 100


def test_an_error_while_generating(folder, monkeypatch, capfd):
    """A failure of the model fails the requests of the batch, and the server goes on."""
    with running(f"--checkpoint={folder}/base.pt") as s:
        good = complete(s, prompt="Tom", seed=1, max_tokens=9)["choices"]
        for error, message in (RuntimeError("broken"), "internal error"), (MemoryError(), "memory"):

            def fail(self, *args, error=error):
                raise error

            with monkeypatch.context() as m:
                m.setattr(sample.Lane, "admit", fail)
                status, answer = ask(s, "/v1/completions", {"prompt": "x"})
                assert status == 503 and message in answer["error"]["message"]
                connection = http.client.HTTPConnection("127.0.0.1", s.port)
                connection.request("POST", "/v1/completions", b'{"stream": true}')
                assert b'"error"' in connection.getresponse().read()
                connection.close()
            assert ("broken" in capfd.readouterr().err) == (message == "internal error")
        assert complete(s, prompt="Tom", seed=1, max_tokens=9)["choices"] == good


@pytest.mark.parametrize("logprobs", [None, 1])
def test_a_stream_arrives_in_parts(folder, monkeypatch, logprobs):
    """The client reads the first part while the model waits for it to do so, and then others."""
    advance, read, waits = sample.Lane.advance, threading.Event(), []

    def slow(lane):
        time.sleep(0.03)
        lane.steps = 4
        if any(row and row.length >= 40 for row in lane.slots):
            waits.append(read.wait(10))
        return advance(lane)

    monkeypatch.setattr(sample.Lane, "advance", slow)
    with running(f"--checkpoint={folder}/base.pt") as s:
        body = dict(max_tokens=60, stream=True, seed=1, logprobs=logprobs, temperature=0.1)
        connection = http.client.HTTPConnection("127.0.0.1", s.port, timeout=30)
        connection.request("POST", "/v1/completions", json.dumps(body | {"return_token_ids": True}))
        answer = connection.getresponse()
        lines = [answer.readline()]
        read.set()
        lines += answer.read().splitlines()
        connection.close()
    parts = [json.loads(line.removeprefix(b"data: ")) for line in lines[:-2] if line.strip()]
    counts = [len(part["choices"][0]["token_ids"]) for part in parts]
    assert sum(counts) == 60 and len(counts) > 10 and max(counts) < 30
    assert waits and all(waits)


def lane_and_engine(rows):
    """A Lane for up to `rows` rows, and an Engine whose events arrive without an event loop."""
    lane = sample.Lane(make_model(1), {1, 2}, rows)
    engine = sample.Engine([lane], 0, None)
    engine.server = argparse.Namespace(should_exit=False)
    engine.loop = argparse.Namespace(call_soon_threadsafe=lambda f, events: f(events))
    return lane, engine


@pytest.mark.parametrize("alternatives", [-1, 2])
@torch.inference_mode()
def test_a_row_with_an_infinite_pause_has_one_event(alternatives):
    """It has all tokens with their details; a row without a pause has an event for each call."""
    lane, engine = lane_and_engine(4)
    lane.stops, events = (), [[], []]
    for i, pause in enumerate((math.inf, 0.0)):
        how = (1.0, 0, 1.0), alternatives, events[i].append, pause
        lane.waiting.append(sample.Row(i, [5], torch.rand(40), *how))
    while engine.step():
        pass
    assert len(events[0]) == 1 and len(events[1]) > 5
    for of_row in events:
        tokens, details = (sum((event[k] for event in of_row), []) for k in (1, 2))
        assert len(tokens) == of_row[-1][0].length == 40 and of_row[-1][-1] == "length"
        assert [len(top) for _, top in details] == [alternatives] * (40 * (alternatives > 0))


@pytest.mark.parametrize("seconds", [0.0001, 0.002, 0.01, 0.05], ids=str)
@torch.inference_mode()
def test_time_of_a_call(monkeypatch, seconds):
    """Whatever came before, a call takes at most 80 ms or makes one step per row, on a clock on
    which a step takes `seconds`. Calls of a long response reach 20 ms or more than 30 steps."""
    clock, steps, sample_tokens = [0.0], [], Transformer.sample_tokens

    def timed(model, batch, n):
        before = batch.lengths.max()
        sample_tokens(model, batch, n)
        steps.append(int(batch.lengths.max() - before))
        clock[0] += steps[-1] * seconds

    monkeypatch.setattr(Transformer, "sample_tokens", timed)
    monkeypatch.setattr(sample.time, "perf_counter", lambda: clock[0])
    lane, _ = lane_and_engine(1)
    lane.stops = ()
    for n in [1] * 30 + [2] * 30 + [CONTEXT - 1]:
        row = sample.Row(0, [5], torch.rand(n), (1.0, 0, 1.0), -1, None, math.inf)
        lane.waiting.append(row)
        while lane.busy():
            lane.advance()
        assert row.length == n
    assert max(steps) * seconds <= 0.08 or max(steps) == 1
    assert max(steps[60:]) * seconds >= 0.02 or max(steps[60:]) > 30


@pytest.mark.parametrize("where", ["admit", "advance"])
@torch.inference_mode()
def test_an_error_ends_every_row(monkeypatch, capfd, where):
    """Also the rows that were about to start after the row whose copy to the GPU failed, and those
    that have just ended. A client whose row gets no last event would wait forever."""
    lane, engine = lane_and_engine(3)
    reasons = {}
    for i in range(3):
        # Nothing can be copied from the device "meta".
        uniform = torch.rand(1 + i, device="meta" if (where, i) == ("admit", 1) else "cpu")
        receive = lambda event: reasons.setdefault(event[0].index, event[-1])  # noqa: E731
        lane.waiting.append(sample.Row(i, [5, 6], uniform, (0.0, 0, 1.0), -1, receive, math.inf))
    if where == "advance":
        monkeypatch.setattr(KVCache, "keep", lambda cache, remaining: 1 / 0)
    engine.step()
    assert sorted(reasons) == [0, 1, 2]
    assert all("internal error" in str(reason) for reason in reasons.values())
    assert not lane.busy() and "Error" in capfd.readouterr().err


def test_many_clients(server, tokenizer):
    """64 clients at a time, streaming and not: every answer arrives, and is the right one."""
    models = make_model(1), make_model(2)
    names = "tuned", "tuned-reference"
    prompt = tokenizer.encode("Tom", bos=True, eos=False)
    want = {(k, s): expected(s, prompt, 30, model=models[k]) for k in (0, 1) for s in range(8)}

    def work(i):
        for j in range(3):
            k, seed, stream = (i + j) % 2, (i * 3 + j) % 8, i % 3 == 0
            body = dict(model=names[k], prompt="Tom", seed=seed, max_tokens=30, stream=stream)
            body |= dict(return_token_ids=True) | ({"logprobs": 1} if i % 16 == 0 else {})
            connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=60)
            connection.request("POST", "/v1/completions", json.dumps(body))
            text = connection.getresponse().read().decode()
            connection.close()
            if stream:
                lines = [x[6:] for x in text.split("\n\n") if x]
                assert lines.pop() == "[DONE]"
                parts = [json.loads(x)["choices"][0] for x in lines]
            else:
                parts = json.loads(text)["choices"]
            assert [t for p in parts for t in p["token_ids"]] == want[k, seed]
        return 3

    with ThreadPoolExecutor(64) as pool:
        assert sum(pool.map(work, range(64))) == 192
    assert not any(lane.busy() for lane in server.service.lanes.values())


# ----------------------------------------------------------------------------
# the command


def test_rewards_critics_and_references(folder, tokenizer, tmp_path):
    """A reward model, a function as reward, a critic that shares the policy's trunk, and models
    that do not fit each other."""
    prompt = tokenizer.encode("Tom", bos=True, eos=False)
    response = expected(3, prompt, 20)
    args = checkpoint_args(make_model(1).args)
    parts = {"model_args": args, "iter_num": 1, "tokenizer_hash": tokenizer.hash}
    shared = make_model(4, TransformerWithValueHead)
    (tmp_path / f"tok{VOCAB}.model").write_bytes(tokenizer.data)
    save_checkpoint(tmp_path / "policy.pt", {**parts, "model": shared.state_dict()})
    judge = {"model": shared.state_dict(), "reward": {"gain": 2.0, "bias": 0.5}}
    save_checkpoint(tmp_path / "judge.pt", {**parts, **judge})
    (tmp_path / "mine.py").write_text(
        "def letters(prompts, responses):\n    return map(len, responses)"
    )
    with torch.no_grad():
        values = shared.values(shared.hidden(torch.tensor([prompt + response])))[0]
    policy = f"--checkpoint={tmp_path}/policy.pt"

    def report(*argv):
        with torch.no_grad():
            return serve.Service(flags(*argv)).report(prompt, response)

    got = report(policy, f"--reward={tmp_path}/judge.pt")
    assert got["reward"] == pytest.approx(2 * float(values[-1]) + 0.5, abs=1e-4)
    assert [x["value"] for x in got["tokens"]] == pytest.approx(
        values[len(prompt) - 1 : -1].tolist(), abs=1e-4
    )
    assert got["kl"] == 0 and len(got["tokens"][0]["logprobs"]) == 1  # no reference
    got = report(policy, f"--reference={folder}/base.pt", f"--reward={tmp_path}/mine.py:letters")
    assert got["reward"] == len(tokenizer.decode(response)) and got["kl"] > 0
    same = serve.Service(flags(policy, f"--reference={tmp_path}/policy.pt"))
    assert list(same.lanes) == ["policy", "policy-reference"]
    save_checkpoint(tmp_path / "other.pt", {**parts, **judge, "tokenizer_hash": "f" * 64})
    for word in f"--reference={tmp_path}/other.pt", f"--reward={tmp_path}/other.pt":
        with pytest.raises(ValueError, match="tokenizer"):
            report(policy, word)
    for words in (
        [f"--checkpoint={tmp_path}/judge.pt"],
        [policy, f"--reference={tmp_path}/judge.pt"],
    ):
        with pytest.raises(ValueError, match="judge.pt is a reward model"):
            report(*words)


@pytest.mark.parametrize("how", ["plain", "bfloat16"])
def test_other_arithmetic(folder, tokenizer, monkeypatch, how):
    """Without kernels.c, and with autocast in the thread that computes."""
    if how == "plain":
        monkeypatch.setenv("NATIVE_KERNELS", "0")
    dtype = "float32" if how == "plain" else how
    prompt = tokenizer.encode("Tom", bos=True, eos=False)
    with running(f"--checkpoint={folder}/base.pt", f"--dtype={dtype}") as s:
        bodies = [
            dict(prompt="Tom", seed=i, max_tokens=30, return_token_ids=True) for i in range(6)
        ]
        bodies[3]["logprobs"] = 2
        with ThreadPoolExecutor(6) as pool:
            got = list(pool.map(lambda body: complete(s, **body), bodies))
        ids = [x["choices"][0]["token_ids"] for x in got]
        if how == "plain":
            assert ids == [expected(i, prompt, 30, model=make_model(2)) for i in range(6)]
        else:
            assert s.service.lanes["base"].batch.cache.k.dtype is torch.bfloat16
            assert all(len(x) >= 1 for x in ids)


def test_wrong_flags(folder, tmp_path, capsys):
    def error(*argv):
        with pytest.raises(SystemExit) as e:
            run_main(lambda: serve.main([f"--checkpoint={folder}/base.pt", "--port=0", *argv]))
        text = capsys.readouterr().err.splitlines()
        assert text[-1].startswith("error: ") and e.value.code in (1, 2)
        return text[-1]

    with pytest.raises(SystemExit) as e:
        serve.main(["--help"])
    text = capsys.readouterr().out
    assert not e.value.code and all(f"--{name} " in text for name in flag_names(serve.Flags))
    assert "--token" in error("--host=0.0.0.0")
    assert "--max_batch" in error("--max_batch=0")
    assert "negative" in error("--max_queue=-1")
    assert "no such checkpoint" in error(f"--reference={tmp_path}/none.pt")
    assert "--reward=long" in error("--reward=long")
    assert "--target_len has no effect without --reward=length" in error("--target_len=77")
    assert "--device=tpu" in error("--device=tpu")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert f"port {port}" in error(f"--port={port}")
    assert "port 99999" in error("--port=99999")


def test_missing_packages(monkeypatch):
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    with pytest.raises(SystemExit, match="error: serve.py needs: pip install starlette uvicorn"):
        exec(compile((ROOT / "serve.py").read_text(), "serve.py", "exec"), {"__name__": "other"})


@pytest.mark.skipif(os.name != "posix", reason="signals")
def test_interrupt(folder):
    """Ctrl-C ends a stream with an error, and the command within seconds."""
    command = [sys.executable, ROOT / "serve.py", f"--checkpoint={folder}/base.pt", "--port=0"]
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    # Processes that a shell starts in the background inherit that Ctrl-C is ignored.
    heard = functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    process = subprocess.Popen([*command, "--device=cpu"], **pipes, preexec_fn=heard)
    try:
        line = process.stdout.readline()
        assert line.startswith("base: http://127.0.0.1:")
        port = int(line.split(":")[3].split("/")[0])
        idle = socket.create_connection(("127.0.0.1", port))
        body = b'{"prompt": "Tom", "stream": true, "seed": 1, "n": 16, "logprobs": 20}'
        streams = []
        for _ in range(5):  # some are waiting
            connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
            connection.request("POST", "/v1/completions", body)
            streams.append(connection)
        answers = [c.getresponse() for c in streams]
        answers[0].readline()
        process.send_signal(signal.SIGINT)
        texts = [a.read() for a in answers]
        assert all(t.endswith(b"[DONE]\n\n") or b"shutting down" in t for t in texts)
        out, err = process.communicate(timeout=20)
        assert process.returncode == 130 and err.splitlines()[-1] == "interrupted"
        assert "Traceback" not in err
        idle.close()
    finally:
        process.kill()


def test_the_benchmark_ends_a_server_without_a_port(folder, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "bench")
    bench = importlib.import_module("bench_serve")
    (tmp_path / "serve.py").write_text("import time; print('', flush=True); time.sleep(600)")
    processes, start = [], subprocess.Popen

    def popen(*args, **how):
        processes.append(start(*args, **how))
        return processes[-1]

    monkeypatch.setattr(bench, "ROOT", tmp_path)
    monkeypatch.setattr(subprocess, "Popen", popen)
    try:
        with pytest.raises(ValueError, match="did not start"):
            bench.main([f"--checkpoint={folder}/base.pt"])
        assert processes[0].poll() is not None
    finally:
        processes[0].kill()


# ----------------------------------------------------------------------------
# the page


@pytest.fixture
def browser():
    webdriver = pytest.importorskip("selenium.webdriver", reason="needs selenium")
    names = "chromium", "chromium-browser", "google-chrome"
    binary, driver = (
        next(filter(None, map(shutil.which, names)), None),
        shutil.which("chromedriver"),
    )
    if not binary or not driver:
        pytest.skip("needs chromium and chromedriver: apt install chromium chromium-driver")
    options = webdriver.ChromeOptions()
    options.binary_location = binary
    for word in "headless=new", "no-sandbox", "disable-gpu", "window-size=1280,800":
        options.add_argument(f"--{word}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    service = webdriver.chrome.service.Service(driver)
    with webdriver.Chrome(options=options, service=service) as browser:
        yield browser


def until(browser, condition):
    wait_until(lambda: browser.execute_script(f"return !!({condition})"), 30)


def test_page(server, chat_server, browser, tokenizer):
    """Open, type, stream, color, inspect, compare, stop, chat; without an error in the console."""
    run, find = browser.execute_script, lambda name: browser.find_element("id", name)
    browser.get(f"http://127.0.0.1:{server.port}/")
    until(browser, "info")
    find("prompt").clear()
    find("prompt").send_keys("Tom saw")
    run("$('seed').value = 5; $('max_tokens').value = 40")
    find("go").click()
    until(browser, "shown.length && shown[0].score && !running")
    ids = expected(5, tokenizer.encode("Tom saw", bos=True, eos=False), 40)
    assert run("return shown[0].tokens.map(t => t.id)") == ids
    text = browser.find_element("css selector", ".text").get_property("textContent")
    assert text.startswith("Tom saw" + run("return shown[0].plain()"))
    colors = {}
    for name in "probability", "ratio", "value", "none":
        browser.find_element("css selector", f"#color [value={name}]").click()
        colors[name] = run("return shown[0].spans.map(s => s.style.background)")
        charts = run("return document.querySelectorAll('figure svg').length")
        assert charts == (name != "none") and len(set(colors[name])) > (name != "none") * 5
    assert len({tuple(c) for c in colors.values()}) == 4
    browser.find_element("css selector", "#color [value=ratio]").click()
    until(browser, "document.querySelector('figcaption').textContent.includes('total')")
    status, score = ask(
        server, "/score", {"prompt": run("return shown[0].prompt"), "response": ids}
    )
    caption = run("return document.querySelector('figcaption').textContent")
    assert f"total {score['kl']:.2f} nats" in caption
    stats = browser.find_element("css selector", ".stats").text
    assert f"{len(ids)} after a prompt of {run('return shown[0].prompt.length')}" in stats
    assert len(re.findall(r"(KL|log π/πref) −?[0-9.]+ nats", stats)) == 2
    browser.find_element("css selector", "#color [value=probability]").click()
    caption = run("return document.querySelector('figcaption').textContent")
    assert caption.startswith("−log p per token, largest ") and caption.endswith(" nats")
    run("shown[0].spans[3].click()")
    rows = run("return [...document.querySelectorAll('#inspector table')].map(t => t.rows.length)")
    assert rows == [10, 10]
    prompt, texts = tokenizer.encode("Tom saw", bos=True, eos=False), {}
    for seed in range(30):  # one pair of texts that part at an odd token, one at an even token
        a, b = (expected(seed, prompt, 40, model=make_model(k)) for k in (1, 2))
        part = next((i for i, (x, y) in enumerate(zip(a, b)) if x != y), None)
        if part is not None:
            texts.setdefault(part % 2, (seed, part, len(a), len(b)))
        if len(texts) == 2:
            break
    for seed, part, m, n in texts.values():
        run(f"$('fresh').checked = false; $('seed').value = {seed}")
        find("compare").click()
        until(browser, "shown.length == 2 && shown.every(r => r.score) && !running")
        verdict = browser.find_element("css selector", ".verdict").text
        assert f"part at token {part + 1}:" in verdict and "rewards" in verdict
        assert f"Lengths {m} and {n} after a prompt of {len(prompt)} tokens, rewards" in verdict
    assert len(texts) == 2
    browser.get(f"http://127.0.0.1:{chat_server.port}/")
    until(browser, "info && mode == 'chat'")
    for n, word in enumerate(("Hello", "<b>again</b>"), 1):
        find("prompt").send_keys(word + "\n")
        until(browser, f"turns.length == {n} && !running")
    assert [t[0] for t in run("return turns")] == ["Hello", "<b>again</b>"]
    assert not browser.find_elements("css selector", "#results b b, .user b")
    find("clear").click()
    assert run("return turns.length + shown.length") == 0
    assert [x for x in browser.get_log("browser") if x["level"] == "SEVERE"] == []
    # an error names the field as the page does (the browser logs the answers of status 400)
    browser.find_element("css selector", "#mode [value=story]").click()
    for name, wrong, right in ("max_tokens", CONTEXT + 1, 40), ("top_k", -1, 0):
        run(f"$('{name}').value = {wrong}")
        find("go").click()
        until(browser, "$('error').textContent && !running")
        label = browser.find_element("xpath", f"//label[*[@id='{name}']]").text.split(" (")[0]
        assert find("error").text.startswith(f"“{label}” must be a whole number from ")
        run(f"$('{name}').value = {right}")


def test_page_on_a_phone(server, browser):
    """Every button can be reached in a narrow window, which does not scroll sideways."""
    for width in 420, 360:
        metrics = dict(width=width, height=800, deviceScaleFactor=1, mobile=False)
        browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
        browser.get(f"http://127.0.0.1:{server.port}/")
        until(browser, "info")
        browser.execute_script("$('go').click()")
        until(browser, "shown.length && shown[0].score && !running")
        assert browser.execute_script("return innerWidth") == width
        for name in "none", "probability", "ratio", "value":
            button = browser.find_element("css selector", f"#color [value={name}]")
            assert button.is_displayed()
            button.click()
            assert browser.execute_script("return color") == name
            assert button.rect["x"] >= 0 and button.rect["x"] + button.rect["width"] <= width
        assert browser.execute_script("return document.documentElement.scrollWidth") <= width


def test_stop_and_leaving_the_page(folder, browser):
    """Stop ends a response and frees its row, so that the next one starts; leaving the page too."""
    advance, run = sample.Lane.advance, browser.execute_script
    with running(f"--checkpoint={folder}/base.pt", "--max_batch=1") as s:
        lane = s.service.lanes["base"]
        slow = patch.object(sample.Lane, "advance", lambda lane: time.sleep(0.1) or advance(lane))
        for leave in False, True:
            browser.get(f"http://127.0.0.1:{s.port}/")
            until(browser, "info")
            run("$('seed').value = 1; $('temperature').value = 0.1; $('max_tokens').value = 120")
            with slow:
                run("$('go').click()")
                until(browser, "shown.length && shown[0].tokens.length > 2")
                [row] = lane.slots
                if leave:
                    browser.get("about:blank")
                else:
                    run("$('stop').click()")
                    until(browser, "!running && shown[0].reason == 'stopped' && $('stop').disabled")
                wait_until(lambda: not lane.busy())
            assert row.cancelled and 2 < row.length < 100
            if not leave:
                n = run("return shown[0].tokens.length")
                assert 2 < n <= row.length
                run("$('max_tokens').value = 9; $('go').click()")
                until(browser, "!running && shown[0].tokens.length == 9")
