"""Write data/tow_addition: 4-digit sums whose completions work column by column before they answer.

A small task on which thoughts between <ToW> and </ToW> visibly help: the digits of a sum are easy once the carries
have been written down, and hard when the first digit must be said at once. Thoughts go from the units up, each as
digit+digit+carry=sum with a two-digit sum: its first digit is the next carry, its second a digit of the answer.

    {"prompt": "4821+3977=", "completion": "<ToW>1+7+0=08</ToW><ToW>2+7+0=09</ToW>...8798"}

No sum occurs in two files or twice in one, also not with its operands swapped. The same arguments give the same bytes.

Run: python data/make_tow_addition.py
"""

import argparse
import json
import random
import sys
from collections.abc import Iterator
from pathlib import Path

LOW, HIGH = 1000, 9999


def thoughts(a: int, b: int) -> str:
    """The working of a + b, one thought per column from the units up."""
    parts, carry = [], 0
    for x, y in zip(reversed(str(a)), reversed(str(b)), strict=True):
        total = int(x) + int(y) + carry
        parts.append(f"<ToW>{x}+{y}+{carry}={total:02d}</ToW>")
        carry = total // 10
    return "".join(parts)


def distinct_rows(rng: random.Random) -> Iterator[dict[str, str]]:
    """Sums in random order; a sum and the same with its operands swapped count as one."""
    seen: set[tuple[int, int]] = set()
    while True:
        a, b = rng.randint(LOW, HIGH), rng.randint(LOW, HIGH)
        key = (min(a, b), max(a, b))
        if key not in seen:
            seen.add(key)
            yield {"prompt": f"{a}+{b}=", "completion": f"{thoughts(a, b)}{a + b}"}


def count(text: str) -> int:
    """A number of rows; the ceiling keeps drawing distinct sums quick."""
    if not text.isdecimal() or not 1 <= int(text) <= 1_000_000:
        raise argparse.ArgumentTypeError(f"expected a whole number from 1 to 1000000, got {text!r}")
    return int(text)


def main() -> int:
    parser = argparse.ArgumentParser(description="Write 4-digit sums with column-by-column thoughts as JSONL files.")
    default = Path(__file__).resolve().parent / "tow_addition"
    parser.add_argument("--out", type=Path, default=default, help="folder to write (default: tow_addition beside this)")
    parser.add_argument("--train", type=count, default=6400, help="rows in train.jsonl (default: %(default)s)")
    parser.add_argument("--validation", type=count, default=500, help="rows in validation.jsonl (default: %(default)s)")
    parser.add_argument("--test", type=count, default=500, help="rows in test.jsonl (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the sums drawn (default: %(default)s)")
    args = parser.parse_args()

    # The held-out rows are drawn first, so that they stay the same for every --train.
    rows = distinct_rows(random.Random(args.seed))
    try:
        args.out.mkdir(parents=True, exist_ok=True)
        for name, size in (("validation", args.validation), ("test", args.test), ("train", args.train)):
            lines = [json.dumps(next(rows)) + "\n" for _ in range(size)]
            (args.out / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8", newline="\n")
    except OSError as error:
        print(f"error: cannot write {args.out}: {error.strerror or error}", file=sys.stderr)
        return 2
    print(f"wrote {args.out}: {args.train} train, {args.validation} validation and {args.test} test rows")
    return 0


if __name__ == "__main__":
    sys.exit(main())
