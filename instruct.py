"""
Instructions and preferences: reads data sets, applies a chat template and samples examples for
training. The commands make a task from stories, for which a rule scores every reply exactly:

    python instruct.py stories                              # data/task/{sft,val,pairs}.jsonl
    python instruct.py pairs --checkpoint=out/sft_ckpt.pt   # rankings of the model's own stories
    python instruct.py judge --checkpoint=out/sft_ckpt.pt   # scores of models on the task

A data set is a JSON file (a list, or an object such as {"data": [...]}) or a JSONL file (a sequence
of objects, each on one or several lines). KEYS lists the accepted names of each key. Records have
one of these formats:

    {"instruction", "input", "output"}           "input" is optional
    {"prompt", "response"}                       PPO needs only the prompts
    {"messages": [{"role", "content"}, ...]}     system (at most one, first), user and assistant
    {"conversations": [{"from", "value"}, ...]}  messages in ShareGPT's format
    {"prompt", "chosen", "rejected"}             each is text or messages; "prompt" is optional
    {"chosen", "rejected"}                       complete dialogues with Human: and Assistant: turns
    {"prompt", "completions"}                    two or more, from best to worst

Each format may also have "system" and "history". A prompt may be a dialogue as in hh-rlhf, see
is_dialogue. A key that is neither used nor known to be harmless is counted in the summary of the
data, or refused if it changes the meaning of a record.
"""

import argparse
import bisect
import collections
import hashlib
import itertools
import json
import os
import random
import re
from typing import NamedTuple

import common  # noqa: F401  first: it reports missing packages

# isort: split
import numpy as np

from common import Refused, flags_of_others, note, parse_args, printable, run_main, write_atomic
from tinystories import Sampler, checksum, items, quoted, read_as_one, read_stories, story_files
from tokenizer import own_tokenizer, stop_ids

# -----------------------------------------------------------------------------
# The template


class Template(NamedTuple):
    """
    The chat template of a model, as up to three strings:

        turn    one exchange of user and assistant
        system  the first exchange of a dialogue with a system prompt
        next    the exchanges after the first, "" if they are like `turn`

    {bos} and {eos} are control tokens, as is the text of any other special token; {system} and
    {user} are text, and {reply} is the model's reply, which the token after {reply} ends.

    A template is split at its tokens before text is inserted, so that text never becomes a control
    token. Replies are tokenized separately.
    """

    turn: str
    system: str = ""
    next: str = ""

    def sides(self, tokenizer, form, user, system=""):
        """The ids of one exchange before and after {reply}."""
        special = {"{bos}": tokenizer.bos_id, "{eos}": tokenizer.eos_id, **tokenizer.special}
        pattern = "|".join(re.escape(s) for s in sorted(special, key=len, reverse=True))
        text = {"{user}": user, "{system}": system}
        sides = []
        for side in form.split("{reply}"):
            ids = []
            for piece in re.split(f"({pattern})", side):
                if piece in special:
                    ids.append(special[piece])
                elif piece:
                    piece = re.sub(r"\{user\}|\{system\}", lambda m: text[m[0]], piece)
                    ids += tokenizer.encode(piece, bos=False, eos=False)
            sides.append(ids)
        return sides

    def dialogue(self, tokenizer, turns, system=""):
        """
        The ids of a dialogue and a mask of the same length, True for the tokens to learn: replies
        and their end tokens, except for empty replies. `turns` are pairs (user, reply). A reply is
        text, or a list of ids without the end token, or None, which ends the dialogue with the
        prompt.
        """
        ids, mask = [], []

        def add(new_ids, learn):
            ids.extend(new_ids)
            mask.extend([learn] * len(new_ids))

        tail = []
        for i, (user, reply) in enumerate(turns):
            form = self.system if system and not i else self.next if self.next and i else self.turn
            before, after = self.sides(tokenizer, form, user, "" if i else system)
            add(tail + before, False)
            if reply is None:
                break
            learn = bool(reply.strip() if isinstance(reply, str) else reply)
            if isinstance(reply, str):
                reply = tokenizer.encode(reply, bos=False, eos=False)
            add([*reply, after[0]], learn)
            tail = after[1:]  # the template's text between two exchanges
        return ids, mask

    def prompt(self, tokenizer, turns, system=""):
        """The ids of a dialogue up to the reply of its last turn; that reply is ignored."""
        return self.dialogue(tokenizer, [*turns[:-1], (turns[-1][0], None)], system)[0]

    def fit(self, tokenizer, turns, system, room):
        """
        The longest suffix of `turns` whose prompt, including the system prompt, has at most `room`
        tokens; [] if the last turn alone does not fit. Each turn is encoded once, from the newest
        backwards as long as they fit, and a few of them once more as the first of a dialogue.
        """
        n = len(turns)
        first_form, next_form = self.system if system else self.turn, self.next or self.turn

        def size(i, form, system=""):
            """The number of tokens of turn i in a prompt."""
            user, reply = turns[i]
            before, after = self.sides(tokenizer, form, user, system)
            if i == n - 1:
                return len(before)
            if isinstance(reply, str):
                reply = tokenizer.encode(reply, bos=False, eos=False)
            return len(before) + len(reply) + len(after)

        rest = [0]  # numbers of tokens of the last 0, 1, 2, ... turns
        while len(rest) < n and rest[-1] <= room:
            rest.append(rest[-1] + size(n - len(rest), next_form))

        def fits(i):
            """Whether the turns from i on fit; if they do, so do fewer turns."""
            return size(i, first_form, system) + rest[n - 1 - i] <= room

        return turns[bisect.bisect_left(range(n), True, max(0, n - len(rest)), key=fits) :]

    def read_chat(self, messages):
        """The turns and the system prompt of a chat (see read_messages). Raises ValueError."""
        messages, system = read_messages(messages, "messages", unknown := []), ""
        if unknown := [k for k in unknown if k.partition(".")[2] not in MESSAGE_KEYS]:
            raise ValueError(f"the key {unknown[0][:40]!r} is not supported")
        if messages and messages[0][0] == "system":
            system = messages.pop(0)[1]
        if system and not self.system:
            raise ValueError(f"the template {self.turn!r} has no place for a system prompt")
        turns = exchanges(messages, replies=False)
        if turns[-1][1] is not None:
            raise ValueError("the last message must be the user's")
        return turns, system

    def chat(self, tokenizer, messages, room):
        """
        The prompt of `messages`, of which the last is the user's, without the oldest turns if it
        has more than `room` tokens. Raises Refused, with the `param` "messages".
        """
        try:
            turns, system = self.read_chat(messages)
            last = len(system) + len(turns[-1][0])  # slow to encode if it is many times too long
            turns = self.fit(tokenizer, turns, system, room) if last <= 64 * room else []
        except ValueError as e:
            raise Refused(400, str(e), None, "messages") from None
        if not turns:
            what = "system prompt and the last message are" if system else "last message is"
            why = f"the {what} too long: the prompt may have {room} tokens"
            raise Refused(400, why, "context_length_exceeded", "messages")
        return self.prompt(tokenizer, turns, system)

    def end(self, tokenizer):
        """The id of the token that ends a reply."""
        return self.sides(tokenizer, self.turn, "")[1][0]

    def check(self, tokenizer):
        """Returns self. Raises ValueError if the template is malformed or needs other tokens."""
        special = tokenizer.special
        for form in filter(None, self):
            for name, n in ("user", 1), ("reply", 1), ("system", form is self.system):
                if form.count(f"{{{name}}}") != n:
                    raise ValueError(
                        f"template {form!r}: {{{name}}} must occur "
                        f"{'once' if n else 'in `system` only'}"
                    )
            for name, i in ("bos", tokenizer.bos_id), ("eos", tokenizer.eos_id):
                if f"{{{name}}}" in form and i < 0:
                    raise ValueError(f"template {form!r}: the tokenizer has no {name.upper()}")
            for name in re.findall(r"<\|[^|<>]*\|>", form):
                if name not in special:
                    raise ValueError(f"template {form!r}: this tokenizer has no token {name}")
            after = form.split("{reply}")[1]
            if not after.startswith(("{bos}", "{eos}", *special)):
                raise ValueError(
                    f"template {form!r}: a special token, such as {{eos}}, must follow {{reply}}"
                )
        return self


def ended(form):
    """A template string, with {eos} after {reply} if only white space follows {reply}."""
    before, reply, after = form.partition("{reply}")
    return form if after.strip() or not reply else f"{before}{{reply}}{{eos}}{after}"


TEMPLATES = {
    # Short, because in a small vocabulary each of its characters may be a token
    "plain": Template("{bos}{user}\n{reply}{eos}", "{bos}{system}\n{user}\n{reply}{eos}"),
    "llama2": Template(
        "{bos}[INST] {user} [/INST]{reply}{eos}",
        "{bos}[INST] <<SYS>>\n{system}\n<</SYS>>\n\n{user} [/INST]{reply}{eos}",
    ),
}


def find_template(name, checkpoint, tokenizer, default="llama2", say=note):
    """
    The template of a model: `name`, which is one of TEMPLATES or a JSON file {"turn": ...,
    "system": ...}; or else the template of the checkpoint, a dict; or else TEMPLATES[default]. The
    function `say` gets a line if it is not the checkpoint's. TEMPLATES lose {bos} for a
    model whose text does not begin with BOS. Raises ValueError if the template is malformed or
    needs other tokens, and OSError if the file cannot be read.
    """
    stored = checkpoint.get("template")
    if stored:
        forms = (stored.get(form) or "" for form in ("turn", "system", "next"))
        stored = Template(*map(ended, forms))
    templates = TEMPLATES
    if tokenizer.bos_id < 0 or not checkpoint.get("bos", True):
        templates = {
            key: Template(*(form.replace("{bos}", "") for form in template))
            for key, template in TEMPLATES.items()
        }
    if name.endswith(".json"):
        with open(name, encoding="utf-8-sig") as f:
            try:
                selected = Template(**json.load(f))
            except (ValueError, TypeError) as e:
                raise ValueError(
                    f'{name} is not a template {{"turn": ..., "system": ...}}: {e}'
                ) from None
        if not all(isinstance(form, str) for form in selected) or not selected.turn:
            raise ValueError(f'{name}: "turn" and "system" must be text')
    elif name and name not in TEMPLATES:
        raise ValueError(f"--template={name}: expected {', '.join(TEMPLATES)} or a .json file")
    else:
        selected = templates.get(name)
    template = (selected or stored or templates[default]).check(tokenizer)
    if stored and template != stored:
        say(f"--template={name} replaces the checkpoint's template {stored.turn!r}")
    elif not stored and not selected:
        say(
            f"the checkpoint has no chat template: using {default}, {template.turn!r}; "
            "--template selects another"
        )
    return template


# -----------------------------------------------------------------------------
# Files


class Record(NamedTuple):
    """
    One record of a data set.

        turns        [(user, reply), ..., (user, None)]: the dialogue before the completions
        system       the system prompt, or ""
        completions  the replies from best to worst; a single one if there is no preference
        ignored      keys that are neither used nor known to be harmless
        irregular    the reason why a dialogue was shortened or left out, "" for others; `turns` of
                     a record that is left out is empty
    """

    turns: list
    system: str
    completions: list
    ignored: tuple = ()
    irregular: str = ""


# The names of each part of a record. If a record has several names of one part, the first is read;
# of "context" all are read. Other keys are HARMLESS, REFUSED or counted as ignored.
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
RECORD_KEYS = {*KEYS["messages"], *KEYS["prompt"], *KEYS["chosen"]} - {"data"}
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
MESSAGE_KEYS = {"name", "refusal", "annotations"}  # which clients of serve.py also send
GOOD_OR_BAD = "label", "kto_tag", "desirable"  # labels of KTO data sets (Ethayarajh et al., 2024)
REFUSED = {  # {key that changes the meaning of a record: reason and remedy}
    **dict.fromkeys(
        GOOD_OR_BAD,
        "it says which replies are bad, but all replies would be learned: "
        "remove the records with bad replies and then the key",
    ),
    **dict.fromkeys(
        ("images", "image", "image_url", "audio", "audios", "video", "videos"),
        "only text can be learned: remove these records",
    ),
    **dict.fromkeys(
        ("tools", "functions", "tool_calls", "function_call"),
        "templates do not support tools: remove these records",
    ),
}


def read(path, replies=True, lenient=False):
    """
    The list of Record in a JSON or JSONL file. Without `replies`, a record may be a prompt alone.
    With `lenient`, dialogues that begin with the assistant or end with the user, which data sets of
    real conversations contain, are read as irregular records unless all records of the file are so.
    Raises ValueError that names file and line, and OSError.
    """

    def parse(position, item, lenient):
        try:
            return record(item, replies, lenient)
        except ValueError as e:
            raise ValueError(f"{path}, {position}: {e}") from None

    records, first = [], None
    for position, item in items(path, RECORD_KEYS):
        first = first or (position, item)
        records.append(parse(position, item, lenient))
    if not records:
        raise ValueError(f"{path} has no records")
    if all(r.irregular for r in records):
        parse(*first, lenient=False)  # raises
    return records


def text_of(value, key, ignored):
    """
    A text, or the text of a list of parts {"type": "text", "text": ...}. Appends the unused keys of
    the parts to `ignored`. Raises ValueError.
    """
    if isinstance(value, list) and value and all(isinstance(x, dict) for x in value):
        others = [x.get("type") for x in value if x.get("type") != "text"]
        if others:
            raise ValueError(f'"{key}" has a part of type {others[0]!r}: only text can be learned')
        ignored += [k for x in value for k in unused(x, {"type", "text"}, key)]
        return "".join(text_of(x.get("text"), "text", ignored) for x in value)
    if value is None:
        raise ValueError(f'"{key}" is missing')
    if not isinstance(value, str):
        raise ValueError(f'"{key}" must be text, not {type(value).__name__}')
    return value.encode(errors="replace").decode()  # JSON allows surrogates


def record(item, replies=True, lenient=False):
    """
    The Record of one item of a data set; `replies` and `lenient` are as in read(). Text stays
    unchanged, except for the space that some formats put before a reply: after "Assistant:" and in
    "completion". Raises ValueError that names the fault.
    """
    if not isinstance(item, dict):
        raise ValueError(f"expected an object, not {type(item).__name__}")
    present = not_empty(item)
    for k in REFUSED.keys() & present.keys():
        is_label = replies and isinstance(item[k], int)  # bool is a subclass of int
        if is_label or k not in GOOD_OR_BAD:
            raise ValueError(f'"{k}" changes the meaning of the record: {REFUSED[k]}')
    prompt, reply, messages = (key_of(item, part) for part in ("prompt", "reply", "messages"))
    main, history, system_key = main_key(item), key_of(item, "history"), key_of(item, "system")

    # 1. The messages before the replies. `space`: the format puts a space before each reply.
    context, space, ignored = [], False, []
    used = {history, system_key}
    if history:
        context += read_messages(item["history"], "history", ignored)
    if prompt and main not in KEYS["messages"]:
        extra = [k for k in KEYS["context"] if k in present and k != prompt]
        used |= {prompt, *extra}
        if isinstance(item[prompt], (list, dict)):
            context += read_messages(item[prompt], prompt, ignored)
        else:
            user = text_of(item[prompt], prompt, ignored)
            if not user.strip():
                raise ValueError("the prompt is empty")
            space = is_dialogue(user)
            context += read_dialogue(user, last="user") if space else [("user", user)]
        if extra:
            question = [context.pop()[1]] if context and context[-1][0] == "user" else []
            text = "\n".join([*question, *(text_of(item[k], k, ignored) for k in extra)])
            context.append(("user", text))
    elif main == "chosen" and messages:
        question = read_messages(item[messages], messages, ignored)
        if question and question[-1][0] == "user":
            used.add(messages)
            context += question

    # 2. The replies, or complete dialogues, which may repeat the context.
    def read_reply(value, k):
        is_list = isinstance(value, list) and not is_parts(value)
        if is_list or isinstance(value, dict) or k in KEYS["messages"]:
            return read_messages(value, k, ignored)
        value = text_of(value, k, ignored)
        if main == "chosen" and (not context or is_dialogue(value)):
            return read_dialogue(value, last="assistant")
        if space or k == "completion" and value[1:2].strip():
            value = value.removeprefix(" ")
        return [("assistant", value)]

    if main == "chosen":
        if replies and item.get("rejected") is None:
            raise ValueError(f'"rejected" is missing: it has {quoted(item)}')
        values = [(item.get(k), k) for k in ("chosen", "rejected") if replies or k in present]
    elif main in KEYS["completions"]:
        values = [(x, main) for x in ranking(item[main], main, ignored)]
    elif main or reply:
        values = [(item[main or reply], main or reply)]
    elif replies:
        if "rejected" in item:
            raise ValueError(f'"chosen" is missing: it has {quoted(item)}')
        first, *others = KEYS["reply"]
        raise ValueError(f'"{first}" is missing (or {quoted(others)}): it has {quoted(item)}')
    else:
        values = []
    used.update(k for _, k in values)

    # 3. One dialogue per reply, as messages and then as exchanges.
    dialogues = [joined(context, read_reply(value, k)) for value, k in values] or [context]
    system = text_of(item[system_key], system_key, ignored) if system_key else ""
    for d in [context, *dialogues]:
        while d and d[0][0] == "system":
            if system not in ("", d[0][1]):
                raise ValueError("it has two different system prompts: remove one")
            system = d.pop(0)[1]
    if any(d[: len(context)] != context for d in dialogues):  # they replace the context
        used -= {prompt, history, *KEYS["context"]}
    irregular = irregularity(dialogues, replies) if lenient else ""
    if irregular.startswith("left out"):
        return Record([], system, [], irregular=irregular)
    if irregular:
        dialogues = [d[:-1] for d in dialogues]
    paired = [exchanges(d, replies) for d in dialogues]
    turns, completions = paired[0], [p[-1][1] for p in paired]
    turns = [*turns[:-1], (turns[-1][0], None)]
    if any([*p[:-1], (p[-1][0], None)] != turns for p in paired):
        completions = []  # the dialogues differ before the last reply: not one prompt

    # 4. The unused keys whose values are not in the dialogues.
    texts = {text.strip() for d in dialogues for _, text in d} | {system.strip()}
    ignored += [k for k in present.keys() - used - HARMLESS if not repeats(item[k], texts)]
    completions = [c for c in completions if c is not None]
    return Record(turns, system, completions, tuple(sorted(set(ignored))), irregular)


def not_empty(item):
    """The keys and values of a dict without empty values."""
    return {k: v for k, v in item.items() if v not in (None, "", [], {})}


def key_of(item, part):
    """
    The key of a record that has a part (see KEYS), preferably with a value that is not empty; None
    if there is none.
    """
    # "answers" often lists variants of one answer, and "data" may be anything
    fits = {"answers": has_ranks(item.get("answers")), "data": is_strings(item.get("data"))}
    keys = [k for k in KEYS[part] if item.get(k) is not None and fits.get(k, True)]
    present = not_empty(item)
    return next((k for k in keys if k in present), keys[0] if keys else None)


def main_key(item):
    """
    The key of a record that has the messages, the completions or "chosen"; None for a record with a
    prompt and a reply. Raises ValueError if the record has no prompt either.
    """
    prompt, messages, present = key_of(item, "prompt"), key_of(item, "messages"), not_empty(item)
    main = next((k for k in (key_of(item, "completions"), messages) if k in present), None)
    if key_of(item, "chosen"):
        main = "chosen"
    elif not main and not prompt:
        main = messages  # an empty list, or None
    if not prompt and (not main or main in KEYS["completions"]):
        expected = (*KEYS["prompt"], *KEYS["messages"], "chosen")
        raise ValueError(f"it has {quoted(item)}, but none of {quoted(expected)}")
    return main


def is_strings(value):
    return isinstance(value, list) and all(isinstance(x, str) for x in value)


def is_parts(value):
    """Whether a list holds the parts of one text, and not messages."""
    return bool(value) and all(
        isinstance(x, dict) and "type" in x and "role" not in x for x in value
    )


def read_messages(value, key, ignored):
    """
    [(role, text), ...] of one message or a list of messages: {"role", "content"}, {"from",
    "value"}, {"input", "output"}, [user, reply], or strings by user and assistant in turn. Appends
    the unused keys of the messages to `ignored`. Raises ValueError.
    """
    result, strings = [], key in (*KEYS["messages"], *KEYS["history"])
    for m in value if isinstance(value, list) else [value]:
        if isinstance(m, str) and strings and isinstance(value, list):
            result.append(("assistant" if len(result) % 2 else "user", text_of(m, key, ignored)))
        elif isinstance(m, list) and len(m) == 2 and strings:
            result += zip(("user", "assistant"), (text_of(x, key, ignored) for x in m))
        elif not isinstance(m, dict):
            raise ValueError(f'"{key}" must be a list of objects with "role" and "content"')
        elif {"input", "output"} <= m.keys():
            names = {"input": "user", "output": "assistant"}
            ignored += unused(m, names, key)
            result += [(role, text_of(m[k], k, ignored)) for k, role in names.items()]
        else:
            role = m.get("role", m.get("from"))
            content = next((k for k in ("content", "value", "text") if k in m), "content")
            ignored += unused(m, {"role", "from", content}, key)
            if not isinstance(role, str) or role.lower() not in ROLES:
                raise ValueError(
                    f'"{key}" has a message of role {role!r}: expected user, assistant or system'
                )
            result.append((ROLES[role.lower()], text_of(m.get(content), content, ignored)))
    return result


def unused(message, used, key):
    """
    The names of the keys of a message or reply that are neither in `used` nor harmless, such as
    "messages.name" for the key "name" of a message in "messages". Raises ValueError.
    """
    present = {k: v for k, v in not_empty(message).items() if k not in used}
    for k in REFUSED.keys() & present.keys():
        raise ValueError(f'"{k}" changes the meaning of a message: {REFUSED[k]}')
    flags = {"weight", "train", "loss"}  # 0 excludes a message from training
    if any(present.get(k, 1) == 0 for k in flags):
        raise ValueError(
            "a message is excluded from training, but all replies are learned: remove this record"
        )
    return [f"{key}.{k}" for k in present.keys() - HARMLESS - flags]


def read_dialogue(text, last):
    """
    The messages of a dialogue in the format of hh-rlhf: "Human: a\\n\\nAssistant: b\\n\\nHuman: c"
    becomes [("user", "a"), ("assistant", "b"), ("user", "c")]. Adjacent messages of one side are
    joined. `last` is the role of the last message. An empty "Assistant:" may follow a last "user",
    and a last "assistant" may be empty. Raises ValueError.
    """
    parts = re.split(r"(?:^|\n\n)(Human|Assistant):", text)
    messages = []
    for name, words in zip(parts[1::2], parts[2::2]):
        role, words = ROLES[name.lower()], words.removeprefix(" ")
        if messages and messages[-1][0] == role:
            messages[-1] = role, f"{messages[-1][1]}\n\n{words}"
        else:
            messages.append((role, words))
    if last == "user" and messages and not messages[-1][1].strip():
        messages.pop()
    if parts[0].strip() or not messages or messages[0][0] != "user" or messages[-1][0] != last:
        name = "Human" if last == "user" else "Assistant"
        raise ValueError(f"a dialogue must begin with Human: and end with a text by {name}:")
    return messages


def is_dialogue(text):
    """Whether a text is meant as a dialogue of hh-rlhf: it begins with an empty line and Human:, or
    it begins with Human: and has a paragraph that begins with Assistant:. (Ordinary text may begin
    with Human: too.) read_dialogue raises an error if the dialogue is faulty."""
    marked = re.match(r"(\r?\n){2}\s*Human:", text)
    return bool(marked or re.match(r"\s*Human:.*\n\r?\nAssistant:", text, re.DOTALL))


def has_ranks(value):
    """Whether a value is a list of objects with different "rank"s; the lowest rank is the best."""
    if not isinstance(value, list) or not all(isinstance(x, dict) for x in value):
        return False
    ranks = [x.get("rank") for x in value]
    if not all(isinstance(r, (int, float)) and r == r for r in ranks):  # NaN has no order
        return False
    return len(set(ranks)) == len(ranks)


def ranking(value, key, ignored):
    """The replies of a list, from best to worst: in its order, or by rank. Raises ValueError."""
    if not isinstance(value, list) or len(value) < 2:
        raise ValueError(f'"{key}" must be a list of two or more replies')
    if has_ranks(value):
        replies = []
        for x in sorted(value, key=lambda x: x["rank"]):
            k = next((k for k in (*KEYS["reply"], "text", "content") if k in x), "response")
            replies.append(x.get(k))
            ignored += unused(x, {k, "rank"}, key)
        return replies
    if any(isinstance(x, dict) and "role" not in x for x in value):
        raise ValueError(
            f'"{key}" must be replies from best to worst, or objects with different "rank"s'
        )
    return value


def joined(context, messages):
    """
    Two lists of messages as one dialogue. `messages` may repeat the context or its end, or be a
    complete dialogue with another context, which replaces `context`. A system message at its
    beginning precedes the context.
    """
    if messages[:1] != context[:1] and messages and messages[0][0] == "system":
        return messages[:1] + joined(context, messages[1:])
    a, b = ([(role, text.strip()) for role, text in x] for x in (context, messages))
    for n in range(min(len(a), len(b)), 0, -1):
        if a[-n:] == b[:n]:
            return context + messages[n:]
    if context and messages and context[-1][0] == messages[0][0]:
        return [*messages]
    return context + messages


def irregularity(dialogues, replies):
    """
    The reason why the dialogues of a record (lists of messages) are not exchanges of user and
    assistant: "left out: ..." for a record that cannot be used, "shortened: ..." if dropping the
    last message repairs it. "" if there is none, and for messages that exchanges() refuses.
    """
    roles = [[role for role, _ in messages] for messages in dialogues]
    if not all(all(a != b for a, b in itertools.pairwise(r)) and "system" not in r for r in roles):
        return ""
    if all(r[:1] == ["assistant"] for r in roles):
        return "left out: begins with the assistant"
    if replies and len(roles) == 1 and roles[0][-1:] == ["user"]:
        return "shortened: last user turn dropped" if roles[0][1:] else "left out: no reply"
    return ""


def exchanges(messages, replies):
    """
    [(user, reply), ...] of messages; without `replies` the last reply may be missing and is None.
    Raises ValueError if the messages are not by user and assistant in turn.
    """
    roles, n = [role for role, _ in messages], len(messages)
    odd = n % 2
    if not messages or roles != (["user", "assistant"] * n)[:n] or odd and replies:
        roles = ", ".join(roles[:8] + ["..."] * (len(roles) > 8)) or "nothing"
        raise ValueError(f"messages must be by user and assistant in turn, not {roles}")
    texts = [text for _, text in messages] + [None] * odd
    return list(zip(texts[::2], texts[1::2]))


def repeats(value, texts):
    """Whether a value is text or messages, all of which are among `texts`."""
    if isinstance(value, str):
        return value.strip() in texts
    if not isinstance(value, (list, dict)):
        return False
    ignored = []
    try:
        messages = read_messages(value, "messages", ignored)
    except ValueError:
        return False
    return not ignored and all(text.strip() in texts for _, text in messages)


# -----------------------------------------------------------------------------
# Samples. As in tinystories.py, an epoch is a permutation of all samples and a position an integer.

HELD_OUT = 10  # one dialogue in HELD_OUT is for validation


def held_out(record):
    """
    Whether a record is for validation, by a hash of its system prompt and first user message:
    dialogues with the same beginning are in the same split.
    """
    start = f"{record.system}\n{record.turns[0][0] if record.turns else ''}".encode()
    return hashlib.sha256(start).digest()[0] % HELD_OUT == 0


class Samples:
    """
    The base class of the data sets below.

        data       a file for read(), or several: "a.jsonl,b.json"
        split      "train", "val" (see held_out), or "all" for no split
        max_len    maximum number of tokens per sample

    `counts` has the number of samples that were left out or shortened, by reason, and of records
    with an ignored key; `summary()` puts these numbers into one line. A subclass defines
    sample(record), which returns None for a record that is left out, and `replies`, which says
    whether records need a reply. Raises ValueError and OSError.
    """

    replies = True

    def __init__(self, data, split, tokenizer, template, max_len, seed=1337):
        if split not in ("train", "val", "all"):
            raise ValueError(f"split must be train, val or all, not {split!r}")
        self.data, self.tokenizer, self.template, self.max_len = data, tokenizer, template, max_len
        files = (read(path, self.replies, lenient=True) for path in data.split(","))
        records = itertools.chain.from_iterable(files)
        self.counts, self.samples = collections.Counter(), []
        # Some SentencePiece models, such as the one of stories260K, remove or merge spaces.
        spaced, bare = (tokenizer.encode(s, bos=False, eos=False) for s in ("  a", "a"))
        for r in records:
            if split == "all" or held_out(r) == (split == "val"):
                self.count(r.irregular, bool(r.irregular))
                if not r.turns:
                    continue
                if r.system and not template.system:
                    raise ValueError(
                        f"{data} has a system prompt, but the template {template.turn!r} has no "
                        "place for it: choose another --template"
                    )
                for key in r.ignored:
                    self.count(f'with "{key}", which is ignored')
                if self.replies and spaced == bare:
                    spaces = any(re.search("^ |  | $", c) for c in r.completions)
                    self.count("with spaces in a reply that this tokenizer drops", spaces)
                sample = self.sample(r)
                if sample is not None:
                    self.samples.append(sample)
        if not self.samples:
            raise ValueError(f"{self.summary()}: {self.remedy(split)}")
        # validation samples do not depend on the seed of the run
        self.sampler = Sampler([[len(self.samples)]], [1.0], 0 if split == "val" else seed)

    def remedy(self, split):
        """What to change if a split has no samples."""
        if split == "val" or not self.counts:  # nothing was left out: all records are held out
            return "too few to hold some out: name a validation file with --val_data"
        return "nothing to use: name another file"

    def __len__(self):
        return len(self.samples)

    def checksum(self):
        """A number that identifies the samples."""
        return checksum(self.samples)

    def batch(self, position, n):
        """The n samples from `position` on."""
        return [self.samples[i] for i in self.sampler.locate(position, n)[2]]

    def summary(self):
        """One line with the number of samples and the counts."""
        counts = "; ".join(f"{n:,} {why}" for why, n in sorted(self.counts.items()))
        return f"{self.data}: {len(self.samples):,} samples" + (f" ({counts})" if counts else "")

    def count(self, event, happened=True):
        """Increment the count of an event, if it happened; returns None."""
        if happened:
            self.counts[event] += 1


class Instructions(Samples):
    """
    Dialogues for SFT: each sample is a pair of lists (ids, mask), where the mask is True for the
    tokens to learn, which are the replies and their end tokens. The reply of a ranking is its best
    completion.

    A dialogue that is too long loses its oldest turns. If it is still too long, the reply is cut at
    max_len, without an end token, so that the model does not learn to stop in mid-sentence.
    """

    def sample(self, record):
        t, template, system = self.tokenizer, self.template, record.system
        reply = next(iter(record.completions), None)
        if reply is None:
            return self.count("left out: the dialogues differ before the last reply")
        if not reply.strip():
            return self.count("left out: empty response")
        length = len(t.encode(reply, bos=False, eos=False)) + 1
        turns = template.fit(t, record.turns, system, self.max_len - length) or record.turns[-1:]
        ids, mask = template.dialogue(t, [*turns[:-1], (turns[-1][0], reply)], system)
        if len(ids) - length >= self.max_len:
            return self.count("left out: prompt too long")
        empty = any(not earlier.strip() for _, earlier in turns[:-1])
        self.count("with an empty reply, which is not learned", empty)
        self.count("shortened: oldest turns dropped", len(turns) < len(record.turns))
        self.count("shortened: reply cut", len(ids) > self.max_len)
        return np.array(ids[: self.max_len], np.int32), np.array(mask[: self.max_len])

    def batch(self, position, n):
        return [(ids.tolist(), mask.tolist()) for ids, mask in super().batch(position, n)]


class OptionalInstructions(Instructions):
    """Instructions of the records that have a reply; prompts alone are left out."""

    replies = False


class Rankings(Samples):
    """
    Preferences: each sample is (prompt ids, [completion ids, ...]) with two or more completions
    from best to worst, which include their end tokens. Prompt and completion together have at most
    max_len tokens.

    Completions are left out if they are empty, duplicates, or too long even with the last turn
    alone, because reward models score complete replies. If the dialogue and the longest remaining
    completion exceed max_len, the oldest turns are dropped, for all completions, because they share
    one prompt.
    """

    def sample(self, record):
        if not record.completions:
            return self.count("left out: the dialogues differ before the last reply")
        if len(record.completions) < 2:
            return self.count("left out: one completion, nothing to compare")
        if len(set(record.completions)) < 2:
            return self.count("left out: chosen equal to rejected")
        t, template = self.tokenizer, self.template
        texts = [c for c in dict.fromkeys(record.completions) if c.strip()]
        end = [template.end(t)]
        encoded = t.encode(texts, bos=False, eos=False) if texts else []
        ids = [[*c, *end] for c in dict.fromkeys(map(tuple, encoded))]
        if len(texts) > len(ids) == 1:
            return self.count("left out: chosen equal to rejected")
        room = self.max_len - len(template.prompt(t, record.turns[-1:], record.system))
        ids = [c for c in ids if len(c) <= room]  # before the oldest turns make room for the rest
        if len(ids) < 2:
            reason = "empty response" if len(texts) < 2 else "too long"
            return self.count(f"left out: {reason}")
        longest = max(map(len, ids))
        turns = template.fit(t, record.turns, record.system, self.max_len - longest)
        prompt = template.prompt(t, turns, record.system)
        self.count("shortened: oldest turns dropped", len(turns) < len(record.turns))
        self.count("shortened: fewer completions", len(ids) < len(record.completions))
        return np.array(prompt, np.int32), [np.array(c, np.int32) for c in ids]

    def batch(self, position, n):
        return [
            (prompt.tolist(), [c.tolist() for c in completions])
            for prompt, completions in super().batch(position, n)
        ]


class InstructPrompts(Samples):
    """
    Prompts for PPO: lists of at most max_len ids without duplicates. A dialogue that is too long
    loses its oldest turns. `answered` is the number of records of these prompts that have a reply.
    """

    replies = False

    def __init__(self, *args, **kwargs):
        self.seen, self.answered = set(), 0
        super().__init__(*args, **kwargs)

    def sample(self, record):
        turns = self.template.fit(self.tokenizer, record.turns, record.system, self.max_len)
        if not turns:
            return self.count("left out: prompt too long")
        self.answered += any(c.strip() for c in record.completions[:1])
        prompt = np.array(self.template.prompt(self.tokenizer, turns, record.system), np.int32)
        if prompt.tobytes() in self.seen:
            return self.count("left out: duplicate prompt")
        self.seen.add(prompt.tobytes())
        self.count("shortened: oldest turns dropped", len(turns) < len(record.turns))
        return prompt

    def remedy(self, split):
        if self.counts["left out: prompt too long"]:
            return (
                f"--max_gen_len leaves {self.max_len} tokens of the context for a prompt: use a "
                "smaller one"
            )
        return super().remedy(split)

    def batch(self, position, n):
        return [prompt.tolist() for prompt in super().batch(position, n)]


# -----------------------------------------------------------------------------
# The story task: an instruction names the words, the ending and the length of a story. Instructions
# are made from existing stories, so that each can be fulfilled. A rule, the gold reward, scores how
# well a story fulfills its instruction, so that every stage of training can be measured exactly.

WORDS = set(
    """
    dog cat bird ball tree flower boat car kite book hat box bear bunny rabbit frog fish
    duck mouse truck train doll cake apple cookie park garden lake beach forest farm hill
    river sea sun rain moon star sky bed cup door toy robot balloon bell stick rock leaf
    nest egg cow fox bee bug puppy kitten soup bread table chair store school castle drum
    ring puddle blanket
""".split()
)
ENDINGS = {  # {ending: regular expression for the last two sentences}, from rare to frequent
    "sad": "sad|cry|cried|cries|sorry|miss(ed)?",
    "home": "home|bed|bedtime|sleep|asleep|dinner",
    "lesson": "learn(ed|t)?|lesson|always|never|remember(ed)?|important|knew that",
    "friends": "friends?|together|share(d)?",
    "happy": "happy|happily|smiled?|laugh(ed)?|joy|glad|fun|hug(s|ged)?|proud|loved?",
}
LENGTHS = {"short": (60, 110), "long": (110, 160)}  # minimum and maximum number of words
TOLERANCE = 40  # the score for length falls to 0 at this many words outside LENGTHS


def has_word(story, word):
    """Whether a story contains a word, singular or plural."""
    return re.search(rf"\b{word}(s|es)?\b", story, re.I) is not None


def has_ending(story, ending):
    """Whether a story is finished and has one of ENDINGS."""
    sentences = re.split(r"(?<=[.!?])[\"”']?\s+", story.strip())
    finished = re.search(r"[.!?][\"”']?$", story.strip())
    return bool(finished and re.search(rf"\b({ENDINGS[ending]})\b", " ".join(sentences[-2:]), re.I))


def judge(prompt, story):
    """
    Scores for words, ending and length of a story, each in [0, 1]: the share of the required words
    that the story has, whether it has the required ending, and how close it is to the required
    length. The score is 1 for a part that the prompt does not require. Raises ValueError for a
    prompt that is not an instruction of this task.
    """
    required = dict(re.findall(r"\b(Words|End|Length): ([a-z, ]+)\.", prompt))
    if (
        "Words" not in required
        or required.get("End", "sad") not in ENDINGS
        or required.get("Length", "short") not in LENGTHS
    ):
        raise ValueError(
            f"gold: {prompt[:60]!r} is not an instruction of the story task: use prompts of "
            "`python instruct.py stories`"
        )
    words = required["Words"].split(", ")
    share = sum(has_word(story, w) for w in words) / len(words)
    ending = "End" not in required or has_ending(story, required["End"])
    low, high = LENGTHS.get(required.get("Length"), (0, 1e9))
    n = len(story.split())
    excess = max(low - n, n - high, 0)
    return share, float(ending), max(1 - excess / TOLERANCE, 0.0)


def gold(prompts, responses):
    """
    The gold reward of each response, in [0, 1]: half of it is for the ending, a quarter each for
    words and length. Words have a small weight because a reward model of this size hardly learns
    them. Used as --reward=instruct.py:gold.
    """
    scores = (judge(p, r) for p, r in zip(prompts, responses))
    return [share / 4 + ending / 2 + length / 4 for share, ending, length in scores]


def make_instruction(story, rng):
    """
    An instruction that the story fulfills, with two or three of its words in their order; None if
    there is no such instruction.
    """
    n = len(story.split())
    length = next((k for k, (low, high) in LENGTHS.items() if low <= n <= high), None)
    words = [w for w in dict.fromkeys(re.findall("[a-z]+", story.lower())) if w in WORDS]
    if length is None or len(words) < 2:
        return None
    words = [words[i] for i in sorted(rng.sample(range(len(words)), min(len(words), 3)))]
    ending = next((k for k in ENDINGS if has_ending(story, k)), None)
    end = f" End: {ending}." if ending else ""
    return f"Words: {', '.join(words)}.{end} Length: {length}."


def write_jsonl(path, records):
    """Write a list of records to a JSONL file."""
    with write_atomic(path, "w") as f:
        f.writelines(json.dumps(r) + "\n" for r in records)
    print(f"wrote {len(records):,} records to {path}")


def make_task(args):
    """
    Write sft.jsonl from the training stories, val.jsonl from the validation stories, and
    pairs.jsonl, which prefers the story of an instruction to a story with a lower gold reward.
    """
    rng, folder = random.Random(args.seed), os.path.join(args.data_dir, "task")
    files = story_files(args.data_dir)
    val, rest = read_stories(files[0]), itertools.chain.from_iterable(map(read_stories, files[1:]))
    if len(files) == 1 or read_as_one(args.data_dir):
        stories = [*val, *rest]
        cut = len(stories) - max(1, len(stories) // 20)
        val, rest = stories[cut:], stories[:cut]
        what = "there is only one story file: its"
        if len(files) > 1:
            what = f"the {len(files)} small files are read as one: their"
        print(f"note: {what} last {len(val)} stories are for validation")
    parts = []
    for stories in val, rest:
        records, unique = [], set()
        for story in stories:
            for _ in range(args.per_story):
                story = " ".join(story.split()).replace("“", '"').replace("”", '"')
                prompt = make_instruction(story, rng)
                if prompt and (prompt, story) not in unique:
                    unique.add((prompt, story))
                    records.append({"prompt": prompt, "response": story})
        if len(records) < 2:
            raise ValueError(
                f"{args.data_dir}: too few stories of {LENGTHS['short'][0]} to "
                f"{LENGTHS['long'][1]} words with two of the task's words: add stories"
            )
        rng.shuffle(records)
        del records[args.samples :]
        parts.append(records)
    pairs = []
    for record, other in zip(records, records[1:]):
        prompt, responses = record["prompt"], [record["response"], other["response"]]
        better, worse = gold([prompt] * 2, responses)
        if better - worse >= args.margin:
            pairs.append({"prompt": prompt, "chosen": responses[0], "rejected": responses[1]})
    write_jsonl(os.path.join(folder, "val.jsonl"), parts[0])
    write_jsonl(os.path.join(folder, "pairs.jsonl"), pairs)
    write_jsonl(os.path.join(folder, "sft.jsonl"), records)  # last, because Makefile looks for it


def generate_stories(args, prompts, n):
    """
    n stories per prompt by the model of --checkpoint: for each prompt a list of (story, ended),
    where `ended` says whether the model generated an end token.
    """
    import torch  # here, because reading data sets does not need it

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
    stories = list(zip(texts, out.ended.tolist()))
    return [stories[i : i + n] for i in range(0, len(stories), n)]


def make_pairs(args):
    """
    Write rankings of a model's own stories by the gold reward; the rewards of adjacent stories in a
    ranking differ by at least --margin.
    """
    rng = random.Random(args.seed)
    prompts = list(dict.fromkeys(r.turns[-1][0] for r in read(f"{args.data_dir}/task/sft.jsonl")))
    prompts = rng.sample(prompts, min(args.prompts, len(prompts)))
    rankings = []
    for prompt, samples in zip(prompts, generate_stories(args, prompts, args.completions)):
        stories = [story for story, ended in samples if ended and story]
        ranking = []
        for score, story in sorted(zip(gold([prompt] * len(stories), stories), stories))[::-1]:
            if not ranking or ranking[-1][0] - score >= args.margin:
                ranking.append((score, story))
        if len(ranking) > 1:
            rankings.append({"prompt": prompt, "completions": [story for _, story in ranking]})
    if not rankings:
        raise ValueError(
            f"{args.checkpoint} generated no two complete stories for a prompt whose gold rewards "
            f"differ by {args.margin}: use a smaller --margin or more --completions"
        )
    write_jsonl(args.output or f"{args.data_dir}/task/own_pairs.jsonl", rankings)


def print_scores(args):
    """Print the mean scores of each model's stories for held-out prompts."""
    prompts = [r.turns[-1][0] for r in read(f"{args.data_dir}/task/val.jsonl")]
    prompts = list(dict.fromkeys(prompts))[: args.prompts]
    print(f"{len(prompts)} held-out prompts, temperature {args.temperature}")
    print("gold   all words  words  ending  length  ended")
    for path in args.checkpoint.split(","):
        args.checkpoint = path
        stories, ended = zip(*(sample for [sample] in generate_stories(args, prompts, 1)))
        scores = np.array([judge(p, story) for p, story in zip(prompts, stories)])
        reward = np.mean(gold(prompts, stories))
        words, ending, length = scores.mean(0)
        print(
            f"{reward:.3f}  {np.mean(scores[:, 0] == 1):9.1%}  {words:5.1%}  {ending:6.1%}  "
            f"{length:6.1%}  {np.mean(ended):5.1%}  {path}"
        )
        print(f"  {prompts[0]} >>> {' '.join(printable(stories[0]).split())}")


# -----------------------------------------------------------------------------

SAMPLING_FLAGS = "data_dir checkpoint tokenizer template prompts temperature seed device".split()
COMMANDS = {  # the flags of each command
    "stories": ["data_dir", "samples", "per_story", "margin", "seed"],
    "pairs": [*SAMPLING_FLAGS, "completions", "margin", "output"],
    "judge": SAMPLING_FLAGS,
}


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__)
    add = parser.add_argument
    add("stage", choices=[*COMMANDS], help="command; `instruct.py pairs --help` shows its flags")
    add(
        "--data_dir", "--data", default="data", help="folder of the stories; task/ is its subfolder"
    )
    add("--checkpoint", default="out/sft_ckpt.pt", help="model; judge accepts several: a.pt,b.pt")
    add("--tokenizer", default="", help="tokenizer file; default: the checkpoint's")
    add(
        "--template",
        default="",
        help="plain, llama2 or JSON file; default: the checkpoint's, or plain",
    )
    add("--samples", type=int, default=20000, help="maximum number of records per file")
    add("--per_story", type=int, default=3, help="instructions per story")
    add("--prompts", type=int, default=500, help="maximum number of prompts")
    add("--completions", type=int, default=4, help="stories per prompt")
    add("--margin", type=float, default=0.1, help="minimum difference of gold rewards in a pair")
    add("--output", default="", help="file for the rankings; default: task/own_pairs.jsonl")
    add("--temperature", type=float, default=1.0, help="sampling temperature")
    add("--seed", type=int, default=1337, help="random seed")
    add("--device", default="", help="cpu, cuda, cuda:1 or mps; default: the fastest available")
    args = parse_args(parser, argv, lambda args: flags_of_others(args.stage, COMMANDS))
    for name in "samples", "per_story", "prompts", "completions":
        if getattr(args, name) < 1:
            raise ValueError(f"--{name} must be at least 1, not {getattr(args, name)}")
    if args.temperature < 0:
        raise ValueError(f"--temperature must not be negative, not {args.temperature}")
    {"stories": make_task, "pairs": make_pairs, "judge": print_scores}[args.stage](args)


if __name__ == "__main__":
    run_main(main)
