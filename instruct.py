"""
Instructions and preferences: read them, put them into a template, deal them to training. And a task
that is made here, from any stories, of which it is known what is right:

    python instruct.py stories                              # data/task/{sft,val,pairs}.jsonl
    python instruct.py pairs --checkpoint=out/sft_ckpt.pt   # own_pairs.jsonl, of its stories
    python instruct.py judge --checkpoint=out/sft_ckpt.pt   # how well does a model obey?

A file is JSON (a list) or JSONL (an object a line); its records may have any of these shapes:

    {"instruction", "input", "output"}          "input" may be missing or empty
    {"prompt", "response"}
    {"messages": [{"role", "content"}, ...]}    system (at most one, first), user and assistant
    {"prompt", "chosen", "rejected"}            or "instruction" and "input" instead of "prompt"
    {"chosen", "rejected"}                      whole dialogues with Human: and Assistant: turns
    {"prompt", "completions"}                   two or more, the best first
"""

import argparse
import collections
import hashlib
import itertools
import json
import os
import random
import re
from typing import NamedTuple

import numpy as np

from tinystories import Dealer, read_stories, story_files
from tokenizer import Tokenizer, find_tokenizer, parse_args, run_main, write_atomic

# -----------------------------------------------------------------------------
# The template

class Template(NamedTuple):
    """
    How a dialogue is written for a model: `turn` is one exchange; `system` the first one where
    there is a system prompt; `next` those after the first, if they differ. In them {bos} and {eos}
    are the control tokens, {system} and {user} text, {reply} is what the model writes. The token
    after {reply} ends a reply.

    A template is cut at its tokens before text goes in, so that no text can become a control token.
    Replies are texts of their own.
    """
    turn: str
    system: str = ""
    next: str = ""

    def sides(self, tokenizer, form, user, system=""):
        """The ids of one exchange before and after {reply}."""
        special = {"{bos}": tokenizer.bos_id, "{eos}": tokenizer.eos_id,
                   **tokenizer.special}
        cut = "|".join(re.escape(s) for s in sorted(special, key=len, reverse=True))
        text = {"{user}": user, "{system}": system}
        sides = []
        for side in form.split("{reply}"):
            ids = []
            for piece in re.split(f"({cut})", side):
                if piece in special:
                    ids.append(special[piece])
                elif piece:
                    piece = re.sub(r"\{user\}|\{system\}", lambda m: text[m[0]], piece)
                    ids += tokenizer.encode(piece, bos=False, eos=False)
            sides.append(ids)
        return sides

    def dialogue(self, tokenizer, turns, system=""):
        """
        The ids of a dialogue and, for each, whether the model is to learn it: replies and their
        end tokens. `turns` are pairs (user, reply); a reply is text, or ids as the model wrote
        them, without the end token; after a reply that is None nothing comes.
        """
        ids, mask = [], []
        def add(more, learn):
            ids.extend(more)
            mask.extend([learn] * len(more))
        tail = []
        for i, (user, reply) in enumerate(turns):
            form = self.system if system and not i else self.next if self.next and i else self.turn
            before, after = self.sides(tokenizer, form, user, "" if i else system)
            add(tail + before, False)
            if reply is None:
                break
            if isinstance(reply, str):
                reply = tokenizer.encode(reply, bos=False, eos=False)
            add([*reply, after[0]], True)
            tail = after[1:]  # what stands between two exchanges
        return ids, mask

    def prompt(self, tokenizer, turns, system=""):
        """The ids up to the reply of the last of `turns`, whose own reply does not matter."""
        return self.dialogue(tokenizer, [*turns[:-1], (turns[-1][0], None)], system)[0]

    def fit(self, tokenizer, turns, system, room):
        """
        The newest of `turns` whose prompt has at most `room` tokens; the system prompt stays.
        Without any of them if not even the last turn fits.
        """
        for first in range(len(turns)):
            if len(self.prompt(tokenizer, turns[first:], system)) <= room:
                return turns[first:]
        return []

    def end(self, tokenizer):
        """The id of the token that ends a reply."""
        return self.sides(tokenizer, self.turn, "")[1][0]

    def stops(self, tokenizer, end_ids=()):
        """The ids at which a reply ends: `end_ids` are those that a checkpoint adds."""
        return {*tokenizer.stop_ids, self.end(tokenizer), *end_ids}

    def check(self, tokenizer):
        """The template itself; ValueError where it is malformed or the tokenizer does not fit."""
        special = tokenizer.special
        for form in filter(None, self):
            for name, n in ("user", 1), ("reply", 1), ("system", form is self.system):
                if form.count(f"{{{name}}}") != n:
                    raise ValueError(f"template {form!r}: {{{name}}} must be in it "
                                     f"{'once' if n else 'in its form `system` only'}")
            for name, i in ("bos", tokenizer.bos_id), ("eos", tokenizer.eos_id):
                if f"{{{name}}}" in form and i < 0:
                    raise ValueError(f"template {form!r}: the tokenizer has no {name.upper()}")
            for name in re.findall(r"<\|[^|<>]*\|>", form):
                if name not in special:
                    raise ValueError(f"template {form!r}: {name} is no token of this tokenizer")
            after = form.split("{reply}")[1]
            if not after.startswith(("{bos}", "{eos}", *special)):
                raise ValueError(f"template {form!r}: a token must follow {{reply}} and end it")
        return self

TEMPLATES = {
    # Short, for small vocabularies, where each of these characters may be a token
    "plain": Template("{bos}{user}\n{reply}{eos}", "{bos}{system}\n{user}\n{reply}{eos}"),
    "llama2": Template("{bos}[INST] {user} [/INST]{reply}{eos}",
                       "{bos}[INST] <<SYS>>\n{system}\n<</SYS>>\n\n{user} [/INST]{reply}{eos}"),
}

def find_template(name, checkpoint, tokenizer, default="llama2"):
    """
    The template of a model: that of its checkpoint (a dict), else what `name` says, one of
    TEMPLATES or a JSON file {"turn": ..., "system": ...}, else `default`. Raises ValueError where
    both are there and differ, or the tokenizer does not fit; OSError.
    """
    kept = checkpoint.get("template")
    if kept:
        kept = Template(kept["turn"], kept.get("system", ""), kept.get("next", ""))
    if name.endswith(".json"):
        with open(name, encoding="utf-8-sig") as f:
            try:
                given = Template(**json.load(f))
            except (ValueError, TypeError) as e:
                raise ValueError(f"{name} is no template, {{\"turn\": ..., \"system\": ...}}: {e}")
        if not all(isinstance(form, str) for form in given) or not given.turn:
            raise ValueError(f'{name}: "turn" and "system" must be text')
    elif name and name not in TEMPLATES:
        raise ValueError(f"--template={name}: expected {', '.join(TEMPLATES)} or a .json file")
    else:
        given = TEMPLATES.get(name)
    if kept and given and kept != given:
        raise ValueError(f"--template={name}: the checkpoint was trained with another template, "
                         f"{kept.turn!r}")
    return (kept or given or TEMPLATES[default]).check(tokenizer)

# -----------------------------------------------------------------------------
# Files

class Record(NamedTuple):
    """
    turns        [(user, reply), ..., (user, None)]: the dialogue up to the reply in question
    system       the system prompt, or ""
    completions  the replies, best first; one where nothing is known to be worse
    """
    turns: list
    system: str
    completions: list

def read(path):
    """The records of a JSON or JSONL file. ValueError naming file and line; OSError."""
    records = []
    for line, item in items(path):
        try:
            records.append(record(item))
        except ValueError as e:
            raise ValueError(f"{path}, line {line}: {e}") from None
    if not records:
        raise ValueError(f"{path} holds no record")
    return records

def items(path):
    """Yields the number of its first line and the value of each item of a JSON or JSONL file."""
    if os.path.isdir(path):
        raise ValueError(f"{path} is a folder: name a JSON or JSONL file of instructions")
    with open(path, encoding="utf-8-sig") as f:
        try:
            text = f.read()
        except UnicodeDecodeError as e:
            raise ValueError(f"{path} is not UTF-8 text: {e}") from None
    line = 1
    try:
        if not text.lstrip().startswith("["):
            for line, one in enumerate(text.split("\n"), 1):
                if one.strip():
                    yield line, json.loads(one)
            return
        # one by one, so that each is known by its line
        decoder, space = json.JSONDecoder(), re.compile(r"\s*")
        at = space.match(text, text.index("[") + 1).end()
        line = 1 + text.count("\n", 0, at)
        while text[at:at + 1] != "]":
            item, end = decoder.raw_decode(text, at)
            yield line, item
            end = space.match(text, end).end()
            line += text.count("\n", at, end)
            if text[end:end + 1] not in (",", "]"):
                raise json.JSONDecodeError("expected , or ] after an item", text, end)
            comma = text[end] == ","
            at = space.match(text, end + comma).end()
            line += text.count("\n", end, at)
            if comma and text[at:at + 1] == "]":
                raise json.JSONDecodeError("expected an item after the comma", text, at)
        if text[at + 1:].strip():
            raise json.JSONDecodeError("there is more after the list", text, at + 1)
    except json.JSONDecodeError as e:
        line = e.lineno if text.lstrip().startswith("[") else line
        raise ValueError(f"{path}, line {line}: not JSON: {e.msg}") from None
    except RecursionError:
        raise ValueError(f"{path}, line {line}: not JSON: nested too deeply") from None

def record(item):
    """One item as a Record. Raises ValueError saying what is wrong with it."""
    if not isinstance(item, dict):
        raise ValueError(f"expected an object, not {type(item).__name__}")
    def text(key, value=None):
        value = item.get(key) if value is None else value
        if not isinstance(value, str):
            what = "missing" if value is None else f"no text but {type(value).__name__}"
            raise ValueError(f'"{key}" is {what}')
        return value.encode(errors="replace").decode().strip()  # JSON can spell non-text
    system = text("system") if "system" in item else ""
    if "messages" in item:
        turns, system = read_messages(item["messages"], text)
        return Record([*turns[:-1], (turns[-1][0], None)], system, [turns[-1][1]])
    if "prompt" in item or "instruction" in item:
        user = text("prompt") if "prompt" in item else text("instruction")
        if "prompt" not in item and item.get("input"):
            user += "\n" + text("input")
        # a prompt may be a dialogue too, up to the open Assistant:
        turns = read_dialogue(user + "\n\nAssistant:" * (not user.endswith("\n\nAssistant:"))) \
            if user.startswith("Human:") else [(user, "")]
        turns = [*turns[:-1], (turns[-1][0], None)]
        if not turns[-1][0]:
            raise ValueError("the prompt is empty")
    elif "chosen" in item:
        chosen, rejected = (read_dialogue(text(k)) for k in ("chosen", "rejected"))
        if [*chosen[:-1], chosen[-1][0]] != [*rejected[:-1], rejected[-1][0]]:
            # they part before the last reply: no two answers to one prompt
            return Record([*chosen[:-1], (chosen[-1][0], None)], system, [])
        turns = [*chosen[:-1], (chosen[-1][0], None)]
        return Record(turns, system, [chosen[-1][1], rejected[-1][1]])
    else:
        raise ValueError('it has none of "messages", "prompt", "instruction", "chosen"')
    if "completions" in item:
        completions = item["completions"]
        if not isinstance(completions, list) or len(completions) < 2:
            raise ValueError('"completions" must be a list of two or more')
        return Record(turns, system, [text("completions", c) for c in completions])
    if "chosen" in item:
        return Record(turns, system, [text("chosen"), text("rejected")])
    return Record(turns, system, [text("output" if "output" in item else "response")])

def read_messages(messages, text):
    """A list of messages -> [(user, reply), ...], system."""
    if not isinstance(messages, list) or not all(isinstance(m, dict) for m in messages):
        raise ValueError('"messages" must be a list of objects')
    said = [(m.get("role"), text("content", m.get("content"))) for m in messages]
    system = said.pop(0)[1] if said and said[0][0] == "system" else ""
    roles = [role for role, _ in said]
    if not said or roles != ["user", "assistant"] * (len(said) // 2):
        raise ValueError("messages must be user and assistant in turn, not "
                         + ", ".join(map(str, roles)))
    return [(a, b) for (_, a), (_, b) in zip(said[::2], said[1::2])], system

def read_dialogue(text):
    """
    "Human: a\\n\\nAssistant: b\\n\\nHuman: ..." -> [("a", "b"), ...], as in hh-rlhf. What one side
    says in two goes is one text. The last reply is "" where nothing comes after Assistant:.
    """
    parts = re.split(r"(?:^|\n\n)(Human|Assistant):", text)
    said = []
    for role, words in zip(parts[1::2], parts[2::2]):
        if said and said[-1][0] == role:
            said[-1] = role, f"{said[-1][1]}\n\n{words.strip()}"
        else:
            said.append((role, words.strip()))
    if parts[0].strip() or [r for r, _ in said] != ["Human", "Assistant"] * (len(said) // 2) \
            or not said:
        raise ValueError("a dialogue must begin with Human: and end with what Assistant: says")
    return [(a, b) for (_, a), (_, b) in zip(said[::2], said[1::2])]

# -----------------------------------------------------------------------------
# Dealing, as in tinystories.py: an epoch is a permutation of all samples, a position one number

HELD_OUT = 10  # one dialogue in so many, by a hash of how it begins, is for validation

def held_out(record):
    begin = f"{record.system}\n{record.turns[0][0]}".encode()
    return hashlib.sha256(begin).digest()[0] % HELD_OUT == 0

class Samples:
    """
    What the three classes below share.

        data       a file for read(), or several: "a.jsonl,b.json"
        split      "train" or "val": dialogues that begin alike are in the same; "all": no split
        max_len    tokens of the longest sample

    `counts` says how many samples were left out or shortened, and why; `summary()` tells it. A
    subclass has sample(record), which gives None for one that is left out.
    """
    def __init__(self, data, split, tokenizer, template, max_len, seed=1337):
        if split not in ("train", "val", "all"):
            raise ValueError(f"split must be train, val or all, not {split!r}")
        self.data, self.tokenizer, self.template, self.max_len = data, tokenizer, template, max_len
        records = itertools.chain.from_iterable(read(path) for path in data.split(","))
        self.counts, self.samples = collections.Counter(), []
        for r in records:
            if split == "all" or held_out(r) == (split == "val"):
                if r.system and not template.system:
                    raise ValueError(f"{data} has a system prompt, for which the template "
                                     f"{template.turn!r} has no place")
                sample = self.sample(r)
                if sample is not None:
                    self.samples.append(sample)
        if not self.samples:
            raise ValueError(self.summary() + (
                ": too few to hold some out: name others with --val_data" if split == "val"
                else ": nothing to use"))
        # validation is the same whatever the seed of the run
        self.dealer = Dealer([[len(self.samples)]], [1.0], 0 if split == "val" else seed)

    def __len__(self):
        return len(self.samples)

    def batch(self, position, n):
        """The n samples from `position` on."""
        return [self.samples[i] for i in self.dealer.deal(position, n)[2]]

    def summary(self):
        counts = "; ".join(f"{n:,} {why}" for why, n in sorted(self.counts.items()))
        return f"{self.data}: {len(self.samples):,} samples" + (f" ({counts})" if counts else "")

    def note(self, what, happened=True):
        if happened:
            self.counts[what] += 1

class Instructions(Samples):
    """
    What to answer: each sample is (ids, mask), two lists: the dialogue, and whether to learn each
    token of it, which holds for every reply and its end token. Of a ranking it is the best
    completion.

    A dialogue that is too long loses its oldest turns; a reply that is too long even so is cut at
    max_len, without an end token, lest the model learn to stop in the middle.
    """
    def sample(self, record):
        t, template, system = self.tokenizer, self.template, record.system
        reply = next(iter(record.completions), "")
        if not reply:
            return self.note("left out: empty response")
        length = len(t.encode(reply, bos=False, eos=False)) + 1
        turns = template.fit(t, record.turns, system, self.max_len - length) or record.turns[-1:]
        ids, mask = template.dialogue(t, [*turns[:-1], (turns[-1][0], reply)], system)
        if len(ids) - length >= self.max_len:
            return self.note("left out: prompt too long")
        self.note("shortened: oldest turns dropped", len(turns) < len(record.turns))
        self.note("shortened: reply cut", len(ids) > self.max_len)
        return np.array(ids[:self.max_len], np.int32), np.array(mask[:self.max_len])

    def batch(self, position, n):
        return [(ids.tolist(), mask.tolist()) for ids, mask in super().batch(position, n)]

class Rankings(Samples):
    """
    What is better: each sample is (prompt ids, [completion ids, best first]), at least two, each
    with its end token, prompt and completion together at most max_len.

    A dialogue that is too long loses its oldest turns; a completion that is too long even so, is
    empty or the same as another is left out, for a score is given to whole completions.
    """
    def sample(self, record):
        if not record.completions:
            return self.note("left out: the two dialogues part before the last reply")
        if len(record.completions) < 2:
            return self.note("left out: one completion, nothing to compare")
        if len(set(record.completions)) < 2:
            return self.note("left out: chosen equal to rejected")
        t, template = self.tokenizer, self.template
        whole = [c for c in dict.fromkeys(record.completions) if c]
        end = [template.end(t)]
        ids = [c + end for c in t.encode(whole, bos=False, eos=False)] if whole else []
        longest = max(map(len, ids), default=0)
        turns = template.fit(t, record.turns, record.system, self.max_len - longest)
        turns = turns or record.turns[-1:]
        prompt = template.prompt(t, turns, record.system)
        ids = [c for c in ids if len(prompt) + len(c) <= self.max_len]
        if len(ids) < 2:
            why = "empty response" if len(whole) < 2 else "too long"
            return self.note(f"left out: {why}")
        self.note("shortened: oldest turns dropped", len(turns) < len(record.turns))
        self.note("shortened: fewer completions", len(ids) < len(record.completions))
        return np.array(prompt, np.int32), [np.array(c, np.int32) for c in ids]

    def batch(self, position, n):
        return [(prompt.tolist(), [c.tolist() for c in completions])
                for prompt, completions in super().batch(position, n)]

class InstructPrompts(Samples):
    """
    What to be asked: prompts for PPO, lists of ids of at most max_len tokens, none of them twice.
    A dialogue that is too long loses its oldest turns.
    """
    def __init__(self, *args, **kwargs):
        self.seen = set()
        super().__init__(*args, **kwargs)

    def sample(self, record):
        turns = self.template.fit(self.tokenizer, record.turns, record.system, self.max_len)
        if not turns:
            return self.note("left out: prompt too long")
        prompt = np.array(self.template.prompt(self.tokenizer, turns, record.system), np.int32)
        if prompt.tobytes() in self.seen:
            return self.note("left out: prompt seen before")
        self.seen.add(prompt.tobytes())
        self.note("shortened: oldest turns dropped", len(turns) < len(record.turns))
        return prompt

    def batch(self, position, n):
        return [prompt.tolist() for prompt in super().batch(position, n)]

# -----------------------------------------------------------------------------
# The story task: an instruction says which words a story must have, how it ends, how long it is.
# What is asked of a story is what a real one has, so it can be done; and a rule, the gold reward,
# says how well it was done, so that every stage after it can be judged exactly.

WORDS = set("""
    dog cat bird ball tree flower boat car kite book hat box bear bunny rabbit frog fish
    duck mouse truck train doll cake apple cookie park garden lake beach forest farm hill
    river sea sun rain moon star sky bed cup door toy robot balloon bell stick rock leaf
    nest egg cow fox bee bug puppy kitten soup bread table chair store school castle drum
    ring puddle blanket
""".split())
ENDINGS = {  # what one of the last two sentences says; the rarest first
    "sad": "sad|cry|cried|cries|sorry|miss(ed)?",
    "home": "home|bed|bedtime|sleep|asleep|dinner",
    "lesson": "learn(ed|t)?|lesson|always|never|remember(ed)?|important|knew that",
    "friends": "friends?|together|share(d)?",
    "happy": "happy|happily|smiled?|laugh(ed)?|joy|glad|fun|hug(s|ged)?|proud|loved?",
}
LENGTHS = {"short": (60, 110), "long": (110, 160)}  # words
TOLERANCE = 40  # words beyond that at which nothing is left of the points for length

def has_word(story, word):
    return re.search(rf"\b{word}(s|es)?\b", story, re.I) is not None

def ends(story, ending):
    """Whether a finished story ends this way."""
    sentences = re.split(r"(?<=[.!?])[\"”']?\s+", story.strip())
    finished = re.search(r"[.!?][\"”']?$", story.strip())
    return bool(finished and re.search(rf"\b({ENDINGS[ending]})\b", " ".join(sentences[-2:]), re.I))

def judge(prompt, story):
    """
    How well a story does what a prompt asks: the share of the required words that it has, whether
    it ends as it should, and how well its length fits, each in [0, 1]. A part that was not asked
    for is done. Raises ValueError for a prompt that is none of this task.
    """
    asked = dict(re.findall(r"\b(Words|End|Length): ([a-z, ]+)\.", prompt))
    if "Words" not in asked or not asked.get("End", "sad") in ENDINGS \
            or not asked.get("Length", "short") in LENGTHS:
        raise ValueError(f"gold: {prompt[:60]!r} asks for no story of this task")
    words = asked["Words"].split(", ")
    share = sum(has_word(story, w) for w in words) / len(words)
    ending = "End" not in asked or ends(story, asked["End"])
    low, high = LENGTHS.get(asked.get("Length"), (0, 1e9))
    n = len(story.split())
    miss = max(low - n, n - high, 0)
    return share, float(ending), max(1 - miss / TOLERANCE, 0.0)

def gold(prompts, responses):
    """
    The gold reward, from 0 to 1: half of it for the ending, a quarter each for words and length.
    (Words weigh less, since a reward model of this size hardly learns to look for them.)
    For --reward=instruct.py:gold.
    """
    scores = (judge(p, r) for p, r in zip(prompts, responses))
    return [share / 4 + ending / 2 + length / 4 for share, ending, length in scores]

def ask(story, rng):
    """An instruction that this story obeys, or None: two or three of its words in their order."""
    n = len(story.split())
    length = next((k for k, (low, high) in LENGTHS.items() if low <= n <= high), None)
    found = dict.fromkeys(re.findall("[a-z]+", story.lower()))
    words = [w for w in found if w in WORDS]
    if length is None or len(words) < 2:
        return None
    words = [words[i] for i in sorted(rng.sample(range(len(words)), min(len(words), 3)))]
    ending = next((k for k in ENDINGS if ends(story, k)), None)
    end = f" End: {ending}." if ending else ""
    return f"Words: {', '.join(words)}.{end} Length: {length}."

def write_jsonl(path, records):
    with write_atomic(path, "w") as f:
        f.writelines(json.dumps(r) + "\n" for r in records)
    print(f"wrote {len(records):,} records to {path}")

def make_task(args):
    """sft.jsonl from the training stories, val.jsonl from the validation stories, pairs.jsonl: a
    story that obeys against another story, of which it is known that it does so less."""
    rng, folder = random.Random(args.seed), os.path.join(args.data_dir, "task")
    files = story_files(args.data_dir)
    for name, paths in ("val", files[:1]), ("sft", files[1:] or files):
        records, unique = [], set()
        for story in itertools.chain.from_iterable(map(read_stories, paths)):
            for _ in range(args.per_story):
                story = " ".join(story.split()).replace("“", '"').replace("”", '"')
                prompt = ask(story, rng)
                if prompt and (prompt, story) not in unique:
                    unique.add((prompt, story))
                    records.append({"prompt": prompt, "response": story})
        if len(records) < 2:
            raise ValueError(f"{args.data_dir}: too few stories of {LENGTHS['short'][0]} to "
                             f"{LENGTHS['long'][1]} words with two of the known words")
        rng.shuffle(records)
        write_jsonl(os.path.join(folder, f"{name}.jsonl"), records[:args.samples])
    pairs = []
    for one, other in zip(records, records[1:args.samples]):
        both = [one["response"], other["response"]]
        better, worse = gold([one["prompt"]] * 2, both)
        if better - worse >= args.margin:
            pairs.append({"prompt": one["prompt"], "chosen": both[0], "rejected": both[1]})
    write_jsonl(os.path.join(folder, "pairs.jsonl"), pairs)

def tell(args, prompts, n):
    """n stories for each prompt of a checkpoint: lists of (story, whether it ended by itself)."""
    import torch  # here: what reads files need not wait a second for it
    from model import generate, load_checkpoint, model_from_checkpoint
    from sample import choose_device
    checkpoint = load_checkpoint(args.checkpoint)
    model = model_from_checkpoint(checkpoint, dropout=0.0).to(choose_device(args.device)).eval()
    folder = os.path.dirname(os.path.abspath(args.checkpoint))
    tokenizer = Tokenizer(args.tokenizer or find_tokenizer(model.args.vocab_size, folder))
    template = find_template(args.template, checkpoint, tokenizer, "plain")
    ids = [template.prompt(tokenizer, [(p, None)]) for p in prompts for _ in range(n)]
    torch.manual_seed(args.seed)
    stops = template.stops(tokenizer, checkpoint.get("end_ids") or ())
    room = model.args.max_seq_len - max(map(len, ids))
    out = generate(model, ids, room, args.temperature, stop_ids=stops)
    texts = [tokenizer.decode(r).strip() for r in out.responses()]
    told = list(zip(texts, out.ended.tolist()))
    return [told[i:i + n] for i in range(0, len(told), n)]

def make_pairs(args):
    """Rankings of a model's own stories by the gold reward. Stories whose rewards differ by less
    than the margin are no pair."""
    rng = random.Random(args.seed)
    prompts = list(dict.fromkeys(r.turns[-1][0] for r in read(f"{args.data_dir}/task/sft.jsonl")))
    prompts = rng.sample(prompts, min(args.prompts, len(prompts)))
    rankings = []
    for prompt, told in zip(prompts, tell(args, prompts, args.completions)):
        stories = [story for story, ended in told if ended and story]
        ranking = []
        for score, story in sorted(zip(gold([prompt] * len(stories), stories), stories))[::-1]:
            if not ranking or ranking[-1][0] - score >= args.margin:
                ranking.append((score, story))
        if len(ranking) > 1:
            rankings.append({"prompt": prompt, "completions": [story for _, story in ranking]})
    if not rankings:
        raise ValueError(f"{args.checkpoint} told no two stories for a prompt that both ended and "
                         f"were {args.margin} apart")
    write_jsonl(args.output or f"{args.data_dir}/task/own_pairs.jsonl", rankings)

def print_judgement(args):
    """How well models obey, on held-out prompts."""
    prompts = [r.turns[-1][0] for r in read(f"{args.data_dir}/task/val.jsonl")]
    prompts = list(dict.fromkeys(prompts))[:args.prompts]
    print(f"{len(prompts)} held-out prompts, temperature {args.temperature}")
    print("gold   all words  words  ending  length  ended")
    for path in args.checkpoint.split(","):
        args.checkpoint = path
        told = [story for [story] in tell(args, prompts, 1)]
        parts = np.array([judge(p, story) for p, (story, _) in zip(prompts, told)])
        score = np.mean(gold(prompts, [story for story, _ in told]))
        share, ending, length = parts.mean(0)
        ended = np.mean([ended for _, ended in told])
        print(f"{score:.3f}  {np.mean(parts[:, 0] == 1):9.1%}  {share:5.1%}  {ending:6.1%}  "
              f"{length:6.1%}  {ended:5.1%}  {path}")
        print(f"  {prompts[0]} >>> {' '.join(told[0][0].split())}")

# -----------------------------------------------------------------------------

def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__)
    add = parser.add_argument
    add("stage", choices=["stories", "pairs", "judge"])
    add("--data_dir", default="data", help="where the stories lie; the task goes into its task/")
    add("--checkpoint", default="out/sft_ckpt.pt", help="the model; judge: or several: a.pt,b.pt")
    add("--tokenizer", default="", help="default: beside the checkpoint or in data/")
    add("--template", default="", help="of a checkpoint that has none; default: plain")
    add("--samples", type=int, default=20000, help="most records of a file that `stories` writes")
    add("--per_story", type=int, default=3, help="instructions made from a story")
    add("--prompts", type=int, default=500, help="of pairs and judge")
    add("--completions", type=int, default=4, help="stories told for each prompt, for pairs")
    add("--margin", type=float, default=0.1, help="least difference of rewards in a pair")
    add("--output", default="", help="of pairs; default: task/own_pairs.jsonl in the data folder")
    add("--temperature", type=float, default=1.0, help="of the stories that are told")
    add("--seed", type=int, default=1337, help="of all choices")
    add("--device", default="", help="cpu, cuda, cuda:1, mps; default: the best there is")
    args = parse_args(parser, argv)
    for name in "samples", "per_story", "prompts", "completions":
        if getattr(args, name) < 1:
            raise ValueError(f"--{name} must be at least 1, not {getattr(args, name)}")
    {"stories": make_task, "pairs": make_pairs, "judge": print_judgement}[args.stage](args)

if __name__ == "__main__":
    run_main(main)
