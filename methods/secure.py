"""Secure aggregation: the server learns the exact sum of updates, and no single one.

Bonawitz et al. 2017 (doi 10.1145/3133956.3133982), for a server that does its part and is
curious. A sum takes four exchanges:

    keys      each client makes three key pairs for this sum alone and tells the public halves
    shares    it shares two of the private ones among all, each share sealed for one client
    masked    it sends its update in fixed point plus masks, modulo 2^64
    reveal    it opens, of each client that has sent its part, a share of that one's own mask,
              and of each that has not, a share of the key of its masks with others

Between each two clients there is a mask that one adds and the other subtracts: in the sum they
are gone. Those with a client that drops out stay in it, and the others' shares give the server
its key, and so these masks. Had it been late only, its part would lie open then: therefore
each part has a mask of its own on top. A client opens one share or the other, once, and more
than half of all shares are needed, so that no server has both.

Of Flower's parts (`flwr.common.secure_aggregation`) Shamir's shares and Fernet are used. Its PRG
is seeded with 32 bits, which can be tried, and its quantisation has steps as large as a small
update. Masks are AES-256 in counter mode, with keys of X25519 and HKDF-SHA256.
"""

import math
from base64 import urlsafe_b64encode
from collections.abc import Callable, MutableMapping, Sequence
from typing import Any

import numpy as np
import torch
from cryptography.hazmat.primitives.asymmetric.x25519 import (
    X25519PrivateKey,
    X25519PublicKey,
)
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
from flwr.common.secure_aggregation.crypto.shamir import create_shares
from flwr.common.secure_aggregation.crypto.symmetric_encryption import decrypt, encrypt
from flwr.common.secure_aggregation.secaggplus_utils import (
    share_keys_plaintext_concat,
    share_keys_plaintext_separate,
)

from methods.base import State, Unusable
from methods.store import Kept

LEAST = 3  # clients of a sum: of two, each knows the other's part
MOST = 1000  # clients of a sum, each of which makes a mask with each other
KEY = 32  # bytes, of X25519 and AES-256
SHARE = 4 + 48  # bytes of a share of a key, as Flower has it: its number, three blocks
SEALED = 248  # bytes of two of them under Fernet
CHUNK = 2**20  # bytes of a mask at a time: they stay in the processor's cache

LIMIT = 1024.0  # of a value of an update, and of a loss
BITS = 62  # of a sum; the 63rd is for what rounding adds, the 64th is the sign
FINE = 2.0**24  # steps to 1 that there have to be at least: an error of 3e-8
COUNT = 2.0**40  # of a figure that is a whole number

# What comes after the values: the sums of clients' figures.
FIGURES = ("weight", "train_loss", "tokens", "peak_memory")


def threshold(members: int) -> int:
    """How many of so many clients' shares give a secret: more than half."""
    return members // 2 + 1


def least(members: int) -> int:
    """How many of so many clients have to send their part."""
    return max(LEAST, threshold(members))


# --- fixed point ----------------------------------------------------------------------------


def scale(members: int, most: int) -> float:
    """Steps to 1 in which so many clients count, whose weights are `most` at most.

    A power of 2: as fine as a sum of `BITS` allows, which for 20 clients of weight 160 are
    2^40. Raises `Unusable` for less than `FINE`.
    """
    steps = 2.0 ** (BITS - math.ceil(math.log2(members * most * LIMIT)))
    if steps < FINE:
        raise Unusable(
            f"{members} clients with weights of up to {most} make too large a sum for 64 "
            f"bits. Set strategy.max_weight={int(2**BITS / FINE / LIMIT / members)} or less"
        )
    return steps


def encode(
    update: State, figures: dict[str, float], weight: int, members: int, most: int
) -> np.ndarray:
    """The update times its weight in fixed point, and the `FIGURES`: uint64, modulo 2^64.

    The mean of decoded sums is off by half a step at most, 1 / (2 `scale`). `figures`: of
    `train_loss`, `tokens` and `peak_memory`. Raises `Unusable` for values beyond `LIMIT`.
    """
    steps = scale(members, most)
    tensors = [update[name].double().numpy() for name in sorted(update)]
    values = np.concatenate([tensor.ravel() for tensor in tensors])
    if not np.abs(values).max() <= LIMIT:  # NaN is not
        raise Unusable(f"its update holds values beyond {LIMIT:g}")
    loss = min(max(figures["train_loss"], 0.0), LIMIT)
    counts = [min(max(figures[name], 0.0), COUNT) for name in FIGURES[2:]]
    tail = [weight, loss * weight * steps, *counts]
    values = np.concatenate([values * (weight * steps), tail])
    return np.rint(values).astype(np.int64).view(np.uint64)


def size(shapes: dict[str, tuple[int, ...]]) -> int:
    """Numbers in an encoded update of tensors of these shapes."""
    return sum(map(math.prod, shapes.values())) + len(FIGURES)


def decode(
    total: np.ndarray,
    shapes: dict[str, tuple[int, ...]],
    count: int,
    members: int,
    most: int,
) -> tuple[State, dict[str, float]]:
    """The weighted mean update in float64 and the figures, of the sum of `count` encoded.

    The figures: the sum of weights, the weighted mean loss, the sum of tokens, and the mean
    of peak memory. Raises `Unusable` where no such clients have this sum: one of them has sent
    something else than an update.
    """
    values = total.view(np.int64)
    tail = dict(zip(FIGURES, values[-len(FIGURES) :].tolist(), strict=True))
    steps, weight = scale(members, most), tail["weight"]
    if not count <= weight <= count * most:
        raise Unusable(f"the sum of {count} clients' weights is out of bounds")
    mean = values[: -len(FIGURES)] / (weight * steps)
    loss = tail["train_loss"] / (weight * steps)
    counts = [tail[name] for name in FIGURES[2:]]
    if not 0 <= loss <= LIMIT or not all(0 <= n <= count * COUNT for n in counts):
        raise Unusable(f"the sum of {count} clients' figures is out of bounds")
    if not np.abs(mean).max() <= LIMIT * (1 + 1 / FINE):
        raise Unusable(f"the sum of {count} clients' updates is out of bounds")
    state: State = {}
    start = 0
    for name, shape in sorted(shapes.items()):
        end = start + math.prod(shape)
        state[name] = torch.from_numpy(mean[start:end].reshape(shape))
        start = end
    return state, {
        "weight": weight,
        "train_loss": loss,
        "tokens": tail["tokens"],
        "peak_memory": tail["peak_memory"] / count,
    }


# --- keys and masks -------------------------------------------------------------------------


def public(secret: bytes) -> bytes:
    """The public half of a key."""
    return X25519PrivateKey.from_private_bytes(secret).public_key().public_bytes_raw()


def agreed(purpose: str, secret: bytes, other: bytes) -> bytes:
    """The key that only the owners of `secret` and of the public key `other` can make.

    Raises `ValueError` for a public key that would make the same with everybody's.
    """
    mine = X25519PrivateKey.from_private_bytes(secret)
    shared = mine.exchange(X25519PublicKey.from_public_bytes(other))
    return _derived(purpose, shared, *sorted([public(secret), other]))


def _derived(purpose: str, secret: bytes, *context: bytes) -> bytes:
    info = b"llm-flowertune " + purpose.encode() + b"".join(context)
    return HKDF(SHA256(), KEY, salt=None, info=info).derive(secret)


def add_mask(total: np.ndarray, key: bytes, sign: int) -> None:
    """Add to `total` (uint64), or subtract, what `key` makes: 64 bits a number.

    A key is used once, so its counter begins at 0.
    """
    stream = Cipher(algorithms.AES(key), modes.CTR(bytes(16))).encryptor()
    zeros, mask = bytes(CHUNK), bytearray(CHUNK + 15)
    step = CHUNK // 8
    for start in range(0, len(total), step):
        part = total[start : start + step]
        count = stream.update_into(memoryview(zeros)[: part.nbytes], mask)
        values = np.frombuffer(mask, "<u8", count // 8)
        (np.add if sign > 0 else np.subtract)(part, values, out=part)


def _pairwise(one: int, other: int) -> int:
    """The sign with which a client adds the mask that it has with another."""
    return 1 if one < other else -1


# --- on a client ----------------------------------------------------------------------------


class Member:
    """A client's part of one sum. Every step is done once, in its turn.

    `kept`: where its secrets are from one message to the next: in the memory of the process,
    and nowhere else. `fewest`: clients whose sum it takes part in. What comes is foreign: a
    method raises `Unusable` for what is not as it has to be, `ValueError` for keys that are
    none.
    """

    def __init__(self, kept: MutableMapping[str, Any], fewest: int = LEAST) -> None:
        self.kept, self.fewest = kept, fewest

    def keys(self) -> bytes:
        """The three public keys of a new sum: to seal with, of its masks with others, and of
        its own mask. An earlier sum that is not done is forgotten."""
        made = [X25519PrivateKey.generate() for _ in range(3)]
        self.kept.clear()
        self.kept["secrets"] = [each.private_bytes_raw() for each in made]
        self.kept["turn"] = "shares"
        return b"".join(each.public_key().public_bytes_raw() for each in made)

    def shares(self, keys: list[bytes], numbers: list[int]) -> list[bytes]:
        """For each member, in the order of all the `keys`, what is sealed for it; nothing for
        the client itself. `numbers`: by which the server knows them."""
        self._take("shares")
        mine = b"".join(map(public, self.kept["secrets"]))
        count = len(keys)
        if not LEAST <= count <= MOST:
            raise Unusable(f"a sum of {count} clients is refused: {LEAST} to {MOST}")
        if any(type(key) is not bytes or len(key) != 3 * KEY for key in keys):
            raise Unusable("the keys that came in are none")
        if len({*keys}) < count or keys.count(mine) != 1:
            raise Unusable("keys came in twice, or the client's own are not among them")
        if len({*numbers}) != count or any(type(n) is not int for n in numbers):
            raise Unusable("the members that came in have no numbers of their own")
        me = keys.index(mine)
        sealing, *shared = self.kept["secrets"]
        split = [create_shares(one, threshold(count), count) for one in shared]
        pairs = [*zip(*split, strict=True)]
        sealed = [
            b""
            if i == me
            else encrypt(
                _sealing(sealing, key),
                share_keys_plaintext_concat(me, i, own, masking),
            )
            for i, (key, (masking, own)) in enumerate(zip(keys, pairs, strict=True))
        ]
        self.kept.update(keys=keys, numbers=numbers, own=[*pairs[me]], turn="begin")
        return sealed

    def begin(self, members: list[int], sealed: list[bytes]) -> int:
        """Look at what came for the exchange in which the masked update is sent, before the
        client trains; how many members there are.

        `members`: the places in `keys` of those that have sent shares, and what each of them
        has `sealed` for this one.
        """
        self._take("begin")
        count = len(self.kept["keys"])
        self._look(members, range(count))
        if len(sealed) != len(members):
            raise Unusable("there are not as many sealed shares as members")
        if any(type(one) is not bytes or len(one) > SEALED for one in sealed):
            raise Unusable("the sealed shares that came in are none")
        self.kept.update(members=members, sealed=sealed, turn="mask")
        return count

    def mask(self, vector: np.ndarray) -> np.ndarray:
        """The vector (uint64, one dimension) with this client's masks."""
        self._take("mask")
        _, masking, own = self.kept["secrets"]
        keys = self.kept["keys"]
        me = self._place()
        masked = vector.copy()
        add_mask(masked, _derived("own", own), 1)
        for i in self.kept["members"]:
            if i != me:
                key = agreed("mask", masking, keys[i][KEY : 2 * KEY])
                add_mask(masked, key, _pairwise(me, i))
        self.kept["turn"] = "reveal"
        return masked

    def reveal(
        self, survivors: list[int], may: Callable[[list[int]], None]
    ) -> list[bytes]:
        """A share for each member: of the own mask's key of those in `survivors`, whose parts
        are in the sum, and of the other masks' key of the rest. Empty where what came was no
        share. All secrets are forgotten then.

        `may` is asked for these clients, by their numbers, and raises where they are not to be
        summed.
        """
        self._take("reveal")
        members, me = self.kept["members"], self._place()
        self._look(survivors, members)
        may([self.kept["numbers"][i] for i in survivors])
        opened = []
        for i, sealed in zip(members, self.kept["sealed"], strict=True):
            masking, own = self.kept["own"] if i == me else self._open(i, me, sealed)
            opened.append(own if i in survivors else masking)
        self.kept.clear()
        return opened

    def _take(self, turn: str) -> None:
        """Begin a step, which is then not begun again."""
        if self.kept.get("turn") != turn:
            raise Unusable(f"secure aggregation: a message for '{turn}' is out of turn")
        self.kept["turn"] = "none"

    def _place(self) -> int:
        return self.kept["keys"].index(b"".join(map(public, self.kept["secrets"])))

    def _look(self, chosen: list[int], among: Sequence[int]) -> None:
        """Raise `Unusable` for what is no choice of enough members, the client with them."""
        if any(type(i) is not int for i in chosen) or not {*chosen} <= {*among}:
            raise Unusable("members came in that are none")
        if chosen != sorted({*chosen}) or self._place() not in chosen:
            raise Unusable("the client is not among the members, or one is there twice")
        needed = max(self.fewest, least(len(self.kept["keys"])))
        if len(chosen) < needed:
            raise Unusable(
                f"a sum of {len(chosen)} clients is refused: of {len(self.kept['keys'])} "
                f"there have to be {needed}"
            )

    def _open(self, sender: int, me: int, sealed: bytes) -> tuple[bytes, bytes]:
        """The shares of a sender's two keys, empty where they are none."""
        try:
            key = _sealing(self.kept["secrets"][0], self.kept["keys"][sender])
            source, target, *shares = share_keys_plaintext_separate(
                decrypt(key, sealed)
            )
        except Exception:  # whatever is made of what another client has sent
            return b"", b""
        fits = [len(one) == SHARE and _numbered(one) == me + 1 for one in shares]
        ours = (source, target) == (sender, me) and all(fits)
        return (shares[1], shares[0]) if ours else (b"", b"")


def _sealing(secret: bytes, keys: bytes) -> bytes:
    """The key, as Fernet takes it, of what one client seals for another."""
    return urlsafe_b64encode(agreed("seal", secret, keys[:KEY]))


class Part:
    """A client's part of a sum, from before it trains until its masked update is made.

    `asked`: what came beside the adapter; foreign. Raises as `Member` does.
    """

    def __init__(self, member: Member, asked: dict[str, Any]) -> None:
        self.member, self.most = member, asked["most"]
        if type(self.most) is not int or self.most < 1:
            raise Unusable("the largest weight that came in is none")
        self.members = member.begin(asked["members"], asked["sealed"])
        scale(self.members, self.most)  # known before anything is trained

    def masked(
        self, update: State, figures: dict[str, float], weight: int
    ) -> np.ndarray:
        """What is sent of an update that counts for `weight`, or for the most that any does."""
        weight = min(weight, self.most)
        return self.member.mask(
            encode(update, figures, weight, self.members, self.most)
        )


def answer(member: Member, asked: dict[str, Any], kept: Kept) -> bytes | list[bytes]:
    """What a client answers when it is asked for a step before or after it has trained."""
    match asked["step"]:
        case "keys":
            return member.keys()
        case "shares":
            return member.shares(asked["keys"], asked["numbers"])
        case "reveal":
            return member.reveal(asked["survivors"], OneSum(kept))
    raise Unusable("a sum has no such step")


class OneSum:
    """Of a client's updates of a round one sum alone is made known.

    A second one, with others, would tell the update by the difference: the round's training
    starts from the same adapter and the same seed. A run that goes on after a stop does a
    round again; that is the same sum, if the same clients are in it. `kept`: the client's
    `store.Kept` of the round.
    """

    def __init__(self, kept: Kept) -> None:
        self.kept = kept

    def __call__(self, numbers: list[int]) -> None:
        """Take down that these clients are in it. Raises `Unusable` where others are."""
        number = self.kept.number
        told = torch.tensor([number, *sorted(numbers)])
        later = Kept(self.kept.folder, self.kept.partition, number + 1)
        known = (later.load("sum") or {"sum": told})["sum"]
        if known[0] == number and not torch.equal(known, told):
            raise Unusable(
                f"another sum of round {number} with this client's update is known already"
            )
        self.kept.save("sum", {"sum": told})


# --- on the server --------------------------------------------------------------------------


class Total:
    """The server's part of one sum, of clients known by numbers.

    `keys`: what `Member.keys` gave, by number. What clients send is foreign: each `read_*` takes
    one client's reply and raises `Unusable` for what is not as it has to be, or any other
    exception.
    """

    def __init__(self, keys: dict[int, bytes]) -> None:
        if not LEAST <= len(keys) <= MOST:
            raise Unusable(
                f"{len(keys)} clients have sent keys, and a sum is of {LEAST} to {MOST}"
            )
        self.numbers = sorted(keys)
        self.keys = [keys[number] for number in self.numbers]
        self.sealed: dict[int, list[bytes]] = {}  # by place
        self.opened: dict[int, list[bytes]] = {}
        self.added: list[int] = []
        self.sum: np.ndarray | None = None
        self.lost: list[int] = []  # numbers of those whose shares are none

    @property
    def members(self) -> list[int]:
        """The places of those that have sent shares."""
        return sorted(self.sealed)

    def read_sealed(self, number: int, sealed: Any) -> None:
        me = self.numbers.index(number)
        lengths = [(0,) if i == me else (SEALED,) for i in range(len(self.keys))]
        _look_at(sealed, lengths, "sealed shares")
        self.sealed[me] = sealed

    def sealed_for(self, number: int) -> list[bytes]:
        me = self.numbers.index(number)
        return [self.sealed[i][me] for i in self.members]

    def add(self, number: int, masked: np.ndarray) -> None:
        """Take up a masked update: uint64, of one dimension, the same for all."""
        if self.sum is None:
            self.sum = np.zeros_like(masked)
        np.add(self.sum, masked, out=self.sum)
        self.added = sorted([*self.added, self.numbers.index(number)])

    def check(self) -> None:
        """Raise `Unusable` where too few have sent what was asked last."""
        needed = least(len(self.keys))
        here = len(self.added if self.sum is not None else self.sealed)
        if here < needed:
            raise Unusable(
                f"{here} of {len(self.keys)} clients have gone on with a sum that needs "
                f"{needed} of them"
            )

    def read_opened(self, number: int, opened: Any) -> None:
        me = self.numbers.index(number)
        _look_at(opened, [(0, SHARE)] * len(self.sealed), "shares")
        if any(one and _numbered(one) != me + 1 for one in opened):
            raise Unusable("its shares are another client's")
        self.opened[me] = opened

    def unmasked(self) -> np.ndarray:
        """The sum of what those in `added` had before it was masked, modulo 2^64.

        Raises `Unusable` where too few have opened their shares, or what they have opened
        makes no key: `lost` then has whose.
        """
        if len(self.opened) < (needed := threshold(len(self.keys))):
            raise Unusable(
                f"{len(self.opened)} clients have opened their shares, and {needed} are needed"
            )
        weights: dict[tuple[int, ...], list[int]] = {}
        found: dict[int, bytes] = {}
        for place, i in enumerate(self.members):
            part = 2 if i in self.added else 1
            wanted = self.keys[i][part * KEY : (part + 1) * KEY]
            shares = [
                one[place] for _, one in sorted(self.opened.items()) if one[place]
            ]
            if (secret := _recovered(shares, needed, wanted, weights)) is None:
                self.lost.append(self.numbers[i])
            else:
                found[i] = secret
        if self.lost:
            raise Unusable(
                f"the shares of {len(self.lost)} clients' keys do not make them"
            )
        total = self.sum.copy()
        for i, secret in found.items():
            if i in self.added:
                add_mask(total, _derived("own", secret), -1)
                continue
            for other in self.added:
                key = agreed("mask", secret, self.keys[other][KEY : 2 * KEY])
                add_mask(total, key, -_pairwise(other, i))
        return total


def read_keys(keys: Any) -> bytes:
    """A client's public keys. Raises `Unusable`, or `ValueError` for weak ones."""
    if type(keys) is not bytes or len(keys) != 3 * KEY:
        raise Unusable("its keys are none")
    probe = X25519PrivateKey.generate().private_bytes_raw()
    for start in range(0, 3 * KEY, KEY):
        agreed("probe", probe, keys[start : start + KEY])
    return keys


def _look_at(values: Any, lengths: list[tuple[int, ...]], what: str) -> None:
    """Raise `Unusable` unless these are bytes, each of one of its lengths."""
    fits = type(values) is list and len(values) == len(lengths)
    pairs = zip(values, lengths, strict=True) if fits else ()
    if not fits or any(type(one) is not bytes or len(one) not in n for one, n in pairs):
        raise Unusable(f"its {what} are not as many, or as long, as they have to be")


# --- Shamir's shares, put together -----------------------------------------------------------
# Flower's `combine_shares` finds the weights of Lagrange anew for each key; they are the same for
# all keys that the same clients have opened shares of. Of 64 clients that is the difference
# between seconds and minutes.


def _recovered(
    shares: list[bytes],
    needed: int,
    wanted: bytes,
    known: dict[tuple[int, ...], list[int]],
) -> bytes | None:
    """The key of public half `wanted` that so many of these shares make, or None.

    One that is false spoils what it is put together with: `needed` shares in a row are tried,
    from each place on.
    """
    for start in range(len(shares) if len(shares) >= needed else 0):
        some = (shares[start:] + shares[:start])[:needed]
        points = tuple(map(_numbered, some))
        if points not in known:
            known[points] = lagrange(points)
        secret = combined(some, known[points])
        if secret is not None and public(secret) == wanted:
            return secret
    return None


def combined(shares: list[bytes], weights: list[int]) -> bytes | None:
    """The key of which these are shares; None where they make none."""
    whole = b""
    for start in range(4, SHARE, 16):
        value = 0
        for share, weight in zip(shares, weights, strict=True):
            value ^= _times(weight, int.from_bytes(share[start : start + 16], "big"))
        whole += value.to_bytes(16, "big")
    # Padded to whole blocks, as PKCS 7 has it.
    return whole[:KEY] if whole[KEY:] == bytes([16]) * 16 else None


def lagrange(points: Sequence[int]) -> list[int]:
    """The weights of a polynomial's values at these points in its value at 0, in GF(2^128)."""
    weights = []
    for one in points:
        above = below = 1
        for other in points:
            if other != one:
                above, below = _times(above, other), _times(below, one ^ other)
        weights.append(_times(above, _inverse(below)))
    return weights


def _times(one: int, other: int) -> int:
    """The product in GF(2^128), whose polynomial is 1 + x + x^2 + x^7 + x^128."""
    product = 0
    one, other = max(one, other), min(one, other)
    while other:
        if other & 1:
            product ^= one
        one <<= 1
        if one >> 128:
            one ^= 2**128 + 0b10000111
        other >>= 1
    return product


def _inverse(value: int) -> int:
    """x^(2^128 - 2), by squares."""
    result = 1
    for _ in range(127):
        value = _times(value, value)
        result = _times(result, value)
    return result


def _numbered(share: bytes) -> int:
    return int.from_bytes(share[:4], "little")
