"""Instructions and preferences: record formats, learned tokens, truncation, and the story task."""

import json
import random
import re

import pytest

import instruct
import model
import tinystories
from checkpoint import checkpoint_args, save_checkpoint
from instruct import TEMPLATES, Instructions, InstructPrompts, Rankings, Record, Template, read
from rlhf import load_reward
from tokenizer import stop_ids


class Letters:
    """A tokenizer whose tokens are characters: what is in the ids can be read."""

    bos_id, eos_id, special = 1, 2, {"<|end|>": 3}

    def encode(self, s, bos, eos):
        if isinstance(s, list):
            return [self.encode(x, bos, eos) for x in s]
        return [1] * bos + [ord(c) for c in s] + [2] * eos

    def text(self, ids):
        return "".join({1: "<s>", 2: "</s>", 3: "<|end|>"}.get(i) or chr(i) for i in ids)


T = Letters()
PLAIN = TEMPLATES["plain"]


def write(path, records):
    """A JSON file or, by its name, JSONL; returns its name."""
    lines = path.suffix == ".jsonl"
    path.write_text("\n".join(map(json.dumps, records)) if lines else json.dumps(records, indent=1))
    return str(path)


# ----------------------------------------------------------------------------
# Reading

SHAPES = [
    (
        {"instruction": "Add.", "input": "1 2", "output": "3"},
        Record([("Add.\n1 2", None)], "", ["3"]),
    ),
    ({"instruction": "Hi", "output": " Hello "}, Record([("Hi", None)], "", [" Hello "])),
    (
        {"prompt": "Hi", "response": "Hello", "system": "Be kind."},
        Record([("Hi", None)], "Be kind.", ["Hello"]),
    ),
    ({"prompt": "Hi", "chosen": "a", "rejected": "b"}, Record([("Hi", None)], "", ["a", "b"])),
    (
        {"instruction": "Hi", "input": "", "output": "o", "chosen": "a", "rejected": "b"},
        Record([("Hi", None)], "", ["a", "b"], ("output",)),
    ),
    (
        {
            "chosen": "\n\nHuman: A\n\nAssistant: B\n\nHuman: C\n\nAssistant: D",
            "rejected": "\n\nHuman: A\n\nAssistant: B\n\nHuman: C\n\nAssistant: E\n\nE",
        },
        Record([("A", "B"), ("C", None)], "", ["D", "E\n\nE"]),
    ),
    (
        {
            "prompt": "\n\nHuman: A\n\nAssistant: B\n\nHuman: C\n\nAssistant:",
            "chosen": "D",
            "rejected": "E",
        },
        Record([("A", "B"), ("C", None)], "", ["D", "E"]),
    ),
    (
        {
            "chosen": "\n\nHuman: A\n\nHuman: B\n\nAssistant:",
            "rejected": "\n\nHuman: A\n\nHuman: B\n\nAssistant: C",
        },
        Record([("A\n\nB", None)], "", ["", "C"]),
    ),
    (
        {"chosen": "\n\nHuman: A\n\nAssistant: B", "rejected": "\n\nHuman: X\n\nAssistant: B"},
        Record([("A", None)], "", []),
    ),
    (
        {
            "messages": [
                {"role": "system", "content": "S"},
                {"role": "user", "content": "A"},
                {"role": "assistant", "content": "B"},
                {"role": "user", "content": "C"},
                {"role": "assistant", "content": "D"},
            ]
        },
        Record([("A", "B"), ("C", None)], "S", ["D"]),
    ),
    ({"prompt": "Hi", "completions": ["a", "b", "c"]}, Record([("Hi", None)], "", ["a", "b", "c"])),
]


@pytest.mark.parametrize("name", ["x.json", "x.jsonl"])
def test_every_format_is_read(name, tmp_path):
    path = write(tmp_path / name, [item for item, _ in SHAPES])
    assert read(path) == [expected for _, expected in SHAPES]


def says(*texts, names=("user", "assistant"), keys=("role", "content")):
    """Messages by user and assistant in turn."""
    return [dict(zip(keys, (names[i % 2], text))) for i, text in enumerate(texts)]


SHAREGPT = dict(names=("human", "gpt"), keys=("from", "value"))
SYSTEM = {"role": "system", "content": "S"}
ONE = Record([("A", None)], "", ["B"])
TWO = Record([("A", "B"), ("C", None)], "", ["D"])
PAIR = Record([("A", None)], "", ["B", "X"])

PUBLIC = {  # records as data sets of these names have them
    "dolly": (
        {"instruction": "Q", "context": "In 1900.", "response": "R", "category": "qa"},
        Record([("Q\nIn 1900.", None)], "", ["R"]),
    ),
    "prompt and input": (
        {"prompt": "Q", "input": "cat", "response": "R"},
        Record([("Q\ncat", None)], "", ["R"]),
    ),
    "squad": (
        {"question": "Q", "context": "K", "answer": "R", "id": 3},
        Record([("Q\nK", None)], "", ["R"]),
    ),
    "gsm8k": ({"question": "A", "answer": "B"}, ONE),
    "metamath": (
        {"query": "A", "response": "B", "type": "x", "original_question": "O"},
        ONE._replace(ignored=("original_question",)),
    ),
    "numina": ({"problem": "A", "solution": "B"}, ONE),
    "xp3": ({"inputs": "A", "targets": "B"}, ONE),
    "openorca": (
        {"id": "1", "system_prompt": "S", "question": "A", "response": "B"},
        ONE._replace(system="S"),
    ),
    "alpaca-gpt4": ({"instruction": "A", "input": "", "output": "B"}, ONE),
    "alpaca, rendered too": (
        {"instruction": "A", "input": "", "output": "B", "text": "A B"},
        ONE._replace(ignored=("text",)),
    ),
    "instruction in input": ({"instruction": "", "input": "A", "output": "B"}, ONE),
    "alpaca history": ({"instruction": "C", "output": "D", "history": [["A", "B"]]}, TWO),
    "no history": ({"instruction": "A", "output": "B", "history": []}, ONE),
    "prompt completion": ({"prompt": "A", "completion": " B"}, ONE),
    "prompt completion, messages": ({"prompt": says("A"), "completion": [says("A", "B")[1]]}, ONE),
    "sharegpt": ({"id": "x", "conversations": says("A", "B", "C", "D", **SHAREGPT)}, TWO),
    "sharegpt, system": (
        {"conversations": [{"from": "system", "value": "S"}, *says("A", "B", **SHAREGPT)]},
        ONE._replace(system="S"),
    ),
    "sharegpt, system beside": (
        {"system": "S", "conversations": says("A", "B", **SHAREGPT)},
        ONE._replace(system="S"),
    ),
    "conversations, roles": ({"conversations": says("A", "B", "C", "D")}, TWO),
    "lima": ({"conversations": ["A", "B", "C", "D"], "source": "x"}, TWO),
    "ultrachat": ({"id": "0", "data": ["A", "B", "C", "D"]}, TWO),
    "ultrachat_200k": (
        {"prompt": "A", "prompt_id": "x", "messages": says("A", "B", "C", "D")},
        TWO,
    ),
    "capybara": (
        {
            "source": "x",
            "conversation": [{"input": "A", "output": "B"}, {"input": "C", "output": "D"}],
        },
        TWO,
    ),
    "no_robots": (
        {
            "prompt": "S",
            "prompt_id": "x",
            "category": "Chat",
            "messages": [SYSTEM, *says("A", "B")],
        },
        ONE._replace(system="S"),
    ),
    "text parts": (
        {
            "messages": [
                {"role": "user", "content": [{"type": "text", "text": "A"}]},
                says("", "B")[1],
            ]
        },
        ONE,
    ),
    "keys of text parts": (
        {
            "messages": [
                {"role": "user", "content": [{"type": "text", "text": "A", "mood": "x"}]},
                {"from": "gpt", "value": [{"type": "text", "text": "B", "id": 1, "image": None}]},
            ]
        },
        ONE._replace(ignored=("content.mood",)),
    ),
    "message keys": (
        {
            "messages": [
                {"role": "user", "content": "A", "name": "Al", "weight": None},
                {"role": "assistant", "content": "B", "weight": 1, "tool_calls": []},
            ]
        },
        ONE._replace(ignored=("messages.name",)),
    ),
    "developer": (
        {"messages": [{"role": "developer", "content": "S"}, *says("A", "B")]},
        ONE._replace(system="S"),
    ),
    "no images": ({"prompt": "A", "response": "B", "images": [], "tools": None}, ONE),
    "labels that are words": (
        {"prompt": "A", "response": "B", "label": "math"},
        ONE._replace(ignored=("label",)),
    ),
    "empty messages": ({"prompt": "A", "response": "B", "messages": [], "completions": []}, ONE),
    "data of another kind": (
        {"prompt": "A", "response": "B", "data": {"n": 3}},
        ONE._replace(ignored=("data",)),
    ),
    "null is absent": ({"prompt": None, "instruction": "A", "response": None, "output": "B"}, ONE),
    "helpsteer": (
        {"prompt": "A", "response": "B", "helpfulness": 3, "verbosity": 0},
        ONE._replace(ignored=("helpfulness", "verbosity")),
    ),
    "ultrafeedback_binarized": (
        {
            "prompt": "A",
            "chosen": says("A", "B"),
            "rejected": says("A", "X"),
            "messages": says("A", "B"),
            "score_chosen": 8.0,
            "score_rejected": 2.0,
        },
        PAIR,
    ),
    "orpo-dpo-mix": (
        {
            "source": "x",
            "prompt": "A",
            "question": "A",
            "chosen": says("A", "B", "C", "D"),
            "rejected": says("A", "B", "C", "X"),
        },
        TWO._replace(completions=["D", "X"]),
    ),
    "last turn as prompt": (
        {"prompt": "C", "chosen": says("A", "B", "C", "D"), "rejected": says("A", "B", "C", "X")},
        TWO._replace(completions=["D", "X"]),
    ),
    "another prompt": (
        {"prompt": "P", "input": "I", "chosen": says("A", "B"), "rejected": says("A", "X")},
        PAIR._replace(ignored=("input", "prompt")),
    ),
    "trl": (
        {"prompt": says("A"), "chosen": [says("", "B")[1]], "rejected": [says("", "X")[1]]},
        PAIR,
    ),
    "text prompt, system": (
        {
            "prompt": "A",
            "chosen": [SYSTEM, *says("A", "B")],
            "rejected": [SYSTEM, *says("A", "X")],
        },
        PAIR._replace(system="S"),
    ),
    "last turn as prompt, system": (
        {
            "prompt": "C",
            "chosen": [SYSTEM, *says("A", "B", "C", "D")],
            "rejected": [SYSTEM, *says("A", "B", "C", "X")],
        },
        TWO._replace(system="S", completions=["D", "X"]),
    ),
    "prompt and input, system": (
        {
            "prompt": "P",
            "input": "I",
            "chosen": [SYSTEM, says("", "B")[1]],
            "rejected": [SYSTEM, says("", "X")[1]],
        },
        Record([("P\nI", None)], "S", ["B", "X"]),
    ),
    "another prompt, system": (
        {
            "prompt": "P",
            "chosen": [SYSTEM, *says("A", "B")],
            "rejected": [SYSTEM, *says("A", "X")],
        },
        PAIR._replace(system="S", ignored=("prompt",)),
    ),
    "trl, system": (
        {
            "prompt": [SYSTEM, *says("A", "B", "C")],
            "chosen": [says("", "D")[1]],
            "rejected": [says("", "X")[1]],
        },
        TWO._replace(system="S", completions=["D", "X"]),
    ),
    "system as prompt": (
        {"prompt": [SYSTEM], "chosen": says("A", "B"), "rejected": says("A", "X")},
        PAIR._replace(system="S"),
    ),
    "trl, implicit": ({"chosen": says("A", "B"), "rejected": says("A", "X")}, PAIR),
    "single messages": (
        {"prompt": "A", "chosen": says("", "B")[1], "rejected": says("", "X")[1]},
        PAIR,
    ),
    "llama-factory": (
        {
            "conversations": says("A", **SHAREGPT),
            "chosen": {"from": "gpt", "value": "B"},
            "rejected": {"from": "gpt", "value": "X"},
        },
        PAIR,
    ),
    "intel orca": (
        {"system": "S", "question": "A", "chosen": "B", "rejected": "X"},
        PAIR._replace(system="S"),
    ),
    "distilabel orca": (
        {
            "system": "",
            "input": "A",
            "chosen": "B",
            "rejected": "X",
            "generations": ["B", "X"],
            "status": "tie",
        },
        PAIR._replace(ignored=("status",)),
    ),
    "rm-static": (
        {
            "prompt": "\n\nHuman: A\n\nAssistant:",
            "response": " B",
            "chosen": " B",
            "rejected": " X",
        },
        PAIR,
    ),
    "hh with prompt": (
        {
            "prompt": "\n\nHuman: A\n\nAssistant:",
            "chosen": "\n\nHuman: A\n\nAssistant: B",
            "rejected": "\n\nHuman: A\n\nAssistant: X",
        },
        PAIR,
    ),
    "nectar": (
        {
            "prompt": "\n\nHuman: A\n\nAssistant: ",
            "turns": 1,
            "num_responses": 2,
            "source": ["x"],
            "good_natured": True,
            "answers": [
                {"answer": "X", "model": "m", "rank": 2.0, "tone": "sad"},
                {"answer": "B", "model": "n", "rank": 1.0},
            ],
        },
        PAIR._replace(ignored=("answers.tone", "good_natured", "turns")),
    ),
    "aliases": (
        {"question": "A", "answer": "B", "answers": ["B", "b"]},
        ONE._replace(ignored=("answers",)),
    ),
    "task and input": ({"task": "T", "input": "A", "output": "B"}, ONE._replace(ignored=("task",))),
}


@pytest.mark.parametrize("name", PUBLIC)
def test_public_data_sets_are_read(name, tmp_path):
    item, expected = PUBLIC[name]
    assert read(write(tmp_path / "x.jsonl", [item])) == [expected]


REFUSED = {  # those whose meaning would change, and those of another shape: which keys, and why
    "kto": ({"prompt": "A", "completion": "B", "label": False}, '"label".*which replies are bad'),
    "kto 0/1": ({"prompt": "A", "completion": "B", "label": 1}, '"label".*which replies are bad'),
    "kto, llama-factory": ({"instruction": "A", "output": "B", "kto_tag": True}, '"kto_tag"'),
    "images": ({"prompt": "A", "response": "B", "images": ["a.png"]}, '"images".*only text'),
    "tools": ({"messages": says("A", "B"), "tools": "[{}]"}, '"tools".*tools'),
    "tool calls": (
        {
            "messages": [
                *says("A"),
                {"role": "assistant", "content": None, "tool_calls": [{"id": "1"}]},
            ]
        },
        '"tool_calls".*tool',
    ),
    "tool role": (
        {"messages": [*says("A", "B"), {"role": "tool", "content": "3"}]},
        "role 'tool': expected user, assistant or system",
    ),
    "observation": (
        {"conversations": [*says("A", **SHAREGPT), {"from": "observation", "value": "3"}]},
        "'observation'",
    ),
    "no role": ({"messages": [{"content": "A"}]}, "role None"),
    "not learned": (
        {"messages": [*says("A"), {"role": "assistant", "content": "B", "weight": 0}]},
        "excluded from training",
    ),
    "image part": (
        {
            "messages": [
                {
                    "role": "user",
                    "content": [
                        {"type": "image_url", "image_url": {"url": "x"}},
                        {"type": "text", "text": "A"},
                    ],
                },
                says("", "B")[1],
            ]
        },
        "part of type 'image_url': only text",
    ),
    "image in a text part": (
        {"prompt": "A", "response": [{"type": "text", "text": "B", "image_url": {"url": "x"}}]},
        '"image_url" changes the meaning of a message: only text',
    ),
    "two systems": (
        {"system": "T", "messages": [SYSTEM, *says("A", "B")]},
        "two different system prompts",
    ),
    "two systems, of prompt and replies": (
        {
            "prompt": [SYSTEM, *says("A")],
            "chosen": [{**SYSTEM, "content": "T"}, *says("A", "B")],
            "rejected": [{**SYSTEM, "content": "T"}, *says("A", "X")],
        },
        "two different system prompts",
    ),
    "text history": ({"instruction": "A", "output": "B", "history": "long ago"}, '"history" must'),
    "oasst": (
        {"message_id": "1", "parent_id": None, "text": "A", "role": "prompter"},
        'it has "message_id", "parent_id", "text", "role", but none of "prompt"',
    ),
    "shp": (
        {"post_id": "1", "history": "A", "human_ref_A": "B", "human_ref_B": "X", "labels": 1},
        'it has "post_id", "history", .*but none of',
    ),
    "safe-rlhf": (
        {"prompt": "A", "response_0": "B", "response_1": "X", "better_response_id": 0},
        r'"response" is missing \(or "output".*: it has "prompt", "response_0"',
    ),
    "no rejected": ({"prompt": "A", "chosen": "B"}, '"rejected" is missing: it has "prompt", "ch'),
    "argilla completions": (
        {
            "instruction": "A",
            "completions": [
                {"response": "B", "overall_score": 8},
                {"response": "X", "overall_score": 3},
            ],
        },
        '"completions" must be replies from best to worst, or objects with different "rank"s',
    ),
    "tied ranks": (
        {"prompt": "A", "completions": [{"answer": "B", "rank": 1}, {"answer": "X", "rank": 1}]},
        'different "ra',
    ),
    "a rank that is no number": (
        {
            "prompt": "A",
            "completions": [{"answer": "B", "rank": 1}, {"answer": "X", "rank": float("nan")}],
        },
        'different "ra',
    ),
    "squad answers": (
        {"question": "A", "context": "K", "answers": {"text": ["B"]}},
        '"response" is missing .*it has "question", "context", "answers"',
    ),
    "empty messages": ({"messages": []}, "in turn, not nothing"),
    "nothing": ({}, "it has no keys"),
    "replies of no prompt": ({"completions": ["B", "X"]}, "none of"),
    "a list as a reply": ({"question": "A", "answer": ["B", "C"]}, '"answer" must be a list of'),
    "starts with a reply": (
        {"conversations": says("A", "B", names=("gpt", "human"), keys=("from", "value"))},
        "in turn, not assist",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_unusable_records_are_refused_in_one_line(name, tmp_path):
    item, message = REFUSED[name]
    with pytest.raises(ValueError, match=rf"x\.jsonl, line 1: .*{message}") as e:
        read(write(tmp_path / "x.jsonl", [item]))
    assert len(str(e.value)) < 330 and "\n" not in str(e.value)


def test_every_key_is_used_harmless_or_counted(tmp_path):
    """A key that is added to a record of any format is counted."""
    for name, (item, expected) in PUBLIC.items():
        found = instruct.record({**item, "mood": "glad", "empty": "", "prompt_id": "7"})
        assert found.ignored == tuple(sorted([*expected.ignored, "mood"])), name
        assert found[:3] == expected[:3], name
    records = [
        {"prompt": f"p{i}", "response": "r", **({"mood": 1} if i < 3 else {})} for i in range(60)
    ]
    path = write(tmp_path / "x.jsonl", records)
    for kind in Instructions, InstructPrompts:
        data = kind(path, "all", T, PLAIN, 99)
        assert data.summary() == f'{path}: 60 samples (3 with "mood", which is ignored)'
        parts = [kind(path, split, T, PLAIN, 99).counts for split in ("train", "val")]
        assert sum(parts, instruct.collections.Counter()) == data.counts


def test_no_text_disappears_silently():
    """
    Random records raise nothing but ValueError; and if a text of a record changes, the learned text
    changes too, or its key is harmless or counted.
    """
    rng = random.Random(0)
    keys = [k for row in instruct.KEYS.values() for k in row] + ["mood", "label", "images", "tools"]
    texts = ["", "A", "B", "\n\nHuman: A\n\nAssistant: B", "\n\nHuman: C\n\nAssistant:", " "]

    def value(depth=0):
        kinds = [
            None,
            3,
            True,
            {},
            [],
            rng.choice(texts),
            rng.choice(texts),
            says("A", "B"),
            says("A"),
            [SYSTEM, *says("A")],
            says("A", "B", **SHAREGPT),
            ["A", "B"],
            [["A", "B"]],
            {"role": "assistant", "content": "B", "mood": "x"},
            [{"answer": "B", "rank": 1, "mood": "x"}, {"answer": "X", "rank": 2}],
            [{"type": "text", "text": "A"}],
            [{"type": "text", "text": "B", "mood": "x"}],
            [{"input": "A", "output": "B"}],
        ]
        return rng.choice(kinds)

    def strings(x, path=()):
        if isinstance(x, str) and x.strip():
            yield path
        inner = x.items() if isinstance(x, dict) else enumerate(x if isinstance(x, list) else ())
        for k, y in inner:
            yield from strings(y, (*path, k))

    def learned(item, replies):
        try:
            return instruct.record(item, replies)
        except ValueError:
            return None

    found = 0
    for _ in range(8_000):
        item = {k: value() for k in rng.sample(keys, rng.randint(1, 4))}
        replies = rng.random() < 0.7
        if rng.random() < 0.5:
            item |= {"prompt": "A"} | ({"response": "B"} if replies else {})
        before = learned(item, replies)
        if before is None:
            continue
        found += 1
        for path in strings(item):
            if path[-1] in ("role", "from", "type"):
                continue
            other = json.loads(json.dumps(item))
            place = other
            for k in path[:-1]:
                place = place[k]
            place[path[-1]] = "new words"
            names = {path[0], ".".join(str(k) for k in (path[0], path[-1]))}
            answer = not replies and path[0] not in ("prompt", "messages")
            assert learned(other, replies) != before or names & set(before.ignored) or answer, (
                item,
                path,
                before,
            )
    assert found > 1000


CODE = "    return x\n\n"


@pytest.mark.parametrize(
    "text",
    [
        "Human: nature is complex.",
        "\nHuman: A",
        "Human: A\nAssistant: B",
        "Human: A\n\nHuman: B",
        "What follows?\n\nHuman: A\n\nAssistant:",
        "Assistant: A\n\nHuman: B",
    ],
)
def test_text_that_begins_with_human_is_no_dialogue(text):
    """It is one only if Assistant: follows in a paragraph of its own."""
    for other in {"response": " B"}, {"chosen": " B", "rejected": " X"}:
        found = instruct.record({"prompt": text, **other})
        assert found.turns == [(text, None)] and found.completions == list(other.values())
    for reply in "Human: nature is complex.", "Human: A\n\nAnd B":
        found = instruct.record({"prompt": "A", "chosen": reply, "rejected": "X"})
        assert found == PAIR._replace(completions=[reply, "X"])
    start = "\n\nHuman: A\n\nAssistant: B\n\nHuman: C"
    for text in start, f"{start}\n\nAssistant:", f"{start}\n\nAssistant: ":
        found = instruct.record({"prompt": text, "response": " D"})
        assert found.turns == [("A", "B"), ("C", None)] and found.completions == ["D"]
    pair = {"chosen": "\n\nHuman: A\n\nAssistant: B", "rejected": "\n\nHuman: A\n\nAssistant: X"}
    assert instruct.record({"prompt": "\n\nHuman: A", **pair}) == PAIR


def test_replies_stay_unchanged(tmp_path):
    """Indentation, trailing newlines and spaces are learned; only what a format adds is not."""
    shapes = [
        {"prompt": "def f(x):", "response": CODE},
        {"instruction": "def f(x):", "output": CODE},
        {"prompt": "def f(x):", "completion": CODE},
        {"messages": says("def f(x):", CODE)},
        {"conversations": says("def f(x):", CODE, **SHAREGPT)},
        {"prompt": "def f(x):", "chosen": CODE, "rejected": "x"},
        {"prompt": "def f(x):", "completions": [CODE, "x"]},
        {"chosen": says("def f(x):", CODE), "rejected": says("def f(x):", "x")},
        {
            "chosen": f"\n\nHuman: def f(x):\n\nAssistant: {CODE}",
            "rejected": "\n\nHuman: def f(x):\n\nAssistant: x",
        },
    ]
    for item in shapes:
        data = Instructions(write(tmp_path / "x.jsonl", [item]), "all", T, PLAIN, 99)
        [(ids, mask)] = data.batch(0, 1)
        assert T.text(i for i, m in zip(ids, mask) if m) == CODE + "</s>", item
    turns = read(write(tmp_path / "x.jsonl", [{"messages": says("A", CODE, " C ", "D")}]))[0].turns
    assert turns == [("A", CODE), (" C ", None)]
    pair = {"prompt": "p", "chosen": "  x", "rejected": "x"}
    data = Rankings(write(tmp_path / "x.jsonl", [pair]), "all", T, PLAIN, 99)
    assert [T.text(c) for c in data.batch(0, 1)[0][1]] == ["  x</s>", "x</s>"]
    # of prompt and completion, one space is the format's; more than one are indentation
    for text, reply in (" B", "B"), ("  B", "  B"), (" \nB", " \nB"), ("B ", "B "):
        found = read(write(tmp_path / "x.jsonl", [{"prompt": "A", "completion": text}]))
        assert found[0].completions == [reply]


def test_a_tokenizer_that_drops_spaces_is_named(tok512_model, tmp_path):
    from tokenizer import Tokenizer

    t = Tokenizer(tok512_model)
    records = [{"prompt": "p", "response": r} for r in ("  x", "a  b", "c ", "a b")]
    data = Instructions(write(tmp_path / "x.jsonl", records), "all", t, PLAIN, 99)
    assert data.counts == {"with spaces in a reply that this tokenizer drops": 3}
    assert not Instructions(write(tmp_path / "x.jsonl", records), "all", T, PLAIN, 99).counts


def test_replies_of_equal_tokens_are_not_compared(tok512_model, tmp_path):
    """A vocabulary that drops spaces makes them equal: their scores would always be equal too."""
    from tokenizer import Tokenizer

    records = [{"prompt": "p", "completions": c} for c in (["a b", "a  b"], ["a", "b", "a "])]
    path, t = write(tmp_path / "x.jsonl", records), Tokenizer(tok512_model)
    data = Rankings(path, "all", t, PLAIN, 99)
    [(_, completions)] = data.batch(0, len(data))
    assert [t.decode(c) for c in completions] == ["a", "b"]
    assert data.counts["left out: chosen equal to rejected"] == 1


def test_file_layouts(tmp_path):
    """A sequence of objects with any line breaks, lists, and lists in an object."""
    items = [{"prompt": f"p{i}", "response": "r\n{"} for i in range(5)]
    expected = [Record([(f"p{i}", None)], "", ["r\n{"]) for i in range(5)]
    pretty = "\n".join(json.dumps(x, indent=2) for x in items)
    layouts = {
        "jsonl": "\n".join(map(json.dumps, items)) + "\n\n",
        "pretty": pretty,
        "blank lines and a mark": "\ufeff\n" + pretty.replace("}\n{", "}\n\n\n{") + "\n",
        "one line": " ".join(map(json.dumps, items)),
        "list": json.dumps(items),
        "wrapped": json.dumps({"data": items}, indent=1),
        "wrapped, with more": json.dumps({"version": "1", "train": items, "test": []}),
    }
    for name, text in layouts.items():
        for ending in ".json", ".jsonl":
            (tmp_path / f"x{ending}").write_text(text, encoding="utf-8")
            assert read(str(tmp_path / f"x{ending}")) == expected, name
    (tmp_path / "x.json").write_text(json.dumps({"messages": says("A", "B")}, indent=1))
    assert read(str(tmp_path / "x.json")) == [ONE]


@pytest.mark.parametrize(
    "text, message",
    [
        (
            '{"prompt": "a",\n "response": "b"}\n{"prompt": "a"\n "response": "b"}',
            r"line 3: not JSON: .*noticed in line 4",
        ),
        ('{"prompt": "a",\n "response": "b"}\n{"prompt": 3}', 'line 3: "prompt" must be text'),
        ('{"prompt": "a", "response": "b"\n{"prompt": "a", "response": "b"}', "line 1: not JSON"),
        ('{"prompt": "a", "response": "b"},\n{"prompt": "a", "response": "b"}', "line 1: not JSON"),
        (
            '{"data": [{"prompt": "a", "response": "b"}, {"prompt": 3}]}',
            'item 2 of "data": "prompt"',
        ),
        (
            '{"train": [{"prompt": "a"}], "test": [{"prompt": "b"}]}',
            'several lists.*"train", "test"',
        ),
        ('[{"prompt": "a", "response": "b"}, {"prompt": 3}]', 'line 1, item 2: "prompt"'),
        ('[{"prompt": "a", "response": "b"},\n{"prompt": 3}]', 'line 2: "prompt"'),
        ('{"data": 5}', 'line 1: it has "data", but none of'),
    ],
)
def test_broken_layouts_name_the_place(text, message, tmp_path):
    (tmp_path / "x.json").write_text(text)
    with pytest.raises(ValueError, match=rf"x\.json.*{message}"):
        read(str(tmp_path / "x.json"))


def test_prompts_need_no_reply(tmp_path):
    alone = [
        {"prompt": "a"},
        {"messages": says("b")},
        {"conversations": says("c", **SHAREGPT)},
        {"messages": [SYSTEM, *says("d", "e", "f")]},
        {"prompt": says("g")},
        {"question": "h", "context": "i"},
        {"prompt": "\n\nHuman: j\n\nAssistant:"},
        {"prompt": "k", "chosen": "l"},
        {"prompt": "m", "label": True},
    ]
    path = write(tmp_path / "x.jsonl", alone)
    data = InstructPrompts(path, "all", T, PLAIN, 99)
    assert sorted(map(T.text, data.batch(0, 9))) == sorted(
        [
            "<s>a\n",
            "<s>b\n",
            "<s>c\n",
            "<s>S\nd\ne</s><s>f\n",
            "<s>g\n",
            "<s>h\ni\n",
            "<s>j\n",
            "<s>k\n",
            "<s>m\n",
        ]
    )
    assert data.answered == 1 and data.counts == {'with "label", which is ignored': 1}
    for item in alone:
        with pytest.raises(ValueError, match="line 1: "):
            read(write(tmp_path / "y.jsonl", [item]))


MISTAKES = [
    (3, "expected an object"),
    ({"text": "x"}, "none of"),
    ({"prompt": "x"}, '"response" is missing'),
    ({"prompt": "", "response": "y"}, "the prompt is empty"),
    ({"prompt": 3, "response": "y"}, '"prompt" must be text, not int'),
    ({"prompt": "x", "completions": ["y"]}, "two or more"),
    ({"prompt": "x", "completions": ["y", None]}, "completions"),
    ({"chosen": "Hello", "rejected": "b"}, "must begin with Human:"),
    ({"prompt": "Human: A\n\nAssistant: B", "response": "C"}, "end with a text by Human:"),
    ({"prompt": "\r\n\r\nHuman: A\r\n\r\nAssistant:", "response": "B"}, "must begin with Human:"),
    ({"chosen": "Human: A\n\nAssistant: B\n\nHuman: C", "rejected": "D"}, "by Assistant:"),
    ({"messages": "x"}, "list of objects"),
    ({"messages": [{"role": "user", "content": "x"}]}, "in turn, not user"),
    ({"messages": [{"role": "assistant", "content": "x"}]}, "in turn"),
    ({"messages": [{"role": "system", "content": "x"}]}, "in turn"),
]


@pytest.mark.parametrize("item, message", MISTAKES)
def test_mistakes_name_file_and_line(item, message, tmp_path):
    good = {"prompt": "x", "response": "y"}
    (tmp_path / "x.jsonl").write_text(f"{json.dumps(good)}\n\n{json.dumps(item)}\n")
    with pytest.raises(ValueError, match=rf"x\.jsonl, line 3: .*{message}"):
        read(str(tmp_path / "x.jsonl"))
    # {"prompt": ...} fills lines 2 to 5 of the indented list
    with pytest.raises(ValueError, match=rf"x\.json, line 6: .*{message}"):
        read(write(tmp_path / "x.json", [good, item]))


@pytest.mark.parametrize(
    "text, line",
    [
        ('{"prompt": "a", "response": "b"}\n{"prompt": ', 2),
        ('[{"prompt": "a", "response": "b"},\n\n{"prompt": ]', 3),
        ('[{"prompt": "a", "response": "b"}', 1),
        ('[{"prompt": "a", "response": "b"},]', 1),
        ('[{"prompt": "a", "response": "b"}] x', 1),
        ("[" * 100_000, 1),
        ('{"prompt": "a", "response": "b"}\n{"prompt": "a", "prompt": "c", "response": "b"}', 2),
        ('{"prompt": "a",\n"completion": [{"content": "b", "role": "gpt", "content": "c"}]}', 1),
    ],
)
def test_broken_files_name_the_line(text, line, tmp_path):
    (tmp_path / "x.json").write_text(text)
    with pytest.raises(ValueError, match=f"x.json, line {line}: ") as e:
        read(str(tmp_path / "x.json"))
    assert len(str(e.value)) < 250


def test_no_record_no_text_no_file(tmp_path):
    for text in "", "[]", " [ ] \n":
        (tmp_path / "x.json").write_text(text)
        with pytest.raises(ValueError, match="has no records"):
            read(str(tmp_path / "x.json"))
    (tmp_path / "x.json").write_bytes(b'{"prompt": "\xff"}')
    with pytest.raises(ValueError, match="not UTF-8"):
        read(str(tmp_path / "x.json"))
    with pytest.raises(FileNotFoundError):
        read(str(tmp_path / "y.json"))


# ----------------------------------------------------------------------------
# the template


def test_llama2_template_character_by_character():
    t, turns = TEMPLATES["llama2"], [("A", "B"), ("C", None)]
    assert T.text(t.prompt(T, turns)) == "<s>[INST] A [/INST]B</s><s>[INST] C [/INST]"
    assert T.text(t.prompt(T, turns, "S")) == (
        "<s>[INST] <<SYS>>\nS\n<</SYS>>\n\nA [/INST]B</s><s>[INST] C [/INST]"
    )
    assert t.end(T) == 2


def test_text_between_exchanges_and_next():
    t = Template("{bos}U {user}\nA {reply}<|end|>\n", next="-{user}+{reply}<|end|>\n").check(T)
    ids, mask = t.dialogue(T, [("a", "b"), ("c", "d")])
    assert T.text(ids) == "<s>U a\nA b<|end|>\n-c+d<|end|>"
    assert T.text(i for i, m in zip(ids, mask) if m) == "b<|end|>d<|end|>"
    assert t.end(T) == 3
    assert t.dialogue(T, [("a", [98]), ("c", [100])]) == (ids, mask)  # ids as the model wrote them


class Pairs(Letters):
    """A tokenizer whose tokens are up to two characters, and that records what it encodes."""

    def __init__(self):
        self.encoded = []

    def encode(self, s, bos, eos):
        self.encoded.append(s)
        return [hash(x) for x in re.findall("..?", s, re.DOTALL)]


FORMS = [
    *TEMPLATES.values(),
    Template(
        "{bos}Be kind, and brief.<|end|>U {user}\nA {reply}<|end|>\n", next="{user}{reply}{eos}"
    ),
    Template(
        "{user}{reply}{eos}", "<|end|>{system}<|end|>{user}{reply}{eos}", "And {user}{reply}{eos}-"
    ),
]


@pytest.mark.parametrize("template", FORMS)
def test_the_longest_dialogue_that_fits(template):
    """`fit` keeps the same turns as a search that encodes every dialogue as a whole."""
    rng, tokenizer, dropped = random.Random(3), Pairs(), set()

    def text():
        return "".join(rng.choices("ab \n", k=rng.choice([0, 1, 2, 3, 9, 30])))

    for _ in range(400):
        turns = [(text(), text()) for _ in range(rng.randrange(9))]
        turns += [(text(), rng.choice([None, "a reply", [1, 2, 3]]))]
        turns[0] = turns[0][0], rng.choice([[], [1] * 9, turns[0][1]])  # as ids
        system, room = template.system and rng.choice(["", text()]), rng.randrange(-3, 150)
        sizes = [len(template.prompt(tokenizer, turns[i:], system)) for i in range(len(turns))]
        want = next((turns[i:] for i, n in enumerate(sizes) if n <= room), [])
        assert template.fit(tokenizer, turns, system, room) == want
        dropped.add(len(turns) - len(want))
    assert template.fit(tokenizer, [], "", 10) == [] and len(dropped) > 5


@pytest.mark.parametrize("room", [50, 1000, 10**6])
def test_a_long_dialogue_is_encoded_once(room):
    """The cost of `fit` is linear: one encoding per text, and a few more for the first turn."""
    tokenizer, turns = Pairs(), [("a", "b")] * 2000 + [("c", None)]
    kept = PLAIN.fit(tokenizer, turns, "s" * 30, room)
    assert len(kept) == min(2001, (room - 14) // 4)
    assert len(tokenizer.encoded) <= 2 * len(kept) + 50
    assert sum(map(len, tokenizer.encoded)) <= 4 * len(kept) + 600


def test_text_never_becomes_a_token_or_a_placeholder():
    t = Template("{bos}{user}<|end|>{reply}{eos}", "{bos}{system}|{user}{reply}{eos}")
    for text in "{bos}", "<|end|>", "{reply}", "{system}", "{user}", r"\1", "</s>":
        assert t.dialogue(T, [(text, text)])[0] == ([1, *map(ord, text), 3, *map(ord, text), 2])
        ids = t.dialogue(T, [(text, text)], text)[0]
        assert ids == [1, *map(ord, text), ord("|"), *map(ord, text), *map(ord, text), 2]


@pytest.mark.parametrize(
    "template, message",
    [
        (Template("{bos}{user}{reply}"), "a special token, such as {eos}, must follow"),
        (Template("{bos}{user}{reply}\n{eos}"), "a special token, such as {eos}, must follow"),
        (Template("{bos}{reply}{eos}"), "{user} must occur once"),
        (Template("{user}{reply}{reply}{eos}"), "{reply} must occur once"),
        (Template("{user}{system}{reply}{eos}"), "must occur in `system` only"),
        (Template("{user}{reply}{eos}", "{user}{reply}{eos}"), "{system} must occur once"),
        (Template("{user}<|im_end|>{reply}{eos}"), "this tokenizer has no token <|im_end|>"),
    ],
)
def test_templates_that_do_not_fit_are_refused(template, message):
    with pytest.raises(ValueError, match=message.replace("|", r"\|")):
        template.check(T)


def test_find_template(tmp_path, capsys):
    mine = {"turn": "{bos}>{user}{reply}{eos}", "system": "{bos}{system}{user}{reply}{eos}"}
    (tmp_path / "t.json").write_text(json.dumps(mine))
    name = str(tmp_path / "t.json")
    assert instruct.find_template("", {}, T) == TEMPLATES["llama2"]
    assert instruct.find_template("", {}, T, "plain") == PLAIN
    assert instruct.find_template("plain", {}, T) == PLAIN
    assert instruct.find_template(name, {}, T) == Template(**mine)
    assert instruct.find_template("", {"template": mine}, T) == Template(**mine)
    assert instruct.find_template(name, {"template": mine}, T) == Template(**mine)
    capsys.readouterr()
    assert instruct.find_template(name, {"template": mine}, T) == Template(**mine)
    assert capsys.readouterr().err == ""
    assert instruct.find_template("plain", {"template": mine}, T) == PLAIN  # and says so
    assert "--template=plain replaces" in capsys.readouterr().err
    assert instruct.find_template("", {}, T) == TEMPLATES["llama2"]
    assert "has no chat template: using llama2" in capsys.readouterr().err
    open_ended = {"turn": "{bos}{user}\n{reply}\n", "next": "{user}\n{reply}"}  # an older import
    assert instruct.find_template("", {"template": open_ended}, T) == Template(
        "{bos}{user}\n{reply}{eos}\n", "", "{user}\n{reply}{eos}"
    )
    no_bos = instruct.find_template("plain", {"bos": False}, T)
    assert no_bos == Template("{user}\n{reply}{eos}", "{system}\n{user}\n{reply}{eos}")
    with pytest.raises(ValueError, match="expected plain, llama2 or a .json"):
        instruct.find_template("plan", {}, T)
    for bad in "{", "[]", '{"turn": 3}', '{"turn": ""}', '{"trun": "x"}':
        (tmp_path / "t.json").write_text(bad)
        with pytest.raises(ValueError, match="t.json"):
            instruct.find_template(name, {}, T)


def test_templates_with_a_real_tokenizer(tok512_model):
    from tokenizer import Tokenizer

    t = Tokenizer(tok512_model)
    for template in TEMPLATES.values():
        ids, mask = template.check(t).dialogue(t, [("Tell of a cat.", "A cat sat.")])
        assert [i for i, m in zip(ids, mask) if m] == t.encode("A cat sat.", False, True)
        assert ids[0] == 1 and mask[:-10].count(True) < len(ids) - 10


# ----------------------------------------------------------------------------
# the three kinds of samples


def random_records(n, seed=0):
    rng = random.Random(seed)

    def words():
        return "".join(rng.choice("abcdefgh ") for _ in range(rng.randint(1, 30))).strip() or "x"

    out = []
    for _ in range(n):
        messages = [
            {"role": r, "content": words()}
            for _ in range(rng.randint(1, 4))
            for r in ("user", "assistant")
        ]
        out.append(
            {"messages": [{"role": "system", "content": words()}] * rng.randint(0, 1) + messages}
        )
    return out


def test_the_mask_is_exactly_replies_and_end_tokens(tmp_path):
    records = random_records(40)
    data = Instructions(write(tmp_path / "x.json", records), "all", T, PLAIN, 10_000)
    assert not data.counts and len(data) == 40
    seen = {}
    for ids, mask in data.batch(0, 40):
        learnt = T.text(i for i, m in zip(ids, mask) if m)
        given = T.text(i for i, m in zip(ids, mask) if not m)
        seen[given] = learnt
    expected = {}
    for r in records:
        said = r["messages"]
        system = said.pop(0)["content"] + "\n" if said[0]["role"] == "system" else ""
        given = "".join(
            f"<s>{'' if i else system}{m['content']}\n" for i, m in enumerate(said[::2])
        )
        expected[given] = "".join(m["content"] + "</s>" for m in said[1::2])
    assert seen == expected


def test_an_empty_reply_within_a_dialogue_is_not_learned(tmp_path):
    path = write(tmp_path / "x.json", [{"messages": says("a", " ", "c", "d")}])
    data = Instructions(path, "all", T, PLAIN, 99)
    [(ids, mask)] = data.batch(0, 1)
    assert T.text(ids) == "<s>a\n </s><s>c\nd</s>"
    assert T.text(i for i, m in zip(ids, mask) if m) == "d</s>"
    assert data.counts == {"with an empty reply, which is not learned": 1}


def test_an_epoch_is_a_permutation_and_validation_is_held_out(tmp_path):
    records = [{"prompt": f"p{i // 2}", "response": f"r{i}"} for i in range(400)]
    path = write(tmp_path / "x.jsonl", records)
    train = Instructions(path, "train", T, PLAIN, 100)
    val = Instructions(path, "val", T, PLAIN, 100)
    assert len(train) + len(val) == 400 and 10 < len(val) < 80

    def prompts(data):
        return {T.text(ids).split("\n")[0] for ids, _ in data.batch(0, len(data))}

    assert not prompts(train) & prompts(val)
    one, two = (train.batch(p * len(train), len(train)) for p in (0, 1))
    key = lambda s: T.text(s[0])  # noqa: E731
    assert sorted(map(key, one)) == sorted(map(key, two)) and one != two
    assert len(set(map(key, one))) == len(train)
    parts = [s for p in range(0, len(train), 7) for s in train.batch(p, 7)][: len(train)]
    assert parts == one
    assert Instructions(path, "train", T, PLAIN, 100, seed=1).batch(0, 9) != train.batch(0, 9)
    assert Instructions(path, "val", T, PLAIN, 100, seed=1).batch(0, 9) == val.batch(0, 9)
    both = Instructions(f"{path},{path}", "train", T, PLAIN, 100)
    assert len(both) == 2 * len(train)


def test_too_few_records_for_two_splits(tmp_path):
    """A single record is in one of the splits; the message for the other one says what to do."""
    splits = set()
    for user in "abcdefghijklmnopqrstuvwxyz":
        path = write(tmp_path / "x.jsonl", [{"prompt": user, "response": "r"}])
        empty = "train" if instruct.held_out(*read(path)) else "val"
        with pytest.raises(ValueError, match="0 samples: too few to hold some out: .*--val_data"):
            Instructions(path, empty, T, PLAIN, 99)
        splits.add(empty)
    assert splits == {"train", "val"}


def test_dialogues_with_the_same_beginning_are_in_the_same_split(tmp_path):
    """However they continue, and only if the system prompt is the same too."""
    records = [
        {"messages": says(f"A{i}", "B", f"C{j}", f"D{j}")} for i in range(60) for j in range(4)
    ]
    path = write(tmp_path / "x.jsonl", records)
    starts = []
    for split in ("train", "val"):
        data = Instructions(path, split, T, PLAIN, 100)
        texts = [T.text(ids) for ids, _ in data.batch(0, len(data))]
        starts.append({text.split("\n")[0] for text in texts})
        assert len(texts) == 4 * len(starts[-1])
    assert not starts[0] & starts[1] and len(starts[1]) > 2
    one = instruct.record({"messages": says("A", "B")})
    assert 2 < sum(instruct.held_out(one._replace(system=f"S{i}")) for i in range(100)) < 30


def test_too_long_for_instructions(tmp_path):
    def texts(records, max_len):
        data = Instructions(write(tmp_path / "x.json", records), "all", T, PLAIN, max_len)
        found = [(T.text(ids), mask.count(True)) for ids, mask in data.batch(0, len(data))]
        assert all(len(ids) <= max_len for ids, _ in data.batch(0, len(data)))
        return found, data.counts

    start = "\n\nHuman: one\n\nAssistant: two\n\nHuman: three\n\nAssistant: "
    chat = {"chosen": start + "four", "rejected": start + "x"}
    whole = "<s>one\ntwo</s><s>three\nfour</s>"
    n = len("-one\ntwo--three\nfour-")
    assert texts([chat], n) == ([(whole, 9)], {})
    newest = [("<s>three\nfour</s>", 5)], {"shortened: oldest turns dropped": 1}
    assert texts([chat], n - 1) == newest
    assert texts([chat], 12) == newest
    assert texts([chat], 11)[0] == [("<s>three\nfour", 4)]  # without an end token
    assert texts([chat], 8) == (
        [("<s>three\nf", 1)],
        {"shortened: oldest turns dropped": 1, "shortened: reply cut": 1},
    )
    with pytest.raises(ValueError, match=r"x.json: 0 samples \(1 left out: prompt too long\)"):
        texts([chat], 7)
    good = {"prompt": "a", "response": "b"}
    empty = {"prompt": "a", "response": " "}
    assert texts([empty, good], 99) == ([("<s>a\nb</s>", 2)], {"left out: empty response": 1})
    data = Instructions(write(tmp_path / "x.json", [good, empty, empty]), "all", T, PLAIN, 9)
    assert data.summary().endswith("x.json: 1 samples (2 left out: empty response)")


GOOD = [{"messages": says(f"A{i}", "B", "C", "D")} for i in range(40)]
LATE = {"messages": [SYSTEM, *says("E", "F", names=("assistant", "user"))]}
LATER = {"conversations": says("E", "F", "G", names=("gpt", "human"), keys=("from", "value"))}
OPEN = {"messages": says("A", "B", "C")}
UNANSWERED = {"messages": [SYSTEM, *says("A")]}


def test_dialogues_that_begin_with_the_assistant_or_end_with_the_user(tmp_path):
    """Real data sets hold some: they are left out or shortened, and counted."""
    path = write(tmp_path / "x.jsonl", [LATE, *GOOD, OPEN, LATER, OPEN, UNANSWERED])
    data = Instructions(path, "all", T, PLAIN, 99)
    assert data.summary() == (
        f"{path}: 42 samples (2 left out: begins with the assistant; 1 left out: no reply; "
        "2 shortened: last user turn dropped)"
    )
    texts = [T.text(ids) for ids, _ in data.batch(0, len(data))]
    assert texts.count("<s>A\nB</s>") == 2 and not any("E" in text for text in texts)
    whole = Instructions(write(tmp_path / "y.jsonl", GOOD), "all", T, PLAIN, 99)
    assert {"<s>A\nB</s>", *(T.text(ids) for ids, _ in whole.batch(0, 40))} == set(texts)
    parts = [Instructions(path, split, T, PLAIN, 99) for split in ("train", "val")]
    assert sum((part.counts for part in parts), instruct.collections.Counter()) == data.counts
    assert sum(map(len, parts)) == len(data)
    # prompts may end with the user; without the assistant's last reply they are prompts, too
    prompts = InstructPrompts(path, "all", T, PLAIN, 99)
    assert prompts.counts == {
        "left out: begins with the assistant": 2,
        "left out: duplicate prompt": 1,
    }
    texts = {T.text(ids) for ids in prompts.batch(0, len(prompts))}
    expected = {f"<s>A{i}\nB</s><s>C\n" for i in range(40)}
    assert texts == expected | {"<s>A\nB</s><s>C\n", "<s>S\nA\n"}
    pair = {"prompt": "p", "chosen": "a", "rejected": "b"}
    late = {"chosen": LATE["messages"][1:2], "rejected": LATER["conversations"]}
    data = Rankings(write(tmp_path / "x.jsonl", [late, pair]), "all", T, PLAIN, 99)
    assert data.counts == {"left out: begins with the assistant": 1} and len(data) == 1


@pytest.mark.parametrize("records", [[LATE], [OPEN], [UNANSWERED], [LATE, OPEN, UNANSWERED]])
def test_a_file_of_nothing_but_irregular_dialogues_is_refused(records, tmp_path):
    path = write(tmp_path / "x.jsonl", records)
    with pytest.raises(
        ValueError, match=r"x\.jsonl, line 1: messages must be by user and assistant"
    ):
        Instructions(path, "all", T, PLAIN, 99)
    with pytest.raises(ValueError, match="line 2: messages must be by user and assistant in turn"):
        read(write(tmp_path / "x.jsonl", [*GOOD[:1], *records]))


@pytest.mark.parametrize(
    "messages",
    [
        [*says("A"), *says("A", "B")],
        [*says("A", "B"), says("", "B")[1]],
        [*says("A", "B"), SYSTEM],
        [says("", "B")[1], *says("A"), *says("A", "B")],
        [*says("A", "B", "C"), *says("D")],
        [SYSTEM],
        [{"role": "tool", "content": "x"}],
    ],
)
def test_messages_out_of_order_are_refused(messages, tmp_path):
    path = write(tmp_path / "x.jsonl", [*GOOD, {"messages": messages}])
    for kind in Instructions, InstructPrompts:
        with pytest.raises(ValueError, match=r"x\.jsonl, line 41: .*user(,| and) assistant"):
            kind(path, "all", T, PLAIN, 99)


def test_rankings(tmp_path):
    def found(records, max_len=99):
        data = Rankings(write(tmp_path / "x.json", records), "all", T, PLAIN, max_len)
        return [
            (T.text(p), [T.text(c) for c in cs]) for p, cs in data.batch(0, len(data))
        ], data.counts

    three = {"prompt": "p", "completions": ["a", "bbb", "cc"]}
    kept = ("<s>p\n", ["a</s>", "bbb</s>", "cc</s>"])
    assert found([three]) == ([kept], {})
    assert found([three], 7) == ([kept], {})
    assert found([three], 6) == (
        [("<s>p\n", ["a</s>", "cc</s>"])],
        {"shortened: fewer completions": 1},
    )
    rest = [
        ({"prompt": "p", "chosen": "a", "rejected": "a"}, "chosen equal to rejected"),
        ({"prompt": "p", "chosen": "a", "rejected": ""}, "empty response"),
        ({"prompt": "p", "response": "a"}, "one completion, nothing to compare"),
        ({"prompt": "p", "chosen": "a", "rejected": "b" * 99}, "too long"),
        (SHAPES[8][0], "the dialogues differ before the last reply"),
    ]
    assert found([three, *(r for r, _ in rest)]) == (
        [kept],
        {f"left out: {why}": 1 for _, why in rest},
    )
    doubled = {"prompt": "p", "completions": ["a", "b", "a"]}
    assert found([doubled]) == (
        [("<s>p\n", ["a</s>", "b</s>"])],
        {"shortened: fewer completions": 1},
    )
    with pytest.raises(ValueError, match="nothing to use"):
        found([rest[0][0]])
    with pytest.raises(ValueError, match="0 samples: too few to hold some out: .* --val_data"):
        Rankings(write(tmp_path / "x.json", [three]), "val", T, PLAIN, 99)
    chat = SHAPES[5][0]
    n = len("-A\nB--C\nE\n\nE-")
    assert found([chat], n)[0] == [("<s>A\nB</s><s>C\n", ["D</s>", "E\n\nE</s>"])]
    newest = [("<s>C\n", ["D</s>", "E\n\nE</s>"])]
    assert found([chat], n - 1) == (newest, {"shortened: oldest turns dropped": 1})
    # a completion that is too long even without them costs the others no turns
    system = {"role": "system", "content": "S" * 5}
    for messages in says("A", "B", "C"), [system, *says("A", "B", "C")]:
        long = {"prompt": messages, "completions": ["D", "F" * 99, "E"]}
        [(prompt, completions)], counts = found([long], 30)
        assert prompt.endswith("A\nB</s><s>C\n") and completions == ["D</s>", "E</s>"]
        assert counts == {"shortened: fewer completions": 1}


def test_prompts(tmp_path):
    path = write(tmp_path / "x.json", [SHAPES[5][0], SHAPES[5][0], SHAPES[0][0]])
    data = InstructPrompts(path, "all", T, PLAIN, 10)
    assert sorted(map(T.text, data.batch(0, 2))) == ["<s>A\nB</s><s>C\n", "<s>Add.\n1 2\n"]
    assert data.counts == {"left out: duplicate prompt": 1}
    data = InstructPrompts(path, "all", T, PLAIN, 7)
    assert list(map(T.text, data.batch(0, len(data)))) == ["<s>C\n"]
    assert data.counts["left out: prompt too long"] == 1


def test_a_system_prompt_needs_a_template_with_system(tmp_path):
    path = write(tmp_path / "x.json", [SHAPES[2][0]])
    with pytest.raises(ValueError, match="has no place"):
        Instructions(path, "all", T, Template("{bos}{user}{reply}{eos}"), 99)


# ----------------------------------------------------------------------------
# the story task


STORY = """\
Once upon a time, there was a dog named Max. Max had a red ball. He took it to the park. \
The ball fell into the lake. Max was sad. A big frog saw it. The frog gave the ball back \
to Max. Max said, "Thank you, frog!" They played with the ball all day and sat in the \
sun. It was warm and the birds sang for them. After that, they ran home. Max and the \
frog were very happy."""


def test_stop_ids_of_tokenizer_template_and_checkpoint():
    template = Template("{bos}{user}{reply}<|end|>")
    assert stop_ids(T, template) == {1, 2, 3}
    assert stop_ids(T, template, [9, 11]) == {1, 2, 3, 9, 11}


def test_gold_by_hand():
    def parts(prompt, story=STORY):
        return instruct.judge(prompt, story)

    n = len(STORY.split())
    assert 60 <= n <= 110
    assert parts("Words: dog, lake, frog. End: happy. Length: short.") == (1, 1, 1)
    assert parts("Words: dog, cow, lake. End: lesson. Length: short.") == (2 / 3, 0, 1)
    assert parts("Words: bird. End: home. Length: long.") == (1, 1, 1 - (110 - n) / 40)
    assert parts("Words: bird.") == (1, 1, 1)
    assert parts("Words: doll.", "A dolls. A dolly.") == (1, 1, 1)
    assert parts("Words: doll.", "A dolly.") == (0, 1, 1)
    assert parts("Words: dog. Length: short.", "dog " * 30)[2] == 0.25
    assert parts("Words: dog. Length: short.", "dog " * 200)[2] == 0
    for ending, last in {
        "happy": "They hugged.",
        "sad": 'He said, "I cried."',
        "lesson": "He learned to share.",
        "friends": "They shared it.",
    }.items():
        assert instruct.has_ending(f"One. Two. {last}", ending)
        assert not instruct.has_ending(f"{last} One. Two.", ending)  # not in its last two sentences
        assert not instruct.has_ending(f"One. Two. {last} Then", ending)  # not finished
    one = "<s>Words: dog, cow. End: happy. Length: short.\n"  # with what a template puts around it
    assert instruct.gold([one, one], [STORY, ""]) == [0.875, 0]
    for bad in "Tell me of a dog.", "Words: dog. End: never.", "Words: dog. Length: huge.":
        with pytest.raises(ValueError, match="is not an instruction of the story task"):
            instruct.gold([bad], [STORY])


def test_gold_is_a_reward_for_ppo():
    reward = load_reward(f"{instruct.__file__}:gold", 0, T.text)
    prompt, story = ([ord(c) for c in s] for s in ("Words: dog, cow.\n", STORY))
    assert reward([prompt], [story], None) == [0.875]


@pytest.fixture(scope="module")
def task(tmp_path_factory):
    """A data folder of synthesized stories with the task made from them."""
    folder = tmp_path_factory.mktemp("task")
    tinystories.synthesize(str(folder), 600, 1)
    instruct.main(["stories", f"--data_dir={folder}"])
    return folder


def test_an_instruction_has_three_words_where_the_story_has_them():
    found = {instruct.make_instruction(STORY, random.Random(i)) for i in range(20)}
    assert len(found) > 5 and all(text.count(",") == 2 for text in found)
    assert all(text.endswith(" End: home. Length: short.") for text in found)


def test_instructions_can_be_fulfilled(task):
    """The words are in the order of the story, and no record occurs twice."""
    sft, val = (read(str(task / f"task/{n}.jsonl")) for n in ("sft", "val"))
    assert len(sft) > 300 and len(val) > 10
    stories = [{r.completions[0] for r in records} for records in (sft, val)]
    assert not stories[0] & stories[1]
    for r in sft + val:
        prompt = r.turns[0][0]
        assert instruct.gold([prompt], r.completions) == [1.0]
        words = prompt.split(".")[0].removeprefix("Words: ").split(", ")
        assert len(set(words)) == len(words) in (2, 3) and set(words) <= instruct.WORDS
        places = [re.search(rf"\b{w}\b", r.completions[0].lower()).start() for w in words]
        assert places == sorted(places)
    for records in (sft, val):
        assert len({(r.turns[0][0], r.completions[0]) for r in records}) == len(records)
    pairs = [(r.turns[0][0], *r.completions) for r in read(str(task / "task/pairs.jsonl"))]
    for prompt, *stories in pairs:
        better, worse = instruct.gold([prompt] * 2, stories)
        assert better == 1 and worse <= 0.9
    asked = [(r.turns[0][0], r.completions[0]) for r in sft]
    for (prompt, story), (_, other) in zip(asked, asked[1:]):
        assert ((prompt, story, other) in pairs) == (instruct.gold([prompt], [other])[0] <= 0.9)


def test_the_task_is_deterministic(task, tmp_path):
    first = (task / "task/sft.jsonl").read_bytes()
    instruct.main(["stories", f"--data_dir={task}"])
    assert (task / "task/sft.jsonl").read_bytes() == first
    (tmp_path / "x.json").write_text('["Too short.", "Also."]')
    with pytest.raises(ValueError, match="too few stories"):
        instruct.main(["stories", f"--data_dir={tmp_path}"])
    assert not (tmp_path / "task").exists()
    (tmp_path / "a.json").write_text((task / "TinyStories_all_data/data00.json").read_text())
    with pytest.raises(ValueError, match="too few stories"):  # of the second file, after the first
        instruct.main(["stories", f"--data_dir={tmp_path}"])
    assert not (tmp_path / "task").exists()


def test_an_interrupted_task_lacks_the_file_that_make_looks_for(task, monkeypatch):
    """Makefile takes the task as made where sft.jsonl exists."""
    written = []
    monkeypatch.setattr(instruct, "write_jsonl", lambda path, _: written.append(path))
    instruct.main(["stories", f"--data_dir={task}"])
    assert len(written) == 3 and written[-1].endswith("sft.jsonl")


def assert_the_end_is_held_out(folder, stories):
    """The last 30 stories are those of val.jsonl, and the others those of sft.jsonl."""
    sft, val = (
        {r.completions[0] for r in read(str(folder / f"task/{n}.jsonl"))} for n in ("sft", "val")
    )
    ends = {" ".join(s.split()) for s in stories[-30:]}
    assert val <= ends and not sft & ends and len(val) > 10 and len(sft) > 300


def test_the_task_of_a_single_file_holds_out_its_end(task, tmp_path, capsys):
    files = sorted((task / "TinyStories_all_data").iterdir())
    stories = [item["story"] for path in files for item in json.loads(path.read_text())]
    (tmp_path / "all.json").write_text(json.dumps(stories))
    instruct.main(["stories", f"--data_dir={tmp_path}"])
    assert "its last 30 stories are for validation" in capsys.readouterr().out
    assert_the_end_is_held_out(tmp_path, stories)


def test_the_task_of_many_small_files_holds_out_the_end_of_all(task, tmp_path, capsys):
    """As pretraining does: with a file per story, the first file has too few for validation."""
    files = sorted((task / "TinyStories_all_data").iterdir())
    stories = [item["story"] for path in files for item in json.loads(path.read_text())]
    for i, story in enumerate(stories):
        (tmp_path / f"{i:04}.txt").write_text(story)
    instruct.main(["stories", f"--data_dir={tmp_path}"])
    assert "the 600 small files are read as one: their last 30 stories" in capsys.readouterr().out
    assert_the_end_is_held_out(tmp_path, stories)
    # by the shards, where there are some
    assert tinystories.read_as_one(str(tmp_path))
    (tmp_path / "tok512").mkdir()
    for i in range(30):
        (tmp_path / f"tok512/{i}.bin").write_bytes(b"0" * 10_000)
    assert not tinystories.read_as_one(str(tmp_path))


def test_pairs_of_a_model_are_ranked_by_gold(task, tmp_path, monkeypatch):
    """With stories that fulfill the instruction to different degrees in place of a model's. Empty
    stories and stories without an end token are left out."""
    asked, texts = [], [("A cat.", True), (STORY, True), (STORY + " And", False), ("", True)]

    def generate_stories(args, prompts, n):
        asked[:] = prompts
        return [texts[:n] for _ in prompts]

    monkeypatch.setattr(instruct, "generate_stories", generate_stories)
    out = tmp_path / "pairs.jsonl"
    instruct.main(["pairs", f"--data_dir={task}", f"--output={out}", "--prompts=50"])
    want = {}
    for prompt in asked:
        short, long = instruct.gold([prompt] * 2, ["A cat.", STORY])
        if abs(long - short) >= 0.1:
            want[prompt] = [STORY, "A cat."] if long > short else ["A cat.", STORY]
    rankings = read(str(out))
    assert {r.turns[0][0]: r.completions for r in rankings} == want and len(rankings) == len(want)
    assert 0 < len(want) <= len(asked) == 50
    before = (task / "task/pairs.jsonl").read_bytes()  # those of `stories`
    instruct.main(["pairs", f"--data_dir={task}", "--prompts=50"])
    assert (task / "task/own_pairs.jsonl").read_bytes() == out.read_bytes()
    assert (task / "task/pairs.jsonl").read_bytes() == before
    with pytest.raises(ValueError, match="generated no two complete stories"):
        instruct.main(["pairs", f"--data_dir={task}", "--completions=1"])
    for command in "pairs", "judge":
        with pytest.raises(ValueError, match="--temperature must not be negative"):
            instruct.main([command, f"--data_dir={task}", "--temperature=-1"])


def test_the_table_of_judge_by_hand(task, capsys, monkeypatch):
    """Mean scores over prompts; `all words` counts the stories that have every word."""
    stories = {}

    def generate_stories(args, prompts, n):
        assert n == 1 and len(prompts) == 3
        some = re.search(r"Words: (\w+),", prompts[1])[1]  # one of the words
        stories.update(zip(prompts, [STORY, some, STORY + " ball bear bell"]))
        return [[(stories[p], i < 2)] for i, p in enumerate(prompts)]

    monkeypatch.setattr(instruct, "generate_stories", generate_stories)
    instruct.main(["judge", f"--data_dir={task}", "--checkpoint=a.pt,b.pt", "--prompts=3"])
    parts = [instruct.judge(p, s) for p, s in stories.items()]
    words, ending, length = (sum(x) / 3 for x in zip(*parts))
    gold = words / 4 + ending / 2 + length / 4
    every = sum(share == 1 for share, *_ in parts) / 3
    row = f"{gold:.3f} {every:.1%} {words:.1%} {ending:.1%} {length:.1%} {2 / 3:.1%}"
    rows = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    assert f"{row} a.pt" in rows and f"{row} b.pt" in rows and every < words


def test_stories_are_generated_at_the_temperature_given(tmp_path, monkeypatch):
    """In the whole context, up to an end token."""
    tinystories.synthesize(str(tmp_path), 100, 1)
    tinystories.train_vocab(str(tmp_path), 320)
    shape = dict(dim=16, n_layers=1, n_heads=2, vocab_size=320, multiple_of=8, max_seq_len=40)
    net = model.Transformer(model.ModelArgs(**shape))
    parts = {"model": net.state_dict(), "model_args": checkpoint_args(net.args)}
    save_checkpoint(tmp_path / "ckpt.pt", parts)
    (tmp_path / "task").mkdir()
    rows = [{"prompt": f"Words: {w}, cat.", "response": "x"} for w in ("dog", "bird", "ball")]
    write(tmp_path / "task/val.jsonl", rows)
    generate, calls = model.generate, []

    def spy(net, ids, room, *how, **more):
        calls.append((ids, room, how, more["stop_ids"]))
        return generate(net, ids, room, *how, **more)

    monkeypatch.setattr(model, "generate", spy)
    for temperature in (0, 0.3):
        flags = f"judge --data_dir={tmp_path} --checkpoint={tmp_path}/ckpt.pt --device=cpu"
        flags += f" --tokenizer={tmp_path}/tok320.model --temperature={temperature}"
        instruct.main(flags.split())
        ids, room, how, stops = calls.pop()
        assert how == (temperature,) and len(ids) == 3 and {1, 2} <= set(stops)
        assert room + max(map(len, ids)) == 40
