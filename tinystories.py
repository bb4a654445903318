"""
Stories: get them, cut them into tokens, and deal them to the training loop.

    python tinystories.py download                        # the real data set, or:
    python tinystories.py synthesize                      # a stand-in, made here, offline
    python tinystories.py train_vocab --vocab_size=512    # -> data/tok512.model
    python tinystories.py pretokenize --vocab_size=512    # -> data/tok512/*.bin

Without --vocab_size, pretokenize uses Llama 2's vocabulary (tokenizer.model). Text of your own:
put .txt, .json or .jsonl files into a folder and name it with --data_dir. The first file by name
is for validation. Items of JSON are strings, or objects with "story" or "text"; the stories of a
.txt are separated by <|endoftext|> or, where it has none, by blank lines.
"""

import argparse
import collections
import concurrent.futures
import contextlib
import glob
import io
import itertools
import json
import multiprocessing
import os
import random
import re
import shutil
import signal
import struct
import tarfile
import threading
import time
import urllib.parse
import zlib

import numpy as np
import requests
import sentencepiece
from tqdm import tqdm

from tokenizer import Tokenizer, boolean, find_tokenizer, parse_args, run_main, write_atomic

BOS = 1  # every story in a shard is preceded by it
END_OF_TEXT = "<|endoftext|>"

# -----------------------------------------------------------------------------
# Files of stories

def stories_folder(data_dir):
    """Where the stories of a data folder lie: llama2.c's subfolder, or, without it, right there."""
    folder = os.path.join(data_dir, "TinyStories_all_data")
    return folder if os.path.isdir(folder) else data_dir

def story_files(data_dir):
    """All files of stories in a data folder, by name. Raises FileNotFoundError if there is none."""
    folder = stories_folder(data_dir)
    files = sorted(path for path in glob.glob(glob.escape(folder) + "/*")
                   if path.endswith((".json", ".jsonl", ".txt")))
    if not files:
        raise FileNotFoundError(f"no stories (.json, .jsonl, .txt) in {folder}; get some with: "
                                "python tinystories.py download, or offline: synthesize")
    return files

def read_stories(path):
    """The stories of one file, one by one, stripped; ValueError if there are none, or no text."""
    empty = True
    try:
        with open(path, encoding="utf-8-sig") as f:
            if path.endswith(".txt"):
                text = f.read()
                items = text.split(END_OF_TEXT) if END_OF_TEXT in text else \
                        re.split(r"\n\s*\n", text)
            elif path.endswith(".json"):
                items = json.load(f)
            else:
                items = (json.loads(line) for line in f if line.strip())
            for item in items:
                if isinstance(item, dict):
                    item = item.get("story", item.get("text"))
                if not isinstance(item, str):
                    raise ValueError('needs strings, or objects with "story" or "text"')
                item = item.strip().encode(errors="replace").decode()  # JSON can spell non-text
                if item:
                    empty = False
                    yield item
    except (ValueError, TypeError) as e:  # not JSON, not UTF-8, not a list
        raise ValueError(f"{path}: {e}")
    if empty:
        raise ValueError(f"{path} holds no story")

@contextlib.contextmanager
def new_folder(folder):
    """A temporary folder, which becomes `folder` if all goes well and is removed if not."""
    temporary = folder + ".tmp"
    shutil.rmtree(temporary, ignore_errors=True)  # of a run that was killed
    os.makedirs(temporary)
    try:
        yield temporary
        os.replace(temporary, folder)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise

def write_shards(folder, stories):
    """Stories in the layout of TinyStories_all_data: data00.json (small, validation), data01, …"""
    n_val = min(1000, max(1, len(stories) // 20))
    cuts = [0, *range(n_val, len(stories), 2500), len(stories)]
    with new_folder(folder) as temporary:
        for i, (start, end) in enumerate(zip(cuts, cuts[1:])):
            with open(os.path.join(temporary, f"data{i:02d}.json"), "w", encoding="utf-8") as f:
                json.dump([{"story": story} for story in stories[start:end]], f)
    print(f"wrote {len(stories):,} stories to {folder}, in {len(cuts) - 1} shards")

# -----------------------------------------------------------------------------
# The real stories

URL = "https://huggingface.co/datasets/roneneldan/TinyStories/resolve/main"
PATIENCE = 10  # seconds to wait for a server

def connect(url, start):
    """The server's answer for `url` from byte `start` on; ConnectionError if it does not come."""
    answer = []
    def get():
        try:
            answer.append(requests.get(url, stream=True, timeout=(PATIENCE, 30), headers={
                "Accept-Encoding": "identity", **({"Range": f"bytes={start}-"} if start else {})}))
        except requests.RequestException:
            pass
    # in a thread, because looking up a name and a chain of redirects heed no timeout
    thread = threading.Thread(target=get, daemon=True)
    thread.start()
    thread.join(PATIENCE)
    if not answer:
        raise ConnectionError(f"no connection to {urllib.parse.urlsplit(url).netloc or url}; "
                              "offline, make stories with: python tinystories.py synthesize")
    return answer[0]

def fetch(url, path):
    """Download url to path. It grows as path.part; a broken transfer goes on where it broke off."""
    part = path + ".part"
    os.makedirs(os.path.dirname(path), exist_ok=True)
    for attempt in range(5):
        time.sleep(attempt / 4)
        start = os.path.getsize(part) if os.path.exists(part) else 0
        with connect(url, start) as response:
            # "bytes 5-9/10", or "bytes */10" where there is nothing from `start` on
            got = re.match(r"bytes (\d+|\*).*/(\d+)", response.headers.get("Content-Range", ""))
            if response.status_code == 200:  # all of it, whether or not we asked for a part
                start, total = 0, int(response.headers.get("Content-Length", -1))
            elif response.status_code == 206 and got and got[1] == str(start):
                total = int(got[2])
            elif response.status_code in (206, 416) and start:
                if not (got and got[1] == "*" and int(got[2]) == start):
                    os.remove(part)  # is of another file: start over
                    continue
                total = start
            else:
                raise OSError(f"{url}: the server answers {response.status_code} {response.reason}")
            broken = False
            with open(part, "ab" if start else "wb") as f, progress(
                    os.path.basename(path), max(total, 0), initial=start) as bar:
                try:
                    for chunk in response.iter_content(1 << 14) if start != total else ():
                        f.write(chunk)
                        bar.update(len(chunk))
                except requests.RequestException:
                    broken = True
                f.flush()
                os.fsync(f.fileno())
        size = os.path.getsize(part)
        if size == total or total < 0 and not broken:
            return os.replace(part, path)
        if size > total >= 0:
            os.remove(part)
    raise OSError(f"{url}: the transfer broke off {attempt + 1} times; "
                  "run the same command again and it goes on from there")

def unpack(archive, folder):
    """The .json files in a tar archive, flat into `folder`. Refuses names that lead elsewhere."""
    try:
        with new_folder(folder) as temporary, tarfile.open(archive) as tar:
            for member in progress("unpacking", unit="file", items=tar):
                parts = member.name.replace("\\", "/").split("/")
                if member.name.startswith("/") or ".." in parts or not (
                        member.isfile() or member.isdir()):
                    raise ValueError(f"{archive} is not to be trusted: {member.name!r} is a link "
                                     "or leads out of its folder; nothing was unpacked")
                if member.isfile() and re.fullmatch(r"[^.].*\.json", parts[-1]):
                    with open(os.path.join(temporary, parts[-1]), "wb") as f:
                        shutil.copyfileobj(tar.extractfile(member), f)
    except (tarfile.TarError, EOFError, zlib.error) as e:
        raise ValueError(f"{archive} is damaged ({e}); delete it and download it again")

def download(data_dir, url=URL, small=False):
    """The whole data set (1.6 GB) as llama2.c has it, or only its 22 MB of validation stories."""
    folder = os.path.join(data_dir, "TinyStories_all_data")
    if os.path.isdir(folder):
        return print(f"{folder} is there already; delete it to download it again")
    name = "TinyStoriesV2-GPT4-valid.txt" if small else "TinyStories_all_data.tar.gz"
    path = os.path.join(data_dir, "download", name)
    if not os.path.exists(path):
        fetch(f"{url}/{name}", path)
    if small:
        write_shards(folder, list(read_stories(path)))
    else:
        unpack(path, folder)
        print(f"unpacked {len(story_files(data_dir))} shards to {folder}")

def progress(title, total=None, unit="B", items=None, **options):
    """A progress bar with rate and time left, on a terminal only."""
    return tqdm(items, desc=title, total=total, unit=unit, unit_scale=True, disable=None, **options)

# -----------------------------------------------------------------------------
# The offline stand-in: stories told by a small grammar. An entry is a slot (name = choices, drawn
# once a story), a rule (name: text) or a plan (* text: a problem, a turn, an ending). In a text,
# [a|b] is a choice; <a|b> is one, too, but only talkative narrators make it, and each story draws
# how talkative it is, which spreads the lengths; $x is a slot or rule; / begins a paragraph.

GRAMMAR = """
adj = little|little|small|happy|kind|brave|curious|shy|clever|funny|sweet|young|quiet
color = red|blue|green|yellow|pink|purple|white|brown|shiny|big|small|soft|pretty|new|old
thing = ball|doll|kite|drum|book|hat|boat|robot|teddy bear|toy car|balloon|blanket|bell|truck|
  train|crown|scarf|ring|cup|basket
toy = toy car|robot|drum|boat|train|doll|truck|teddy bear
at = in the park|in the garden|in the forest|on the farm|in the field|in the yard|by the lake|
  on the hill|by the river|on the beach|in the meadow|by the sea
food = apples|cookies|berries|carrots|nuts|pears|plums|cherries|muffins|pancakes
pet = kitten|puppy|duck|rabbit|lamb|hamster|hedgehog|little goat
hobby = read books|draw pictures|sing songs|climb trees|look at the stars|jump in puddles|
  pick flowers|dance in the rain|play hide and seek|run in the grass|tell jokes|count the clouds|
  build towers|help in the kitchen|feed the birds|play outside
open: [[Once upon a time|Once upon a time|Once|Long ago], there [was|lived] a $adj $kind named
  $N. [$he loved to $hobby.|$N lived with $his $mom in a [small|yellow|cozy] house.|every day, $he
  liked to $hobby.]|$N was a $adj $kind who [loved|liked] to $hobby.|there was a $adj $kind. $his
  name was $N. <$he loved to $hobby.>] <$N had a [kind|good] heart and [many friends|a big
  smile].|everyone [in the village|in town] knew $N.> <every morning, $N ate $food with $his $mom.
  <"what will you do today?" $mom always asked. "[something new|something fun|i will play
  outside]," $N always said.>|near the house, there was [an apple tree|a small pond|a garden full
  of flowers]. <$N liked to sit there and [think|sing|look at the sky].>>
one: one [day|day|sunny day|warm day|quiet morning|windy morning|bright morning|afternoon]
sky: <the [sun was warm|sky was blue] and the [birds sang|wind was soft|bees were busy].>
way: <on the way, $he saw a [tiny|slow|busy|funny] [ant|snail|bee|bug|worm|frog]. <"hello, little
  friend," said $N.>|$he [walked|hopped|ran] past the [old tree|red barn|tall fence|green
  pond|little shop|stone wall].>
sad: <$N was very sad.|$N felt sad.|$N [began|started] to cry.|a tear ran down $his face.|$N did
  not know what to do.>
glad: <$N was [so|very] happy!|$N felt [happy|glad] again.|$N smiled.|$N clapped $his $hands.|$N
  jumped [up and down|with joy].|$N had a big smile on $his face.>
both: [they were both very happy.|they laughed and laughed.|they [smiled at|hugged] each
  other.|$N and $F [danced around|felt warm inside].]
buddy: [$his friend $F|$his best friend $F|a [nice|kind|friendly] $fkind named $F]
thanks: "thank you[|, $F| so much]!" said $N. <"you are welcome," said $F. "[friends help each
  other|i am always glad to help|that is what friends do].">
last: [at last|finally|in the end|after a long time],
learn: [$N learned that|from that day on, $N knew that|now $N knew that|that day, $N learned
  that]
fun: [then|after that], [they|$N and $F] [played [tag|games|together]|sang songs|danced|ate
  $food|told jokes|ran and jumped] [until it was dark|until the sun went down|all day long|for a
  long time]. <the next day, they met again. "what do you want to do?" asked $F. "let us $hobby,"
  said $N. and so they did.>
close: <$N and $his $mom had [soup|$food|warm bread] for dinner. <"[may i have more|is there
  more]?" asked $N. $mom laughed.>> <[that night|at bedtime|in the evening], [$N told $his $mom
  about [the day|everything]. <"[i am proud of you|what a day|you did so well|you have a good
  heart]," said $mom.> <$mhe gave $him a [big hug|kiss on the nose].> $N [smiled and|closed $his
  eyes and] fell asleep.|$N lay in bed and thought about the day. <$he could hear [the rain|an
  owl|the wind|a cricket] outside.> it had been a [good|great|long|happy] day.]> [||||it was the
  best day ever.|and they all lived happily.|the end.]
* $N had a $color $thing. <it was $his favorite thing in the world.> $one, the $thing was gone!
  $sad "have you seen my $thing?" $he asked $his $mom. "no," said $mom. "but [i will help you|we
  can look together]." / they looked [under the bed|in the kitchen] and [behind the door|under the
  table]. <it was not there. they looked [in every box|in the yard], too.> $last they found it [in
  the tall grass|under a chair|in a big shoe|behind a tree]! $glad <"now i will put it away each
  night," $he said.> <$learn it is good to take care of $his things.>
* $one, $N was flying a kite $at. $sky the wind pulled hard, and the kite got stuck in a tall
  tree. $sad <"it is too high for me," $he said.> / $buddy came by. "what is wrong?" $fhe asked.
  "my kite is stuck," said $N. $F [climbed up the tree|found a long stick|stood on a box] and got
  the kite down. $thanks $both <$fun> <$learn a friend can make a big problem small.>
* $one, $N and $his $mom wanted to have a picnic $at. they packed $food and [juice|cheese|bread].
  $way then dark clouds came, and it began to rain! "oh no!" cried $N. "our picnic is wet!" / $mom
  had an idea. "let us [make a tent|have our picnic] inside," $mhe said. they put a blanket on the
  floor and ate all the $food. <the rain went tap, tap, tap on the roof.> $glad <$learn a rainy day
  can be fun, too.>
* $one, $N was playing with a $color $thing $at. $buddy came and wanted to play, too. "no! it is
  mine!" said $N. $F [walked away|sat down alone] and looked sad. / $N played alone, but it was not
  fun. <$he looked at $F for a long time.> then $he ran to $F. "i am sorry," $he said. "let us
  share." "[yes, please|i would love that]," said $F. they took turns with the $thing. $both <$fun>
  <$learn it is more fun to share.>
* $one, $N was walking $at. $way $he saw a baby bird on the ground. it had fallen from its nest.
  "do not be [afraid|scared], little bird," said $N. <the bird said, "peep, peep."> $he ran home
  and told $his $mom. / $mom came with a ladder. <$mhe held it still.> very gently, $N put the bird
  back in the nest. the [mother bird|bird's mother] sang a [happy|sweet] song. $glad <every morning
  after that, the birds sang for $N.> <$learn even the small can help.>
* $N was afraid of the dark. every night, $he [hid under the blanket|called for $his $mom]. one
  night, $he saw a [big shadow|strange shape] on the wall. "help! a monster!" $he cried. / $his
  $mom came and turned on the light. <"look," said $mom.> it was only [$his coat|a chair with a
  hat|$his old $toy]! $N laughed. <"it was so silly of me," $he said.> $mom gave $him a little lamp
  that looked like a [star|moon]. <$learn there is nothing to fear in the dark.>
* $one, $N was running in the house. crash! $he hit the table, and $his $mom's $color
  [cup|plate|vase] broke. $N was scared. <$he wanted to hide it under the bed.> "who did this?"
  asked $mom. / $N looked at the floor. "i did it," $he said. "i am sorry." $mom was not mad.
  "thank you for telling the truth," $mhe said. <they cleaned the floor together.> $glad <$learn it
  is best to tell the truth.>
* $one, $N and $his $mom went to the market. it was [big|full of people] and [loud|busy]. $N
  stopped to look at a [$color $thing|cake|fish]. when $he looked up, $mom was gone! $sad / <"where
  are you?" $he called.> a [baker|farmer|teacher] saw $him and said, "we will wait here for your
  $mom." soon $mom came running. "there you are!" $mhe said and held $him tight. <"i was so
  scared," said $N.> <$learn $he must stay close to $his $mom.>
* $one, $N found a tiny seed. "what will you be?" $he asked. $he put it in the ground and gave it
  water. <"grow, little seed," $he said.> the next day, there was nothing. $sad "be patient," said
  $his $mom. "[good things take time|seeds need time to grow]." / each day, $N gave the seed water.
  <the sun came, and the rain came.> $last a green leaf came up! soon there was a [tall|big|pretty]
  [yellow|red|pink] flower. $glad <$learn it is good to wait.>
* $one, $N and $his $mom made a cake. they mixed eggs, milk and [sugar|flour]. <$N got flour on
  $his nose.> but they [forgot the cake|played outside too long], and it burned! "it is all black,"
  said $N. $sad / "do not worry," said $mom. "we can try again." this time, they watched the cake.
  <a sweet smell filled the kitchen.> it came out [soft|warm|golden] and yummy. $glad <$learn we
  can always try again.>
* a new $fkind came to school. $fhis name was $F, and $fhe was very shy. <$F sat alone by the
  window.> $N saw $fhim and went over. "hello, i am $N," $he said. "do you want to [play|draw] with
  me?" / $F looked up and smiled. "yes, please," $fhe said. they [played with blocks|drew a big
  house|made a paper boat|read a funny book]. <$F told $N about $fhis $color $thing.> $both <$fun>
  <$learn a kind word can make a new friend.>
* $N wanted to learn to [ride a bike|swim|skate]. $one, $he tried for the first time. [oops|oh
  no]! $he [could not do it|was too slow|was scared]. "i can not do it," said $N. $sad / "try
  again," said $his $mom. "i will help you." <$N took a deep breath.> $he tried again and again.
  $last $he did it! "look at me!" $he shouted. <$mom clapped and cheered.> $glad <$learn it is good
  to never give up.>
* $one, it was cold and $N heard a small sound. it was a [lost|cold|wet] $pet $at! <it was
  shaking and had sad eyes.> "you poor thing," said $N. $he took it home in $his [coat|scarf|hat].
  / "can we keep it?" $he asked. "we must first look for its home," said $mom. they asked everyone,
  but nobody knew the $pet. "then it can stay," said $mom. $glad $he gave it [warm milk|food and
  water] and a soft bed. <the $pet fell asleep next to $him.> from then on, they were best friends.
* $one, $N found a $color stone $at. it was magic! "i will give you one wish," said the stone. $N
  thought and thought. <$he could wish for a castle or a mountain of $food.> then $he saw $his
  friend $F, who [was sick|had no toys|was all alone]. / "i wish that $F could be happy," said $N.
  [poof|flash]! $F smiled a big smile. "you have a good heart," said the stone. <then it was just a
  stone again.> $both <$learn the best wish is for someone else.>
* $N had a big basket of $food. $one, $buddy came by. "i am so hungry," said $F. "may i have
  some?" $N held the basket tight. "no, they are mine," $he said. $F went away. <$N ate alone, and
  it was very quiet.> / the next day, $N [dropped|lost] the basket in the [mud|river]. now $he had
  nothing. $sad then $F came back with bread. "here, we can share," $fhe said. <"but i was mean to
  you," said $N. "i forgive you," said $F.> $both <$learn it is good to be kind.>
* $one, $N went to the beach and made a sand castle. <it had four towers and a door made of
  shells.> "it is the best castle," $he said. then a big wave came. splash! the castle was gone.
  $sad / $buddy came with a [bucket|shovel]. "let us build a new one, away from the water," said
  $F. they worked hard. the new castle was even bigger! $both <$fun> <$learn two can do more than
  one.>
* it was $N's birthday, but nobody said a word. $mom was busy. $his friend $F did not come to
  play. "they all forgot me," said $N. $sad <$he went for a walk alone.> / when $he came home, the
  house was dark. $he opened the door. "surprise!" everyone shouted. there was cake, and there were
  [balloons|gifts|$food]. <$F gave $him a $color $thing.> "we did not forget you," said $mom. $glad
  it was the best birthday.
* $one, $his friend $F did not come to play. $N went to see $fhim. $F was in bed. "i am sick,"
  said $F in a small voice. <$fhis nose was red.> $N wanted to help. / $he went home and made
  [soup|tea] with $his $mom. $way $he took it to $F and [read $fhim a story|sang $fhim a song|told
  $fhim a joke]. soon $F felt better. $thanks $both <$learn love can help us heal.> <$fun>
* $one, $N's favorite $toy broke. $sad "i can not play with it now," $he said. <$he put the parts
  in a box.> $his $mom [came in|saw it]. "[let me see|show me]," said $mom. "we can fix it." / they
  sat down with [glue|tape] and [paint|string]. <"hold this part," said $mom. $N held it very
  still.> $last the $toy was like new. $glad "thank you!" $he said and gave $mom a hug. <$learn
  broken things can be fixed with love.>
* there was a big dog next door. it was very loud. "woof! woof!" $N was afraid of it. <every day,
  $he ran past the gate.> $one, $his ball went over the fence. "oh no," said $N. / the dog picked
  up the ball and brought it to $N. it wagged its tail. <"do you want to play?" asked $N. "woof!"
  said the dog.> $N threw the ball, and the dog ran to get it. $glad <$learn someone big and loud
  can be gentle.>
* $one, $N and $his friend $F wanted to build the tallest tower. $N put blocks on one side, and
  $F put blocks on the other. "my way is better!" said $N. "no, mine is!" said $F. crash! the tower
  fell down. / they [looked at each other|sat on the floor]. "let us do it together," said $F.
  <"you hold it, and i will put the block on top," said $N.> $last the tower was as tall as [a
  door|the table|$mom]. $both <$learn it is better to work together.> <$fun>
* one night, it snowed and snowed. in the morning, $N ran outside. $he and $his friend $F made a
  big snowman <with a carrot nose and an old hat>. "we love you, snowman," they said. but the next
  day, the sun was hot. the snowman got smaller and smaller. / "do not go!" cried $N. $sad "[he|it]
  will come back next winter," said $mom. <$N kept the old hat in a safe place.> and when the snow
  came again, they made a new snowman. $both <$learn good things can come back.> <$fun>
* it was late, but $N did not want to sleep. "i am not tired," $he said. <$he played with $his
  $thing under the covers.> the next day, $his friends went $to. but $N was so sleepy that $he
  could not run or play. $he sat down and closed $his eyes. / "now i know why we sleep," $he told
  $his $mom. <"sleep makes us strong," said $mom.> that night, $N went to bed early. in the
  morning, $he [ran|hopped|jumped] [faster than all of them|out the door]. $glad
* $one, $N came to a [wide|deep] river. $his [home|friend|$mom] was on the other side, and $he
  could not swim. $sad "i can help you," said [a turtle|a duck|a beaver|a swan]. "sit on my back."
  / they went slowly over the water. <a fish jumped, and $N laughed.> soon they were on the other
  side. "what can i give you?" asked $N. "just be kind to someone else," it said. <so the next day,
  $N helped an old [man|woman] with a heavy bag.> <$learn kindness goes around.>
* $one, $N wanted to make a gift for $his $mom. $he painted a picture of [a house|flowers|the
  sun|their family]. <$he used red, blue and yellow.> then the water fell on it! now the picture
  was a mess. $sad / "what is this?" asked $mom. "it was for you, but it is bad," said $N. "it is
  lovely," said $mom. "i see [a rainbow|clouds] in it." <$mhe put it on the wall for all to see.>
  $glad <$learn a gift from the heart is always good.>
* $one, $N smelled something sweet. it was honey, high in a tree! $he put $his $hand in the nest.
  buzz! the bees were angry, and $N ran away. <$he jumped into a pond to hide.> / "you did not
  ask," said a little bee. "may i please have some honey?" asked $N. "i will bring you flowers."
  "then you may," said the bee. <so $N brought a big bunch of flowers.> the bees gave $him a full
  jar. $glad <$learn it is good to ask first.>
* $one, $N found a [purse|coin|gold ring|little box] on the road. <"i could buy a $color $thing
  with this," $he thought.> but then $he saw $his old neighbor, who looked and looked. / "is this
  yours?" asked $N. "oh, thank you!" said the neighbor. "you are so [good|honest]." $N got [a
  cookie|a big apple|a warm hug] for it. <$he walked home and sang a song.> $glad <$learn it feels
  good to do the right thing.>
* every night, $N looked at the moon. "i want to [touch|hold] it," $he said. $one, $he climbed
  the highest hill, but the moon was still too far. <$he jumped and jumped.> $sad $buddy saw $him.
  "come with me," said $F. / they went to a [quiet pond|still lake]. there was the moon, in the
  water! $N put $his $hand in and touched it. <the moon danced on the water.> "now i can visit it
  every night," $he said. $both <$fun>
* $N had a lovely voice, but $he was too shy to sing. $one, there was a show at school. "you can
  do it," said $his friend $F. <$N's legs began to shake.> $N stood up and opened $his mouth, but
  no sound came out. $sad / then $F came and took $his $hand. they sang together. soon $N forgot to
  be afraid and sang alone. <it was so quiet that you could hear a leaf fall.> everyone clapped.
  $glad <$learn friends make us brave.>
* $one, $N and $his friend $F found an old map. "there is a big x on it!" said $F. "it must be
  treasure!" They followed the map past the [pond|barn|bridge] and up the hill. $way <they were
  tired, but they did not stop.> / under a rock, they found a box. in the box was [a note|a
  letter]. it said, "[the real treasure is a good friend|look next to you]." <first they were sad.
  then they began to laugh.> $both <$fun>
* $N and $his $mom had a pumpkin in the garden. it grew and grew. $one, $mom pulled, but it did
  not move. $N pulled, too, but it was too heavy. <"one, two, three, pull!"> Then $buddy came and
  pulled. it still did not move. / a tiny mouse came by. "i can help," it said. <they all laughed.
  "you are too small," said $N.> they all pulled again, and pop! the pumpkin came out. <that night,
  they ate warm pumpkin pie.> $glad <$learn everyone can help, big or small.>
* $one, $N lost a tooth. <it was white and very small.> $he put it under $his pillow, but a mouse
  came and took it! "give it back!" cried $N. $he ran after the mouse. / the mouse stopped at a
  little house. "my baby wanted a white chair," it said. $N looked in. the tooth was just right for
  a chair! <the baby mouse said, "thank you."> "you can keep it," said $N. in the morning, there
  was a $color $thing under the pillow. $glad <$learn giving is as good as getting.>
* $one, the wind took $N's hat. "come back!" $he cried and ran after it. <up the hill and down
  the hill $he ran.> the hat fell on the head of a [cow|goat|donkey]! "it looks good on you," said
  $N. <then it ate the flower on the hat.> $glad
* $one, there was one cookie left. $N looked at it. <it smelled so good.> then $he broke it in
  two. "half for me, and half for you," $he said to $his $mom. $mom [smiled|was so proud]. <"it
  tastes better this way," said $N.> $learn sharing makes food taste better.
* $one, $N saw a [yellow|blue|white] butterfly $at. $he wanted to catch it, but it was too quick.
  <$he ran left, and $he ran right.> then $N sat very still. the butterfly came and sat on $his
  nose! $glad <$learn quiet ones see more.>
* one night, $N could not sleep. <the moon was bright.> "count the stars with me," said $his
  $mom. "one, two, three," they began. <"is that one a star or a plane?" asked $N.> before they
  came to [ten|twenty], $N was asleep.
* $one, $N and $his friend $F saw a rainbow. "let us find the end of it!" said $F. they [ran and
  ran|walked for a long time], but it was always far away. <then it was gone.> "it does not
  matter," said $N. "i had fun with you." $both <$fun>
"""
GIRLS = "Lily Mia Anna Sara Lucy Amy Emma Sue Ella Zoe Rose Nora".split()
BOYS = "Tom Tim Ben Max Sam Jack Leo Dan Finn Bob Joe Adam".split()
ANIMALS = "rabbit bear mouse fox cat puppy squirrel monkey".split()
ADULTS = ("Mom", "she"), ("Mom", "she"), ("Dad", "he"), ("Grandma", "she"), ("Grandpa", "he")
FIXES = [(re.compile(pattern), fix) for pattern, fix in (  # what is easier to mend afterwards
    (r" */ *", "\n"),
    (r" +(?=[ .,!?])|^ +| +$", ""),
    (r"\b(?:[Hh]is|[Hh]er|your) (?:Mom|Dad|Grand)", lambda m: m[0].lower()),
    (r"\b([Aa]) (?=[aeiou])", r"\1n "),
    (r"\bi\b", "I"),
    (r'((?:^|\n|[.!?] |\." )"?| ")([a-z])', lambda m: m[1] + m[2].upper()),
)]

def parse(text):
    """A template as nested lists of parts: words, ("$", name), ("[", options), ("<", options)."""
    stack = [[[]]]  # of each open bracket: its options, each a list of parts
    for part in re.split(r"([\[\]<>|]|\$\w+)", text):
        if part in ("[", "<"):
            stack.append([[]])
            stack[-2][-1].append((part, stack[-1]))
        elif part in ("]", ">"):
            stack.pop()
        elif part == "|":
            stack[-1].append([])
        elif part:
            stack[-1][-1].append(("$", part[1:]) if part[0] == "$" else part)
    return stack[0][0]

SLOTS, RULES, PLANS = {}, {}, []
for entry in re.split(r"\n(?! )", GRAMMAR.strip()):
    name, kind, text = re.fullmatch(r"(\w*)( =|:|\*) (.*)", re.sub(r"\n +", " ", entry)).groups()
    if kind == " =":
        SLOTS[name] = re.split(r"\| ?", text)
    elif kind == ":":
        RULES[name] = parse(text)
    else:
        PLANS.append(parse(f"$open {text} $close"))

def tell(parts, slots, draw, talk):
    """The words of a parsed template; draw() is random in [0, 1), `talk` the share of <extras>."""
    words = ""
    for part in parts:
        if isinstance(part, str):
            words += part
        elif part[0] == "$":
            words += slots.get(part[1]) or tell(RULES[part[1]], slots, draw, talk)
        elif part[0] == "[" or draw() < talk:
            words += tell(part[1][int(draw() * len(part[1]))], slots, draw, talk)
    return words

def tell_story(draw):
    """One story, from a source of random numbers in [0, 1)."""
    pick = lambda options: options[int(draw() * len(options))]
    slots = {name: pick(options) for name, options in SLOTS.items()}
    slots["to"] = "to " + slots["at"].split(" ", 1)[1]
    slots["mom"], slots["mhe"] = pick(ADULTS)
    for f, N in ("", "N"), ("f", "F"):  # the hero; the friend
        girl, animal = draw() < 0.5, draw() < 0.4
        slots[N] = pick([n for n in (GIRLS if girl else BOYS) if n != slots.get("N")])
        slots[f + "kind"] = pick(ANIMALS) if animal else "girl" if girl else "boy"
        slots[f + "he"], slots[f + "him"], slots[f + "his"] = \
            ("she", "her", "her") if girl else ("he", "him", "his")
        slots[f + "hand"] = "paw" if animal else "hand"
    slots["hands"] = slots["hand"] + "s"
    text = tell(pick(PLANS), slots, draw, talk=draw() ** 1.5)
    for pattern, fix in FIXES:
        text = pattern.sub(fix, text)
    return text

def synthesize(data_dir, n, seed):
    """n stories, no two equal, the same for the same seed on any machine."""
    folder = os.path.join(data_dir, "TinyStories_all_data")
    if os.path.isdir(folder):
        return print(f"{folder} is there already; delete it to make another")
    if n < 2:
        raise ValueError(f"--stories must be at least 2, not {n}")
    draw, stories = random.Random(seed).random, {}  # a dict: keeps the order, knows its keys
    with progress("telling", n, "story") as bar:
        while len(stories) < n:
            stories[tell_story(draw)] = True
            bar.update(len(stories) - bar.n)
    write_shards(folder, list(stories))

# -----------------------------------------------------------------------------
# Vocabulary and tokens

def train_vocab(data_dir, vocab_size, max_chars=100_000_000):
    """
    Train a SentencePiece BPE vocabulary on the training stories, up to max_chars characters
    (a small vocabulary has long settled by then): writes tok<vocab_size>.model.
    """
    if not 0 < vocab_size <= 65536:
        raise ValueError("train_vocab needs --vocab_size=N, at most 65536")
    files = story_files(data_dir)
    text = itertools.chain.from_iterable(map(read_stories, files[1:] or files))
    lines, chars = [], 0
    for story in text:
        lines += story.split("\n")
        chars += len(story)
        if chars >= max_chars:
            break
    print(f"training a vocabulary of {vocab_size} on {chars / 1e6:.1f} M characters ...")
    # Each character is a token. Where there are too many, as in Chinese, the commonest get half of
    # what the 256 bytes leave over; the others are spelt in bytes.
    counts = collections.Counter(itertools.chain.from_iterable(lines)).most_common()
    rare = {ord(c): " " for c, _ in counts[max(0, vocab_size - 259) // 2:]}
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=(line.translate(rare) for line in lines) if rare else iter(lines),
            model_writer=model, model_type="bpe", vocab_size=vocab_size, character_coverage=1.0,
            byte_fallback=True, split_digits=True, allow_whitespace_only_pieces=True,
            unk_surface=" \u2047 ", normalization_rule_name="identity",
            num_threads=os.cpu_count(), max_sentence_length=1 << 20, minloglevel=2,
            # llama2.c drops doubled spaces here; kept, text survives the round trip, and the
            # encoder in C, which keeps them, agrees
            remove_extra_whitespaces=False)
    except RuntimeError as e:
        reason = str(e).rpartition("] ")[2]  # what precedes it is for its authors
        raise ValueError(f"SentencePiece can not make a vocabulary of {vocab_size}: {reason}")
    path = os.path.join(data_dir, f"tok{vocab_size}.model")
    with write_atomic(path) as f:
        f.write(model.getvalue())
    print(f"wrote {path}")

class Encoder(dict):
    """
    Stories to the bytes of a shard, several times faster than SentencePiece alone: no token of a
    BPE vocabulary spans two words, so each word is encoded once and then looked up.
    """
    def __init__(self, model_path):
        self.tokenizer = Tokenizer(model_path)
        sp, n_words = self.tokenizer.sp, self.tokenizer.n_words
        # holds for the vocabularies made here and for Llama 2's, but not for just any
        self.by_word = sp is not None and not any(
            "\u2581" in piece.lstrip("\u2581") for piece in map(sp.id_to_piece, range(n_words)))

    def __missing__(self, text):
        ids = self.tokenizer.encode(text, bos=False, eos=False)
        packed = struct.pack(f"<{len(ids)}H", *ids)
        if len(text) < 50 and len(self) < 1_000_000:  # longer ones do not come again
            self[text] = packed
        return packed

    def __call__(self, stories):
        bos, shard = struct.pack("<H", BOS), []
        for story in stories:
            # a space is a word's first letter; only where spaces meet do they merge
            plain = self.by_word and "  " not in story and "\u2581" not in story
            shard.append(bos)
            shard.extend(map(self.__getitem__, story.split(" ") if plain else [story]))
        return b"".join(shard)

def start_worker(model_path):
    """Set up a process of the pool, which is to die with its parent and leave Ctrl-C to it."""
    global encoder
    encoder = Encoder(model_path)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()

def encode_chunk(stories):
    return encoder(stories)

def chunks(path, size=1 << 18):
    """The stories of a file in lists of about `size` characters."""
    chunk, chars = [], 0
    for story in read_stories(path):
        chunk.append(story)
        chars += len(story)
        if chars >= size:
            yield chunk
            chunk, chars = [], 0
    if chunk:
        yield chunk

def encode_files(pool, paths, ahead):
    """(path, stories, bytes) of all chunks in order; at most `ahead` are in memory at a time."""
    pending = collections.deque()
    for path, chunk in ((path, chunk) for path in paths for chunk in chunks(path)):
        pending.append((path, chunk, pool.submit(encode_chunk, chunk)))
        if len(pending) >= ahead:
            path, chunk, future = pending.popleft()
            yield path, chunk, future.result()
    for path, chunk, future in pending:
        yield path, chunk, future.result()

def pretokenize(data_dir, vocab_size=0):
    """
    Each file of stories to a shard of uint16 ids, every story after BOS, on all cores. A shard
    that is newer than its file and the tokenizer is not made again. vocab_size 0: Llama 2's, with
    the shards beside the stories, as in llama2.c.
    """
    model_path = find_tokenizer(vocab_size or 32000, data_dir)
    tokenizer = Tokenizer(model_path)
    n_words = tokenizer.n_words
    if n_words > 65536:
        raise ValueError(f"{model_path} has {n_words} tokens: at most 65536 fit into a shard")
    if n_words != (vocab_size or 32000):
        raise ValueError(f"{model_path} has {n_words} tokens, not {vocab_size or 32000}")
    if tokenizer.bos_id != BOS:
        raise ValueError(f"{model_path}: its BOS is token {tokenizer.bos_id}, in shards it is {BOS}")
    folder = os.path.join(data_dir, f"tok{vocab_size}") if vocab_size else stories_folder(data_dir)
    shards = {path: os.path.join(folder, os.path.splitext(os.path.basename(path))[0] + ".bin")
              for path in story_files(data_dir)}
    if len(set(shards.values())) < len(shards):
        raise ValueError(f"two files in {stories_folder(data_dir)} differ only in their ending")
    for stray in set(glob.glob(glob.escape(folder) + "/*.bin")) - set(shards.values()):
        print(f"note: {stray} belongs to no file of stories; if it is old, delete it")
    age = os.path.getmtime
    todo = [path for path, shard in shards.items()
            if not os.path.exists(shard) or age(shard) < max(age(path), age(model_path))]
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    start, n_stories, n_tokens = time.time(), 0, 0
    try:
        with concurrent.futures.ProcessPoolExecutor(
                cores, initializer=start_worker, initargs=(model_path,)) as pool, \
                progress("pretokenizing", sum(map(os.path.getsize, todo))) as bar:
            results = encode_files(pool, todo, ahead=4 * cores)
            for path, group in itertools.groupby(results, key=lambda result: result[0]):
                with write_atomic(shards[path]) as f:
                    for _, chunk, ids in group:
                        f.write(ids)
                        bar.update(sum(map(len, chunk)))
                        n_stories, n_tokens = n_stories + len(chunk), n_tokens + len(ids) // 2
    except concurrent.futures.BrokenExecutor:
        raise OSError("a process of the pool died (out of memory?); run the same command again "
                      "and it goes on with the shards that are missing")
    print(f"{folder}: {len(todo)} shards written, {len(shards) - len(todo)} up to date; "
          f"{n_stories:,} stories, {n_tokens:,} tokens in {time.time() - start:.1f} s")

# -----------------------------------------------------------------------------
# Shards: files of uint16 token ids, no header. The first is for validation.

def open_shards(folder, split, vocab_size):
    """
    The shards of `split` ("train" or "val") as a list of memory-mapped uint16 arrays.

    `folder` holds *.bin, or is a data folder with tok<vocab_size>/ (or, for 32000, Llama 2's
    TinyStories_all_data/) in it. The first shard by name is for validation, the rest are for
    training; a shard that is alone gives its last twentieth to validation.
    Raises FileNotFoundError without shards, ValueError for one that is damaged or does not fit.
    """
    folders = [folder, os.path.join(folder, f"tok{vocab_size}")]
    folders += [os.path.join(folder, "TinyStories_all_data")] * (vocab_size == 32000)
    found = (sorted(glob.glob(glob.escape(f) + "/*.bin")) for f in folders)
    # tokN.bin beside the shards is a vocabulary that tokenizer.py has written for C
    found = ([p for p in paths if not re.fullmatch(r"tok\d+\.bin", os.path.basename(p))]
             for paths in found)
    paths = next(filter(None, found), [])
    if not paths:
        flag = "" if vocab_size == 32000 else f" --vocab_size={vocab_size}"
        raise FileNotFoundError(f"no .bin shards in {' or '.join(folders)}; "
                                f"make them with: python tinystories.py pretokenize{flag}")
    if len(paths) > 1:
        paths = paths[:1] if split == "val" else paths[1:]
        return [open_shard(path, vocab_size) for path in paths]
    shard = open_shard(paths[0], vocab_size)
    cut = len(shard) - min(max(len(shard) // 20, 4096), len(shard) // 2)
    starts = np.flatnonzero(shard[cut:] == BOS)
    cut += starts[0] if len(starts) else 0  # between two stories, where there are any
    return [shard[cut:] if split == "val" else shard[:cut]]

def open_shard(path, vocab_size):
    size = os.path.getsize(path)
    if size == 0 or size % 2:
        raise ValueError(f"{path} has {size} bytes, which is no list of 2-byte tokens; delete it "
                         "and run `python tinystories.py pretokenize` again")
    shard = np.asarray(np.memmap(path, dtype="<u2", mode="r"))  # plain arrays slice faster
    top = int(shard.max())  # reads the file once, at memory speed: better now than mid-training
    if top >= vocab_size:
        raise ValueError(f"{path} holds token {top}, but the vocabulary has only {vocab_size}: "
                         "it was made with another tokenizer")
    return shard

def parse_data(data):
    """"dirA:0.7,dirB:0.3" -> ["dirA", "dirB"], [0.7, 0.3]; the weight of a lone folder is 1."""
    folders, weights = [], []
    for item in data.split(","):
        folder, _, weight = item.rpartition(":")
        try:
            folders, weights = folders + [folder or "."], weights + [float(weight)]
        except ValueError:  # no weight given (and perhaps a colon in the name)
            folders, weights = folders + [item], weights + [1.0]
    if not all(0 < w < float("inf") for w in weights):
        raise ValueError(f"the weights in {data!r} must be positive numbers")
    return folders, [w / sum(weights) for w in weights]

# -----------------------------------------------------------------------------
# Dealing: which item comes at which position. Position p is one number that counts the items
# dealt so far; it is all that a checkpoint has to keep, and any process can compute any of it.

def mix(x):
    """Scrambles uint64 (N,): the finalizer of splitmix64 (Steele, Lea, Flood 2014)."""
    x = (x ^ (x >> 30)) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> 27)) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> 31)

def permute(i, n, key):
    """
    Where a pseudo-random permutation of range(n) sends each of `i`: uint64 (N,) -> (N,), `key`
    (N,) chooses the permutation. A Feistel network permutes the next larger 4^k numbers; whoever
    lands outside range(n) walks on until back inside (Black and Rogaway 2002). No table: an epoch
    of a billion windows costs no memory, and resuming in the middle costs no time.
    """
    half = max(1, (int(n - 1).bit_length() + 1) // 2)
    mask = np.uint64((1 << half) - 1)
    i, todo = i.copy(), np.ones(len(i), bool)
    while todo.any():
        left, right = i[todo] >> half, i[todo] & mask
        for r in range(6):
            left, right = right, left ^ (mix(key[todo] + (right << 8) + np.uint64(r)) & mask)
        i[todo] = left << half | right
        todo = i >= n
    return i

class Dealer:
    """
    Deals the items of several folders in proportion to their weights; each folder is shuffled
    anew every epoch, and none of its items comes twice within one.
    `items[k][s]`: how many items shard s of folder k has.
    """
    BLOCK = 1000  # weights are rounded to thousandths: the order of folders repeats every BLOCK

    def __init__(self, items, weights, seed):
        self.first = [np.cumsum([0, *shards]) for shards in items]  # items before each shard
        self.sizes = [int(first[-1]) for first in self.first]
        self.seed = np.uint64(seed % 2**64)
        # `share` of BLOCK goes to each folder; what rounding leaves over, to the largest rests
        exact = np.multiply(weights, self.BLOCK)
        self.share = np.floor(exact).astype(int)
        self.share[np.argsort(self.share - exact)[:self.BLOCK - self.share.sum()]] += 1
        if not self.share.all():
            raise ValueError(f"a data folder has less than 1/{self.BLOCK} of the weights' sum")
        # spread evenly: the j-th of a folder's c items sits at (j + 0.5) / c of the block
        places = np.concatenate([(np.arange(c) + 0.5) / c for c in self.share])
        order = np.argsort(places, kind="stable")
        self.folder = np.repeat(np.arange(len(items)), self.share)[order]    # (BLOCK,)
        self.nth = np.concatenate([np.arange(c) for c in self.share])[order]  # (BLOCK,)
        # how many items can be dealt before any folder has to start over
        self.epoch = min(n * self.BLOCK // int(c) for n, c in zip(self.sizes, self.share))

    def deal(self, position, n):
        """Folder, shard and item in the shard, (N,) each, of the n positions from `position`."""
        block, place = np.divmod(np.arange(position, position + n), self.BLOCK)
        folder = self.folder[place]
        nth = block * self.share[folder] + self.nth[place]  # how many of its folder came before
        shard, item = np.empty_like(nth), np.empty_like(nth)
        for k in np.unique(folder):
            mine = folder == k
            epoch, i = np.divmod(nth[mine].astype(np.uint64), np.uint64(self.sizes[k]))
            key = mix(mix(epoch + self.seed) + np.uint64(k))
            i = permute(i, self.sizes[k], key).astype(np.int64)
            shard[mine] = np.searchsorted(self.first[k], i, side="right") - 1
            item[mine] = i - self.first[k][shard[mine]]
        return folder, shard, item

class Windows:
    """
    Windows of seq_len tokens and their targets, for training and validation.

        train = Windows("data/tok512", "train", seq_len=256, vocab_size=512, seed=1337)
        x, y = train.batch(position, 16)  # int64 (B,T), (B,T); y is x shifted by one
        position += 16                    # an integer: store it in the checkpoint

    A shard is cut into windows end to end; every window comes once in an epoch (`len(train)`
    windows), in an order that only the seed and the position decide. With W processes, rank r
    asks for batch(position + r * B, B), and all go on by W * B: none sees another's window.

    `data` may name several folders with weights: "dirA:0.7,dirB:0.3". `len` is then the number
    of windows before any folder starts over.
    """
    def __init__(self, data, split, seq_len, vocab_size, seed=1337):
        folders, weights = parse_data(data)
        self.seq_len = seq_len
        self.shards = [open_shards(folder, split, vocab_size) for folder in folders]
        windows = [[(len(ids) - 1) // seq_len for ids in shards] for shards in self.shards]
        for folder, shards, n in zip(folders, self.shards, windows):
            if sum(n) == 0:
                raise ValueError(f"{folder}: its {split} part has {sum(map(len, shards))} tokens, "
                                 f"too few for a window of {seq_len} and the token after it")
        # validation is the same whatever the seed of the run
        self.dealer = Dealer(windows, weights, seed if split == "train" else 0)

    def __len__(self):
        return self.dealer.epoch

    def batch(self, position, batch_size):
        """The batch_size windows from `position` on: x, y int64 (B,T)."""
        import torch  # here: the commands above need not wait a second for it
        T = self.seq_len
        out = np.empty((batch_size, T + 1), np.int64)
        for row, k, s, i in zip(out, *self.dealer.deal(position, batch_size)):
            row[:] = self.shards[k][s][i * T:i * T + T + 1]
        out = torch.from_numpy(out)
        return out[:, :-1].contiguous(), out[:, 1:].contiguous()

    def fixed(self, n, batch_size, rank=0, world_size=1):
        """
        Batches x, y of a fixed set of n windows (at most an epoch): the same at every call and,
        dealt out to the ranks batch by batch, for any number of processes. The last may be
        smaller, so weigh by rows: sum(loss * len(x)) / sum(len(x)), both summed over the ranks.
        """
        n = min(n, len(self))
        for start in range(rank * batch_size, n, world_size * batch_size):
            yield self.batch(start, min(batch_size, n - start))

class Prompts:
    """
    Beginnings of stories, for PPO: BOS and the first 0 to start_len - 1 tokens, as lists of ids.

        prompts = Prompts("data/tok512", "train", start_len=30, vocab_size=512, seed=1337)
        prompts.batch(position, 4)        # [[1, 403, 407], [1], [1, 317, ...], [1, 403]]

    Every story comes once in an epoch (`len(prompts)` stories); positions as in Windows.
    """
    def __init__(self, data, split, start_len, vocab_size, seed=1337):
        if start_len < 1:
            raise ValueError(f"start_len must be at least 1 (BOS alone), not {start_len}")
        folders, weights = parse_data(data)
        self.start_len, self.seed = start_len, np.array([seed % 2**64], np.uint64)
        self.shards = [open_shards(folder, split, vocab_size) for folder in folders]
        self.starts = [[np.flatnonzero(ids == BOS) for ids in shards] for shards in self.shards]
        for folder, starts in zip(folders, self.starts):
            if not sum(map(len, starts)):
                raise ValueError(f"{folder}: no story starts in its {split} part (no token {BOS})")
        self.dealer = Dealer([list(map(len, starts)) for starts in self.starts], weights, seed)

    def __len__(self):
        return self.dealer.epoch

    def batch(self, position, n):
        """The n prompts from `position` on."""
        positions = np.arange(position, position + n, dtype=np.uint64)
        lengths = 1 + mix(positions + mix(self.seed)) % self.start_len
        prompts = []
        for k, s, i, length in zip(*self.dealer.deal(position, n), lengths.tolist()):
            start = self.starts[k][s][i]
            tokens = self.shards[k][s][start:start + length].tolist()
            prompts.append(tokens[:(tokens + [BOS]).index(BOS, 1)])  # not into the next story
        return prompts

# -----------------------------------------------------------------------------

def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("stage", choices=["download", "synthesize", "train_vocab", "pretokenize"])
    parser.add_argument("--data_dir", default="data", help="where the stories and all else lie")
    group = parser.add_argument_group("train_vocab, pretokenize")
    group.add_argument("--vocab_size", type=int, default=0, help="tokens; 0 for Llama 2's 32000")
    group = parser.add_argument_group("download")
    group.add_argument("--small", type=boolean, nargs="?", const=True, default=False,
                       help="only the 22 MB of validation stories, cut into shards")
    group.add_argument("--url", default=URL, help="folder to download from")
    group = parser.add_argument_group("synthesize")
    group.add_argument("--stories", type=int, default=20000, help="how many")
    group.add_argument("--seed", type=int, default=1337, help="other seed, other stories")
    args = parse_args(parser, argv)
    if args.stage == "download":
        download(args.data_dir, args.url, args.small)
    elif args.stage == "synthesize":
        synthesize(args.data_dir, args.stories, args.seed)
    elif args.stage == "train_vocab":
        train_vocab(args.data_dir, args.vocab_size)
    else:
        pretokenize(args.data_dir, args.vocab_size)

if __name__ == "__main__":
    run_main(main)
