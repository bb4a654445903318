"""
Synthetic stories from a small grammar, which replace TinyStories where there is no connection.

    generate_story(random.Random(1337).random)    # "Once upon a time, there was a little fox ..."

Notation of the grammar:

    name = a|b      a slot: one choice is sampled per story
    name: text      a rule
    * text          a plan: the problem, the turn and the ending of a story
    [a|b]           one of the choices
    <a|b>           one of the choices or nothing; the probability of a choice, `detail`, is sampled
                    per story, so that the lengths of the stories vary
    $name           a slot or rule
    /               a new paragraph
"""

import re

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
FIXES = [
    (re.compile(pattern), fix)
    for pattern, fix in (  # spacing, articles and capital letters of the expanded text
        (r" */ *", "\n"),
        (r" +(?=[ .,!?])|^ +| +$", ""),
        (r"\b(?:[Hh]is|[Hh]er|your) (?:Mom|Dad|Grand)", lambda m: m[0].lower()),
        (r"\b([Aa]) (?=[aeiou])", r"\1n "),
        (r"\bi\b", "I"),
        (r'((?:^|\n|[.!?] |\." )"?| ")([a-z])', lambda m: m[1] + m[2].upper()),
    )
]


def parse(text):
    """
    Parse a text in the grammar's notation to a list of strings, ("$", name), ("[", options) and
    ("<", options), where each option is again such a list.
    """
    stack = [[[]]]  # for each open bracket its options, which are lists of parts
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


def expand(parts, slots, rand, detail):
    """The text of parsed parts; rand() is uniform in [0, 1), `detail` the probability of <a|b>."""
    text = ""
    for part in parts:
        if isinstance(part, str):
            text += part
        elif part[0] == "$":
            text += slots.get(part[1]) or expand(RULES[part[1]], slots, rand, detail)
        elif part[0] == "[" or rand() < detail:
            text += expand(part[1][int(rand() * len(part[1]))], slots, rand, detail)
    return text


def generate_story(rand):
    """One story; rand() returns random numbers that are uniform in [0, 1)."""

    def pick(options):
        return options[int(rand() * len(options))]

    slots = {name: pick(options) for name, options in SLOTS.items()}
    slots["to"] = "to " + slots["at"].split(" ", 1)[1]
    slots["mom"], slots["mhe"] = pick(ADULTS)
    for f, N in ("", "N"), ("f", "F"):  # slots of the hero ($he, $N) and the friend ($fhe, $F)
        girl, animal = rand() < 0.5, rand() < 0.4
        slots[N] = pick([n for n in (GIRLS if girl else BOYS) if n != slots.get("N")])
        slots[f + "kind"] = pick(ANIMALS) if animal else "girl" if girl else "boy"
        slots[f + "he"], slots[f + "him"], slots[f + "his"] = (
            ("she", "her", "her") if girl else ("he", "him", "his")
        )
        slots[f + "hand"] = "paw" if animal else "hand"
    slots["hands"] = slots["hand"] + "s"
    text = expand(pick(PLANS), slots, rand, detail=rand() ** 1.5)
    for pattern, fix in FIXES:
        text = pattern.sub(fix, text)
    return text
