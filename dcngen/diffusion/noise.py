"""Randomness as a pure function of integers: the same numbers give the same noise in any process, in any order."""

from __future__ import annotations

import hashlib

import torch


def derive_seed(*parts: int | str) -> int:
    """Mix integers and strings into one seed of 63 bits.

    `derive_seed(seed, "noise", rank, step)` is unrelated to the seed of the next step, rank or stream, which
    `seed + step` is not: there, step 1 of seed 0 repeats step 0 of seed 1.

    Args:
        parts: at least one integer or string. Order matters; 1 and "1" differ.

    Raises:
        TypeError: a part is neither an integer nor a string.
        ValueError: no part was given.
    """
    if not parts:
        raise ValueError("derive_seed expected at least one integer or string, got none; pass for example (seed, step)")
    for part in parts:
        if isinstance(part, bool) or not isinstance(part, (int, str)):
            raise TypeError(f"derive_seed expected integers and strings, got {part!r} of type {type(part).__name__}")
    text = "\x1f".join(f"{type(part).__name__}:{part}" for part in parts)
    digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def seeded_generator(*parts: int | str, device: str | torch.device = "cpu") -> torch.Generator:
    """A generator on `device` whose whole stream is a function of `parts` (see `derive_seed`).

    A stream drawn on a GPU differs from the one drawn on the CPU: where a result must not depend on the device,
    draw on the CPU and move the numbers.
    """
    return torch.Generator(device=device).manual_seed(derive_seed(*parts))
