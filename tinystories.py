"""
Stories: get them, cut them into tokens, and deal them to the training loop.

    python tinystories.py download                          # the real data set, or:
    python tinystories.py synthesize                        # a stand-in, made here, offline
    python tinystories.py train_vocab --vocab_size=512      # -> data/tok512.model
    python tinystories.py pretokenize --vocab_size=512      # -> data/tok512/*.bin
"""

import glob
import os

import numpy as np
import torch

BOS = 1  # every story in a shard is preceded by it

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
    paths = next(filter(None, (sorted(glob.glob(glob.escape(f) + "/*.bin")) for f in folders)), [])
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
        self.dealer = Dealer(windows, weights, seed)

    def __len__(self):
        return self.dealer.epoch

    def batch(self, position, batch_size):
        """The batch_size windows from `position` on: x, y int64 (B,T)."""
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
