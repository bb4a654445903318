"""
Instructions and preferences: reads them, puts them into a template and deals them to training. Also
makes a task from any stories for which the right answers are known:

    python instruct.py stories                              # data/task/{sft,val,pairs}.jsonl
    python instruct.py pairs --checkpoint=out/sft_ckpt.pt   # own_pairs.jsonl, of its stories
    python instruct.py judge --checkpoint=out/sft_ckpt.pt   # how well does a model obey?

A file is JSON (a list, also as in {"data": [...]}) or JSONL (objects one after the other, each on
one line or on several). Its records may have these shapes; KEYS lists other names of the keys:

    {"instruction", "input", "output"}           "input" may be missing or empty
    {"prompt", "response"}                       PPO needs the prompts alone
    {"messages": [{"role", "content"}, ...]}     system (at most one, first), user and assistant
    {"conversations": [{"from", "value"}, ...]}  ShareGPT's spelling of messages
    {"prompt", "chosen", "rejected"}             each a text or messages; also without "prompt"
    {"chosen", "rejected"}                       whole dialogues with Human: and Assistant: turns
    {"prompt", "completions"}                    two or more, the best first

"system" and "history" may be beside them. A key that is neither used nor known to be harmless is
counted in the summary of the data, or refused where it changes the meaning of a record.
"""

import argparse
import collections
import hashlib
import itertools
import json
import os
import random
import re
import sys
from typing import NamedTuple

import common  # noqa: F401  first: it reports missing packages

# isort: split
import numpy as np

from common import flags_of_others, parse_args, printable, run_main, write_atomic
from tinystories import Dealer, items, quoted, read_stories, story_files
from tokenizer import own_tokenizer, stop_ids

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
        special = {"{bos}": tokenizer.bos_id, "{eos}": tokenizer.eos_id, **tokenizer.special}
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

    def check(self, tokenizer):
        """The template itself; ValueError where it is malformed or the tokenizer does not fit."""
        special = tokenizer.special
        for form in filter(None, self):
            for name, n in ("user", 1), ("reply", 1), ("system", form is self.system):
                if form.count(f"{{{name}}}") != n:
                    raise ValueError(
                        f"template {form!r}: {{{name}}} must be in it "
                        f"{'once' if n else 'in its form `system` only'}"
                    )
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


def ended(form):
    """A form of a template in which {eos} follows {reply} where only white space did."""
    before, reply, after = form.partition("{reply}")
    return form if after.strip() or not reply else f"{before}{{reply}}{{eos}}{after}"


TEMPLATES = {
    # Short, for small vocabularies, where each of these characters may be a token
    "plain": Template("{bos}{user}\n{reply}{eos}", "{bos}{system}\n{user}\n{reply}{eos}"),
    "llama2": Template(
        "{bos}[INST] {user} [/INST]{reply}{eos}",
        "{bos}[INST] <<SYS>>\n{system}\n<</SYS>>\n\n{user} [/INST]{reply}{eos}",
    ),
}


def find_template(name, checkpoint, tokenizer, default="llama2"):
    """
    The template of a model: what `name` says, one of TEMPLATES or a JSON file {"turn": ...,
    "system": ...}, else that of its checkpoint (a dict), else `default`. One line on stderr says
    where it is not the checkpoint's. TEMPLATES are without {bos} for a model whose text does not
    begin with BOS. Raises ValueError where the tokenizer does not fit; OSError.
    """
    kept = checkpoint.get("template")
    if kept:
        forms = (kept.get(form) or "" for form in ("turn", "system", "next"))
        kept = Template(*map(ended, forms))
    templates = TEMPLATES
    if tokenizer.bos_id < 0 or not checkpoint.get("bos", True):
        templates = {
            key: Template(*(form.replace("{bos}", "") for form in template))
            for key, template in TEMPLATES.items()
        }
    if name.endswith(".json"):
        with open(name, encoding="utf-8-sig") as f:
            try:
                given = Template(**json.load(f))
            except (ValueError, TypeError) as e:
                raise ValueError(f'{name} is no template, {{"turn": ..., "system": ...}}: {e}')
        if not all(isinstance(form, str) for form in given) or not given.turn:
            raise ValueError(f'{name}: "turn" and "system" must be text')
    elif name and name not in TEMPLATES:
        raise ValueError(f"--template={name}: expected {', '.join(TEMPLATES)} or a .json file")
    else:
        given = templates.get(name)
    template = (given or kept or templates[default]).check(tokenizer)
    if template != kept and os.environ.get("RANK", "0") == "0":
        if kept:
            print(
                f"note: --template={name} replaces the checkpoint's template {kept.turn!r}",
                file=sys.stderr,
            )
        elif not given:
            print(
                f"note: the checkpoint has no chat template: using {default}, "
                f"{template.turn!r}; --template names another",
                file=sys.stderr,
            )
    return template


# -----------------------------------------------------------------------------
# Files


class Record(NamedTuple):
    """
    turns        [(user, reply), ..., (user, None)]: the dialogue up to the reply in question
    system       the system prompt, or ""
    completions  the replies, best first; one where nothing is known to be worse
    ignored      the keys that are neither used nor known to be harmless
    irregular    how the messages differ from user and assistant in turn; "" where they do not.
                 `turns` is empty where nothing in the record can be used.
    """

    turns: list
    system: str
    completions: list
    ignored: tuple = ()
    irregular: str = ""


# The keys of a record by what they hold. Where a record has several of a row, the first one is
# read; of "context" all are read. Other keys are HARMLESS, REFUSED or counted as ignored.
KEYS = {
    "messages": ("messages", "conversations", "conversation", "data"),
    "prompt": ("prompt", "instruction", "query", "question", "problem", "input", "inputs"),
    "context": ("input", "context"),
    "history": ("history",),
    "system": ("system", "system_prompt", "system_message"),
    "reply": ("response", "output", "completion", "solution", "answer", "targets"),
    "chosen": ("chosen",),
    "rejected": ("rejected",),
    "completions": ("completions", "answers"),
}
RECORD_KEYS = {*KEYS["messages"], *KEYS["prompt"], *KEYS["chosen"]} - {"data"}  # one is in each
ROLES = {
    **dict.fromkeys(("user", "human", "prompter"), "user"),
    **dict.fromkeys(("assistant", "gpt", "chatgpt", "bard", "bing", "model", "bot"), "assistant"),
    **dict.fromkeys(("system", "developer"), "system"),
}
HARMLESS = set(
    """
    id idx index uuid hash url link source sources dataset subset split category categories type
    tags lang created created_at timestamp date author license model models model_name
    generation_model chosen_model rejected_model chosen-model rejected-model chosen_id rejected_id
    prompt_id message_id parent_id message_tree_id user_id conversation_id dialogue_id question_id
    original_index avg_rating score_chosen score_rejected chosen_score rejected_score chosen_rating
    rejected_rating chosen-rating rejected-rating num_turns num_responses
""".split()
)
GOOD_OR_BAD = "label", "kto_tag", "desirable"  # of KTO
REFUSED = {  # keys that change the meaning of a record, and what to do
    **dict.fromkeys(
        GOOD_OR_BAD,
        "it says which replies are bad, and those would be learned too: "
        "keep the good replies and remove the key",
    ),
    **dict.fromkeys(
        ("images", "image", "image_url", "audio", "audios", "video", "videos"),
        "only text can be learned: remove these records",
    ),
    **dict.fromkeys(
        ("tools", "functions", "tool_calls", "function_call"),
        "a template has no place for tools: remove these records",
    ),
}


def read(path, replies=True, lenient=False):
    """
    The records of a JSON or JSONL file; prompts alone are records where no `replies` are needed.
    Data sets of real conversations hold some that begin with the assistant or end with the user:
    with `lenient` these are read as irregular records, unless the file holds no other record.
    Raises ValueError that names file and line, and OSError.
    """
    if os.path.isdir(path):
        raise ValueError(f"{path} is a folder: name a JSON or JSONL file of instructions")
    records, first = [], None
    for place, item in items(path, RECORD_KEYS):
        first = first or (place, item)
        try:
            records.append(record(item, replies, lenient))
        except ValueError as e:
            raise ValueError(f"{path}, {place}: {e}") from None
    if not records:
        raise ValueError(f"{path} holds no record")
    if all(r.irregular for r in records):
        try:
            record(first[1], replies)
        except ValueError as e:
            raise ValueError(f"{path}, {first[0]}: {e}") from None
    return records


def text_of(value, key):
    """A text, or the text of a list of parts {"type": "text", "text": ...}."""
    if isinstance(value, list) and value and all(isinstance(x, dict) for x in value):
        others = [x.get("type") for x in value if x.get("type") != "text"]
        if others:
            raise ValueError(f'"{key}" has a part of type {others[0]!r}: only text can be learned')
        return "".join(text_of(x.get("text"), "text") for x in value)
    if not isinstance(value, str):
        what = "missing" if value is None else f"no text but {type(value).__name__}"
        raise ValueError(f'"{key}" is {what}')
    return value.encode(errors="replace").decode()  # JSON can spell what is no text


def record(item, replies=True, lenient=False):
    """
    One item as a Record; ValueError says what is wrong with it. A text stays as it is, except for
    the space that a format puts before a reply: after "Assistant:", and in "completion".
    `replies` and `lenient` are as in read().
    """
    if not isinstance(item, dict):
        raise ValueError(f"expected an object, not {type(item).__name__}")
    present = {k: v for k, v in item.items() if v not in (None, "", [], {})}
    for k in REFUSED.keys() & present.keys():
        marks = replies and isinstance(item[k], int)  # True and False are int too
        if marks or k not in GOOD_OR_BAD:
            raise ValueError(f'"{k}" changes the meaning of the record: {REFUSED[k]}')

    def find(part):  # the key that is read, which may be empty where no other is present
        keys = [k for k in KEYS[part] if item.get(k) is not None and fits.get(k, True)]
        return next((k for k in keys if k in present), keys[0] if keys else None)

    # "answers" are often other spellings of one answer, and "data" may be anything
    fits = {"answers": has_ranks(item.get("answers")), "data": is_strings(item.get("data"))}
    prompt, reply, messages = find("prompt"), find("reply"), find("messages")
    whole = next((k for k in (find("completions"), messages) if k in present), None)
    if find("chosen"):
        whole = "chosen"
    elif not whole and not prompt:
        whole = messages  # which is empty
    if not prompt and (not whole or whole in KEYS["completions"]):
        begins = (*KEYS["prompt"], *KEYS["messages"], "chosen")
        raise ValueError(f"it has {quoted(item)}, but none of {quoted(begins)}")

    # The messages before the replies, and whether the format puts a space before each reply
    begin, space, ignored = [], False, []
    used = {find("history"), find("system")}
    if find("history"):
        begin += read_messages(item["history"], "history", ignored)
    if prompt and whole not in KEYS["messages"]:
        more = [k for k in KEYS["context"] if k in present and k != prompt]
        used |= {prompt, *more}
        if isinstance(item[prompt], (list, dict)):
            begin += read_messages(item[prompt], prompt, ignored)
        else:
            user = text_of(item[prompt], prompt)
            if not user.strip():
                raise ValueError("the prompt is empty")
            space = user.lstrip().startswith("Human:")
            begin += read_dialogue(user, ends="user") if space else [("user", user)]
        if more:
            asked = [begin.pop()[1]] if begin and begin[-1][0] == "user" else []
            begin.append(("user", "\n".join([*asked, *(text_of(item[k], k) for k in more)])))
    elif whole == "chosen" and messages:
        asked = read_messages(item[messages], messages, ignored)
        if asked and asked[-1][0] == "user":
            used.add(messages)
            begin += asked

    # What follows: replies, or whole dialogues that may repeat the beginning
    def ending(value, k):
        listed = isinstance(value, list) and not is_parts(value)
        if listed or isinstance(value, dict) or k in KEYS["messages"]:
            return read_messages(value, k, ignored)
        value = text_of(value, k)
        if whole == "chosen" and (not begin or value.lstrip().startswith("Human:")):
            return read_dialogue(value, ends="assistant")
        if space or k == "completion" and value[1:2].strip():
            value = value.removeprefix(" ")
        return [("assistant", value)]

    if whole == "chosen":
        if replies and item.get("rejected") is None:
            raise ValueError(f'"rejected" is missing: it has {quoted(item)}')
        ends = [(item.get(k), k) for k in ("chosen", "rejected") if replies or k in present]
    elif whole in KEYS["completions"]:
        ends = [(x, whole) for x in ranking(item[whole], whole, ignored)]
    elif whole or reply:
        ends = [(item[whole or reply], whole or reply)]
    elif replies:
        first, *others = KEYS["reply"]
        raise ValueError(f'"{first}" is missing (or {quoted(others)}): it has {quoted(item)}')
    else:
        ends = []
    used.update(k for _, k in ends)

    said = [joined(begin, ending(*end)) for end in ends] or [begin]
    if any(s[: len(begin)] != begin for s in said):  # the prompt is not what the dialogue says
        used -= {prompt, find("history"), *KEYS["context"]}
    system = text_of(item[find("system")], find("system")) if find("system") else ""
    for s in said:
        if s and s[0][0] == "system":
            if system not in ("", s[0][1]):
                raise ValueError("it has two system prompts, which differ")
            system = s.pop(0)[1]
    irregular = irregularity(said, replies) if lenient else ""
    if irregular.startswith("left out"):
        return Record([], system, [], irregular=irregular)
    if irregular:
        said = [s[:-1] for s in said]
    dialogues = [exchanges(s, replies) for s in said]
    turns, completions = dialogues[0], [d[-1][1] for d in dialogues]
    turns = [*turns[:-1], (turns[-1][0], None)]
    if any([*d[:-1], (d[-1][0], None)] != turns for d in dialogues):
        completions = []  # they part before the last reply: no two replies to one prompt

    # Keys that are not used, unless they repeat what others say
    texts = {text.strip() for s in said for _, text in s} | {system.strip()}
    for k in present.keys() - used - HARMLESS:
        if not repeats(item[k], texts):
            ignored.append(k)
    completions = [c for c in completions if c is not None]
    return Record(turns, system, completions, tuple(sorted(set(ignored))), irregular)


def is_strings(value):
    return isinstance(value, list) and all(isinstance(x, str) for x in value)


def is_parts(value):
    """Whether a list is the parts of one text, and not a list of messages."""
    return bool(value) and all(
        isinstance(x, dict) and "type" in x and "role" not in x for x in value
    )


def read_messages(value, key, ignored):
    """
    [(role, text), ...] of one message or a list of them: {"role", "content"}, {"from", "value"},
    {"input", "output"}, [user, reply], or user and assistant in turn as mere strings. Adds the
    keys of messages that are not used to `ignored`.
    """
    said, strings = [], key in (*KEYS["messages"], *KEYS["history"])
    for m in value if isinstance(value, list) else [value]:
        if isinstance(m, str) and strings and isinstance(value, list):
            said.append(("assistant" if len(said) % 2 else "user", text_of(m, key)))
        elif isinstance(m, list) and len(m) == 2 and strings:
            said += zip(("user", "assistant"), (text_of(x, key) for x in m))
        elif not isinstance(m, dict):
            raise ValueError(f'"{key}" must be a list of objects with "role" and "content"')
        elif {"input", "output"} <= m.keys():
            names = {"input": "user", "output": "assistant"}
            ignored += unused(m, names, key)
            said += [(role, text_of(m[k], k)) for k, role in names.items()]
        else:
            role = m.get("role", m.get("from"))
            content = next((k for k in ("content", "value", "text") if k in m), "content")
            ignored += unused(m, {"role", "from", content}, key)
            if not isinstance(role, str) or role.lower() not in ROLES:
                raise ValueError(
                    f'"{key}" has a message of role {role!r}: expected user, assistant or system'
                )
            said.append((ROLES[role.lower()], text_of(m.get(content), content)))
    return said


def unused(message, used, key):
    """The names of the keys of a message or reply that are neither in `used` nor harmless."""
    present = {k: v for k, v in message.items() if v not in (None, "", [], {}) and k not in used}
    for k in REFUSED.keys() & present.keys():
        raise ValueError(f'"{k}" changes the meaning of a message: {REFUSED[k]}')
    flags = {"weight", "train", "loss"}  # which replies are learned
    if any(present.get(k, 1) == 0 for k in flags):
        raise ValueError(
            "a message says that it is not to be learned, but every reply is: remove this record"
        )
    return [f"{key}.{k}" for k in present.keys() - HARMLESS - flags]


def read_dialogue(text, ends):
    """
    "Human: a\\n\\nAssistant: b\\n\\nHuman: ..." -> [("user", "a"), ("assistant", "b"), ...], as in
    hh-rlhf. What one side says in two goes is one text. A dialogue that `ends` with "user" may have
    an open "Assistant:" after it; one that ends with "assistant" may have an empty last reply.
    """
    parts = re.split(r"(?:^|\n\n)(Human|Assistant):", text)
    said = []
    for name, words in zip(parts[1::2], parts[2::2]):
        role, words = ROLES[name.lower()], words.removeprefix(" ")
        if said and said[-1][0] == role:
            said[-1] = role, f"{said[-1][1]}\n\n{words}"
        else:
            said.append((role, words))
    if ends == "user" and said and not said[-1][1].strip():
        said.pop()
    if parts[0].strip() or not said or said[0][0] != "user" or said[-1][0] != ends:
        raise ValueError("a dialogue must begin with Human: and end with what Assistant: says")
    return said


def has_ranks(value):
    """Whether a value is a list of objects with different "rank"s, of which the lowest is best."""
    if not isinstance(value, list) or not all(isinstance(x, dict) for x in value):
        return False
    ranks = [x.get("rank") for x in value]
    return all(isinstance(r, (int, float)) for r in ranks) and len(set(ranks)) == len(ranks)


def ranking(value, key, ignored):
    """The replies of a list, which has them best first or with ranks, best first."""
    if not isinstance(value, list) or len(value) < 2:
        raise ValueError(f'"{key}" must be a list of two or more')
    if has_ranks(value):
        replies = []
        for x in sorted(value, key=lambda x: x["rank"]):
            k = next((k for k in (*KEYS["reply"], "text", "content") if k in x), "response")
            replies.append(x.get(k))
            ignored += unused(x, {k, "rank"}, key)
        return replies
    if any(isinstance(x, dict) and "role" not in x for x in value):
        raise ValueError(f'"{key}" must be replies, best first, or objects with different "rank"s')
    return value


def joined(begin, said):
    """A prompt and what follows, two lists of messages; what follows may repeat the prompt, or the
    end of it, or be a whole dialogue that another prompt begins."""
    bare = [[(role, text.strip()) for role, text in x] for x in (begin, said)]
    for n in range(min(len(begin), len(said)), 0, -1):
        if bare[0][-n:] == bare[1][:n]:
            return begin + said[n:]
    return [*said] if begin and said and begin[-1][0] == said[0][0] else begin + said


def irregularity(dialogues, replies):
    """
    How dialogues, lists of messages, differ from user and assistant in turn, for the summary of the
    data: "left out: ..." where nothing can be used, "shortened: ..." where the last message is to be
    dropped, "" where they do not differ or where exchanges() refuses them.
    """
    roles = [[role for role, _ in messages] for messages in dialogues]
    if not all(all(a != b for a, b in itertools.pairwise(r)) and "system" not in r for r in roles):
        return ""
    if all(r[:1] == ["assistant"] for r in roles):
        return "left out: begins with the assistant"
    if replies and len(roles) == 1 and roles[0][-1:] == ["user"]:
        return "shortened: last user turn dropped" if roles[0][1:] else "left out: no reply"
    return ""


def exchanges(said, replies):
    """[(user, reply), ...] of messages; without `replies` the last reply may be missing: None."""
    roles = [role for role, _ in said]
    odd = len(said) % 2
    if not said or roles != (["user", "assistant"] * len(said))[: len(said)] or odd and replies:
        roles = ", ".join(roles[:8] + ["..."] * (len(roles) > 8)) or "nothing"
        raise ValueError(f"messages must be user and assistant in turn, not {roles}")
    texts = [text for _, text in said] + [None] * odd
    return list(zip(texts[::2], texts[1::2]))


def repeats(value, texts):
    """Whether the value of a key that is not used says nothing but what `texts` say."""
    if isinstance(value, str):
        return value.strip() in texts
    if not isinstance(value, (list, dict)):
        return False
    others = []
    try:
        said = read_messages(value, "messages", others)
    except ValueError:
        return False
    return not others and all(text.strip() in texts for _, text in said)


# -----------------------------------------------------------------------------
# Dealing, as in tinystories.py: an epoch is a permutation of all samples, a position one number

HELD_OUT = 10  # one dialogue in so many, by a hash of how it begins, is for validation


def held_out(record):
    begin = f"{record.system}\n{record.turns[0][0] if record.turns else ''}".encode()
    return hashlib.sha256(begin).digest()[0] % HELD_OUT == 0


class Samples:
    """
    What the three classes below share.

        data       a file for read(), or several: "a.jsonl,b.json"
        split      "train" or "val": dialogues that begin alike are in the same; "all": no split
        max_len    tokens of the longest sample

    `counts` says how many samples were left out or shortened and why, and how many records have a
    key that is ignored; `summary()` is the line that says so. A subclass has sample(record), which
    returns None for a record that is left out, and `replies`: whether it needs any.
    """

    replies = True

    def __init__(self, data, split, tokenizer, template, max_len, seed=1337):
        if split not in ("train", "val", "all"):
            raise ValueError(f"split must be train, val or all, not {split!r}")
        self.data, self.tokenizer, self.template, self.max_len = data, tokenizer, template, max_len
        files = (read(path, self.replies, lenient=True) for path in data.split(","))
        records = itertools.chain.from_iterable(files)
        self.counts, self.samples = collections.Counter(), []
        # Some SentencePiece models, such as that of stories260K, remove and merge spaces.
        spaced, bare = (tokenizer.encode(s, bos=False, eos=False) for s in ("  a", "a"))
        for r in records:
            if split == "all" or held_out(r) == (split == "val"):
                self.note(r.irregular, bool(r.irregular))
                if not r.turns:
                    continue
                if r.system and not template.system:
                    raise ValueError(
                        f"{data} has a system prompt, for which the template "
                        f"{template.turn!r} has no place"
                    )
                for key in r.ignored:
                    self.note(f'with "{key}", which is ignored')
                if self.replies and spaced == bare:
                    spaces = any(re.search("^ |  | $", c) for c in r.completions)
                    self.note("with spaces in a reply that this tokenizer drops", spaces)
                sample = self.sample(r)
                if sample is not None:
                    self.samples.append(sample)
        if not self.samples:
            raise ValueError(
                self.summary()
                + (
                    ": too few to hold some out: name others with --val_data"
                    if split == "val"
                    else ": nothing to use"
                )
            )
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
        reply = next(iter(record.completions), None)
        if reply is None:
            return self.note("left out: the two dialogues part before the last reply")
        if not reply.strip():
            return self.note("left out: empty response")
        length = len(t.encode(reply, bos=False, eos=False)) + 1
        turns = template.fit(t, record.turns, system, self.max_len - length) or record.turns[-1:]
        ids, mask = template.dialogue(t, [*turns[:-1], (turns[-1][0], reply)], system)
        if len(ids) - length >= self.max_len:
            return self.note("left out: prompt too long")
        self.note("shortened: oldest turns dropped", len(turns) < len(record.turns))
        self.note("shortened: reply cut", len(ids) > self.max_len)
        return np.array(ids[: self.max_len], np.int32), np.array(mask[: self.max_len])

    def batch(self, position, n):
        return [(ids.tolist(), mask.tolist()) for ids, mask in super().batch(position, n)]


class OptionalInstructions(Instructions):
    """Those of records that have a reply; other records are left out."""

    replies = False


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
        whole = [c for c in dict.fromkeys(record.completions) if c.strip()]
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
        return [
            (prompt.tolist(), [c.tolist() for c in completions])
            for prompt, completions in super().batch(position, n)
        ]


class InstructPrompts(Samples):
    """
    What to be asked: prompts for PPO, lists of ids of at most max_len tokens, none of them twice.
    A dialogue that is too long loses its oldest turns. `answered` counts the records with a reply.
    """

    replies = False

    def __init__(self, *args, **kwargs):
        self.seen, self.answered = set(), 0
        super().__init__(*args, **kwargs)

    def sample(self, record):
        self.answered += bool(record.completions)
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

WORDS = set(
    """
    dog cat bird ball tree flower boat car kite book hat box bear bunny rabbit frog fish
    duck mouse truck train doll cake apple cookie park garden lake beach forest farm hill
    river sea sun rain moon star sky bed cup door toy robot balloon bell stick rock leaf
    nest egg cow fox bee bug puppy kitten soup bread table chair store school castle drum
    ring puddle blanket
""".split()
)
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
    if (
        "Words" not in asked
        or not asked.get("End", "sad") in ENDINGS
        or not asked.get("Length", "short") in LENGTHS
    ):
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
    val, rest = read_stories(files[0]), itertools.chain.from_iterable(map(read_stories, files[1:]))
    if len(files) == 1:
        stories = list(val)
        cut = len(stories) - max(1, len(stories) // 20)
        val, rest = stories[cut:], stories[:cut]
        print(f"note: there is only one file: its last {len(val)} stories are for validation")
    for name, stories in ("val", val), ("sft", rest):
        records, unique = [], set()
        for story in stories:
            for _ in range(args.per_story):
                story = " ".join(story.split()).replace("“", '"').replace("”", '"')
                prompt = ask(story, rng)
                if prompt and (prompt, story) not in unique:
                    unique.add((prompt, story))
                    records.append({"prompt": prompt, "response": story})
        if len(records) < 2:
            raise ValueError(
                f"{args.data_dir}: too few stories of {LENGTHS['short'][0]} to "
                f"{LENGTHS['long'][1]} words with two of the known words"
            )
        rng.shuffle(records)
        write_jsonl(os.path.join(folder, f"{name}.jsonl"), records[: args.samples])
    pairs = []
    for one, other in zip(records, records[1 : args.samples]):
        both = [one["response"], other["response"]]
        better, worse = gold([one["prompt"]] * 2, both)
        if better - worse >= args.margin:
            pairs.append({"prompt": one["prompt"], "chosen": both[0], "rejected": both[1]})
    write_jsonl(os.path.join(folder, "pairs.jsonl"), pairs)


def tell(args, prompts, n):
    """n stories for each prompt of a checkpoint: lists of (story, whether it ended by itself)."""
    import torch  # here: what reads files need not wait a second for it

    from checkpoint import check_generates, choose_device, load_checkpoint, model_from_checkpoint
    from model import generate

    checkpoint = load_checkpoint(args.checkpoint)
    check_generates(checkpoint, args.checkpoint)
    model = model_from_checkpoint(checkpoint, dropout=0.0).to(choose_device(args.device)).eval()
    tokenizer = own_tokenizer(checkpoint, args.checkpoint, args.tokenizer, args.data_dir)
    template = find_template(args.template, checkpoint, tokenizer, "plain")
    ids = [template.prompt(tokenizer, [(p, None)]) for p in prompts for _ in range(n)]
    torch.manual_seed(args.seed)
    stops = stop_ids(tokenizer, template, checkpoint.get("end_ids"))
    room = model.args.max_seq_len - max(map(len, ids))
    out = generate(model, ids, room, args.temperature, stop_ids=stops)
    texts = [tokenizer.decode(r).strip() for r in out.responses()]
    told = list(zip(texts, out.ended.tolist()))
    return [told[i : i + n] for i in range(0, len(told), n)]


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
        raise ValueError(
            f"{args.checkpoint} told no two stories for a prompt that both ended and "
            f"were {args.margin} apart"
        )
    write_jsonl(args.output or f"{args.data_dir}/task/own_pairs.jsonl", rankings)


def print_judgement(args):
    """How well models obey, on held-out prompts."""
    prompts = [r.turns[-1][0] for r in read(f"{args.data_dir}/task/val.jsonl")]
    prompts = list(dict.fromkeys(prompts))[: args.prompts]
    print(f"{len(prompts)} held-out prompts, temperature {args.temperature}")
    print("gold   all words  words  ending  length  ended")
    for path in args.checkpoint.split(","):
        args.checkpoint = path
        told = [story for [story] in tell(args, prompts, 1)]
        parts = np.array([judge(p, story) for p, (story, _) in zip(prompts, told)])
        score = np.mean(gold(prompts, [story for story, _ in told]))
        share, ending, length = parts.mean(0)
        ended = np.mean([ended for _, ended in told])
        print(
            f"{score:.3f}  {np.mean(parts[:, 0] == 1):9.1%}  {share:5.1%}  {ending:6.1%}  "
            f"{length:6.1%}  {ended:5.1%}  {path}"
        )
        print(f"  {prompts[0]} >>> {' '.join(printable(told[0][0]).split())}")


# -----------------------------------------------------------------------------

COMMANDS = {  # and their flags
    "stories": ["data_dir", "samples", "per_story", "margin", "seed"],
    "pairs": [
        "data_dir",
        "checkpoint",
        "tokenizer",
        "template",
        "prompts",
        "completions",
        "margin",
        "output",
        "temperature",
        "seed",
        "device",
    ],
    "judge": [
        "data_dir",
        "checkpoint",
        "tokenizer",
        "template",
        "prompts",
        "temperature",
        "seed",
        "device",
    ],
}


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__)
    add = parser.add_argument
    add(
        "stage",
        choices=[*COMMANDS],
        help="what to do; instruct.py pairs --help shows its own flags",
    )
    add(
        "--data_dir",
        "--data",
        default="data",
        help="folder of the stories; the task is written to its task/",
    )
    add(
        "--checkpoint", default="out/sft_ckpt.pt", help="model; for judge one or several: a.pt,b.pt"
    )
    add("--tokenizer", default="", help="default: that beside the checkpoint or in data/")
    add(
        "--template",
        default="",
        help="plain, llama2, or a JSON file; default: the checkpoint's, else plain",
    )
    add("--samples", type=int, default=20000, help="records per file, at most")
    add("--per_story", type=int, default=3, help="instructions per story")
    add("--prompts", type=int, default=500, help="prompts, at most")
    add("--completions", type=int, default=4, help="stories per prompt")
    add("--margin", type=float, default=0.1, help="minimum difference of rewards in a pair")
    add("--output", default="", help="default: task/own_pairs.jsonl in the data folder")
    add("--temperature", type=float, default=1.0, help="sampling temperature")
    add("--seed", type=int, default=1337, help="random seed")
    add("--device", default="", help="cpu, cuda, cuda:1 or mps; default: the best there is")
    args = parse_args(parser, argv, lambda args: flags_of_others(args.stage, COMMANDS))
    for name in "samples", "per_story", "prompts", "completions":
        if getattr(args, name) < 1:
            raise ValueError(f"--{name} must be at least 1, not {getattr(args, name)}")
    {"stories": make_task, "pairs": make_pairs, "judge": print_judgement}[args.stage](args)


if __name__ == "__main__":
    run_main(main)
